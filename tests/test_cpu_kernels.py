"""The kernels of decoding on a CPU against float64 NumPy, and what happens without a compiler."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import needs_compiler

from coca_jax import cpu_kernels, decoding, partitioning
from coca_jax.models import coca
from configs import coca_base, demo, finetune_open_clip


@pytest.fixture(scope="module")
def kernels():
    assert cpu_kernels.available()
    return cpu_kernels


@needs_compiler
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 16, 17, 40])
@pytest.mark.parametrize("depth, width", [(1, 1), (15, 17), (64, 48), (300, 513)])
def test_product_equals_numpy(kernels, rows, depth, width):
    rng = np.random.default_rng(rows)
    x = rng.normal(size=(rows, depth)).astype(np.float32)
    kernel = rng.normal(size=(depth, width)).astype(np.float32)
    panels = kernels.panels(kernel)
    assert panels.shape == (-(-width // 16), depth, 16)
    found = np.asarray(kernels.product(x, panels, width))
    np.testing.assert_allclose(found, x.astype(float) @ kernel, rtol=0, atol=1e-6 * depth**0.5 * 4)


@needs_compiler
@pytest.mark.parametrize("rows", [1, 7, 33])
def test_grouped_product_equals_numpy(kernels, rows):
    rng = np.random.default_rng(rows)
    x = rng.normal(size=(rows, 3, 40)).astype(np.float32)
    kernel = rng.normal(size=(3, 40, 50)).astype(np.float32)
    panels = jax.vmap(kernels.panels)(kernel)
    found = np.asarray(kernels.grouped_product(x, panels, 50))
    want = np.einsum("rgd,gdf->rgf", x, kernel, dtype=float)
    np.testing.assert_allclose(found, want, rtol=0, atol=3e-5)


@needs_compiler
@pytest.mark.parametrize("rows", [1, 8, 17, 96])
@pytest.mark.parametrize("count, width", [(1, 5), (16, 16), (50, 48), (255, 33)])
def test_image_attention_equals_numpy(kernels, rows, count, width):
    rng = np.random.default_rng(rows + count)
    query = rng.normal(size=(3, rows, width)).astype(np.float32)
    tokens = rng.normal(size=(3, count, width)).astype(np.float32)
    found = kernels.attend_image(query, kernels.image_panels(tokens))
    one = (x[:, None] for x in (query, tokens, tokens))
    want = attention(*one, np.ones((3, rows, count), bool))
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)


def attention(query, key, value, mask):
    scores = np.einsum("bhnk,bhmk->bhnm", query, key, dtype=float)
    scores = np.where(mask[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bhnm,bhmk->bnhk", weights, np.where(np.isnan(value), 0, value), dtype=float)
    return out.reshape(*out.shape[:2], -1)


@needs_compiler
@pytest.mark.parametrize("width", [16, 48, 64, 80, 128])
@pytest.mark.parametrize("queries, slots", [(1, 1), (1, 255), (3, 40), (17, 5)])
def test_attention_equals_numpy(kernels, width, queries, slots):
    rng = np.random.default_rng(width + slots)
    query, key, value = (
        rng.normal(size=(2, 3, n, width)).astype(np.float32) for n in (queries, slots, slots)
    )
    mask = rng.random((2, queries, slots)) < 0.5
    mask[..., rng.integers(slots)] = True
    found = kernels.attend(query, key, value, mask)
    np.testing.assert_allclose(found, attention(query, key, value, mask), rtol=0, atol=1e-5)
    found = kernels.attend(query, key, value, None)
    whole = attention(query, key, value, np.ones_like(mask))
    np.testing.assert_allclose(found, whole, rtol=0, atol=1e-5)


@needs_compiler
def test_attention_does_not_read_what_the_mask_hides(kernels):
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(1, 2, n, 32)).astype(np.float32) for n in (2, 6, 6))
    mask = np.array([[[1, 0, 1, 0, 0, 1], [0, 0, 1, 0, 0, 0]]], bool)
    key[:, :, [1, 3]], value[:, :, [1, 3]] = np.nan, np.nan
    found = kernels.attend(query, key, value, mask)
    np.testing.assert_allclose(found, attention(query, key, value, mask), rtol=0, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("scale", [1e-6, 1.0, 30.0, 1e5])
def test_attention_of_any_sharpness(kernels, scale):
    """Scores apart by next to nothing and by more than float32's exponent holds."""
    rng = np.random.default_rng(1)
    query, key, value = (rng.normal(size=(1, 2, n, 16)).astype(np.float32) for n in (4, 9, 9))
    query = (query * scale).astype(np.float32)
    mask = np.ones((1, 4, 9), bool)
    found = np.asarray(kernels.attend(query, key, value, mask))
    # A score of 1e5 is known to 1e-2, so its softmax is too.
    atol = 1e-6 + 1e-6 * scale
    np.testing.assert_allclose(found, attention(query, key, value, mask), rtol=0, atol=atol)


@needs_compiler
def test_nan_in_gives_nan_out(kernels):
    x = np.array([[np.nan, 1.0], [1.0, 1.0]], np.float32)
    found = np.asarray(kernels.product(x, kernels.panels(np.ones((2, 20), np.float32)), 20))
    assert np.isnan(found[0]).all()
    np.testing.assert_array_equal(found[1], 2.0)


def without(compiler: str, folder) -> tuple[bool, str]:
    """(available, what was logged) in a new process whose compiler is `compiler`."""
    code = "from coca_jax import cpu_kernels as k; print(k.available(), k.available())"
    env = dict(os.environ, CXX=compiler, XDG_CACHE_HOME=str(folder))
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.split()
    assert first == second
    return first == "True", done.stderr


def test_without_a_compiler_a_warning_says_what_to_do(tmp_path):
    for compiler, reason in (
        ("no-such-compiler", "there is no C++ compiler 'no-such-compiler'"),
        ("false", "false cannot compile cpu_kernels.cc"),
    ):
        works, said = without(compiler, tmp_path)
        assert not works and said.count(reason) == 1 and "Install g++" in said
    assert not list(tmp_path.rglob("*.so"))


@needs_compiler
def test_it_is_compiled_once(tmp_path):
    assert without("c++", tmp_path) == (True, "")
    (library,) = tmp_path.rglob("*.so")
    made = library.stat().st_mtime_ns
    assert without("c++", tmp_path) == (True, "")
    assert library.stat().st_mtime_ns == made and len(list(library.parent.iterdir())) == 1


def test_where_the_kernels_are_used(monkeypatch):
    """Large float32 models on a single CPU device, with heads that the kernels take."""
    monkeypatch.setattr(cpu_kernels, "available", lambda: True)

    def layout(recipe, devices=1, **text):
        monkeypatch.setattr(jax, "device_count", lambda: devices)
        config = recipe.get_config()
        config.model.dtype = text.pop("dtype", "float32")
        config.model.text.update(text)
        params = jax.eval_shape(
            lambda key: partitioning.unbox(coca.init(coca.build(config.model), key)),
            jax.random.key(0),
        )
        spec = decoding.decoder(config.model, num_ids=config.model.text.vocab_size, eos_id=1)
        return decoding.best_layout(spec, params)

    assert layout(coca_base) == layout(finetune_open_clip) == "panels"
    assert layout(coca_base, dtype="bfloat16") == "transposed"
    assert layout(coca_base, devices=2) == "transposed"
    assert layout(coca_base, num_heads=32) == "transposed"  # heads of 24
    assert layout(demo) == "transposed"
    monkeypatch.setattr(cpu_kernels, "available", lambda: False)
    assert layout(coca_base) == "transposed"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert layout(coca_base) == "plain"
