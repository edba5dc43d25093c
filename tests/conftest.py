"""Eight CPU devices for every test, set before JAX starts; the smallest configuration there is."""

import os
import shutil

COMPILE_FAST = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ.setdefault("XLA_FLAGS", f"--xla_force_host_platform_device_count=8 {COMPILE_FAST}")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402

from coca_jax.configs import base  # noqa: E402

needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")


def tiny_config(**model) -> ConfigDict:
    """A model of two layers a tower for 16 px images and captions of 8 tokens, float32."""
    config = base.get_config()
    config.batch_size, config.steps = 16, 5
    config.model.update(image_size=16, patch_size=8, embed_dim=16, dtype="float32")
    config.model.image.update(width=16, depth=2, mlp_dim=32, num_heads=4)
    config.model.text.update(
        width=16,
        unimodal_depth=2,
        multimodal_depth=2,
        mlp_dim=32,
        num_heads=4,
        vocab_size=64,
        max_len=8,
    )
    config.model.pooler.update(num_queries=4, num_heads=4)
    config.optimizer.update(name="adamw", learning_rate=1e-3, warmup_steps=1)
    config.model.update(model)
    return config


def random_batch(config: ConfigDict, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of random pixels and tokens, as training takes it."""
    rng = np.random.default_rng(seed)
    size, length = config.batch_size, config.model.text.max_len
    side = config.model.image_size
    lengths = rng.integers(3, length + 1, size)
    valid = np.arange(length)[None] < lengths[:, None]
    tokens = rng.integers(5, config.model.text.vocab_size, (size, length))
    tokens[:, 0] = 3
    return dict(
        image=rng.integers(0, 256, (size, side, side, 3), dtype=np.uint8),
        tokens=np.where(valid, tokens, 0).astype(np.int32),
        text_valid=valid,
        is_label=rng.random(size) < 0.5,
        text_id=rng.integers(0, 8, (size, 1)).repeat(2, 1).astype(np.int32),
    )


@pytest.fixture
def config() -> ConfigDict:
    return tiny_config()


@pytest.fixture
def one_device_mesh():
    from coca_jax import partitioning

    mesh = partitioning.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        yield mesh
