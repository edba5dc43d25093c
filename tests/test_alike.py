"""PyTorch's model that is alike layer for layer: with our weights it trains as ours does."""

import json
import pathlib
import sys

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from open_clip_cases import SMALL

from coca_jax.apps import benchmark
from coca_jax.apps.benchmark import build
from coca_jax.config import Config, read
from coca_jax.parallel import sharding
from coca_jax.training import auto_mesh, recipes
from coca_jax.training.state import init_state

ROOT = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(ROOT))
pytestmark = pytest.mark.torch


def small_config() -> Config:
    """The emoji recipe with every kind of layer, and little of each."""
    config = ConfigDict(recipes.load("emoji").to_dict(), convert_dict=True)
    config.batch_size, config.steps, config.text_lengths = 4, 10, ()
    config.model.update(image_size=8, patch_size=4, embed_dim=16, dtype="float32")
    config.model.image.update(width=16, mlp_dim=32, num_heads=2)
    config.model.image.update(conv_widths=(16, 32), conv_depths=(0, 2))
    config.model.text.update(width=16, mlp_dim=32, num_heads=2, vocab_size=40, max_len=6)
    config.model.pooler.update(num_queries=3, num_heads=2)
    config.optimizer.update(warmup_steps=0, learning_rate=0.02, schedule="constant")
    config.optimizer.average_share = 0.0
    return read(Config, config.to_dict())


def weights(params: dict, twin) -> dict[str, np.ndarray]:
    """Our parameters by PyTorch's names and in its layouts."""
    import torch_alike
    from torch import nn

    modules = dict(twin.named_modules())
    stem = {name: f"stem.layers.{i}" for i, name in enumerate(twin.stem.names)}
    names = {
        "image_encoder.positions": "image_positions",
        "text_decoder.positions": "text_positions",
    }
    names["image_encoder.blocks.layers"] = "image_blocks"
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        name = ".".join(key.key for key in path).removesuffix(".value")
        for old, new in names.items():
            name = name.replace(old, new)
        name = name.replace(".layers.", ".").removeprefix("image_encoder.")
        name = name.removeprefix("text_decoder.")
        for old, new in stem.items():
            if name.startswith(f"stem.{old}."):
                name = name.replace(f"stem.{old}", f"{new}.part" if "block" in old else new)
        stack = any(key.key == "layers" for key in path)
        first, _, rest = name.partition(".")
        for layer in range(leaf.shape[0]) if stack else (None,):
            one = f"{first}.{layer}.{rest}" if stack else name
            x = np.asarray(leaf if layer is None else leaf[layer])
            of, _, last = one.rpartition(".")
            module = modules.get(of)
            if isinstance(module, torch_alike.Standardised):
                x = x.transpose(3, 2, 0, 1) if last == "kernel" else x
            elif isinstance(module, nn.Linear):
                if last == "kernel":
                    one, x = f"{of}.weight", x.reshape(module.in_features, -1).T
                else:
                    x = x.reshape(-1)
            elif isinstance(module, nn.LayerNorm) and last == "scale":
                one = f"{of}.weight"
            found[one] = x
    return found


@pytest.fixture
def one_device(monkeypatch):
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    monkeypatch.setattr(auto_mesh, "make", lambda _: auto_mesh.Choice(mesh))
    with jax.set_mesh(mesh):
        yield mesh


@pytest.mark.long
def test_with_our_weights_it_makes_our_steps_and_both_are_timed(one_device, monkeypatch):
    torch = pytest.importorskip("torch", reason="needs the extra 'parity'")
    import alike
    import torch_alike

    config = small_config()
    twin, theirs = torch_alike.stepper(config)
    drawn = init_state(build(config), config, one_device).params
    params = jax.tree.map(np.array, drawn)  # drawn by another program, they take a second
    given = weights(params, twin)
    assert set(given) == set(dict(twin.named_parameters()))
    twin.load_state_dict({name: torch.from_numpy(np.array(x)) for name, x in given.items()})
    ours = benchmark.ours(config)
    batch = alike.captions(config, 6)
    batch["text_id"][1] = batch["text_id"][0]
    exact, near = (
        torch_alike.loss_of(twin, config.change({"model.dtype": dtype}), batch).item()
        for dtype in ("float32", "bfloat16")
    )
    assert near != exact and near == pytest.approx(exact, rel=0.01)  # products are rounded
    losses = [(float(ours(batch)["loss"]), theirs(batch)) for _ in range(3)]
    own, other = np.array(losses).T
    np.testing.assert_allclose(own[0], other[0], rtol=1e-5)
    assert own[0] - own[1] > 0.2
    np.testing.assert_allclose(own[1:], other[1:], atol=0.005)
    monkeypatch.setattr(benchmark, "ours", lambda config: ours)
    monkeypatch.setattr(alike, "make_params", lambda config: params)
    found = alike.steps(config, [6], 1) | dict(stem=alike.stem(config, 1))
    assert found["parameters"] == found["peer_parameters"] > 10_000
    for one in (found["step_6"], found["stem"]):
        assert one["cpu_times_peer"] == pytest.approx(one["peer_cpu_seconds"] / one["cpu_seconds"])


def test_a_model_of_another_kind_is_refused():
    pytest.importorskip("torch", reason="needs the extra 'parity'")
    import torch_alike

    config = small_config()
    with pytest.raises(ValueError, match="convolutional stem, ReLU and two poolers in cascade"):
        torch_alike.Alike(config.change({"model.activation": "gelu"}).model)
    with pytest.raises(ValueError, match="trains with Muon but optimizer.name='adamw'"):
        torch_alike.stepper(config.change({"optimizer.name": "adamw"}))


@pytest.mark.long  # open_clip takes ten seconds to import
def test_no_weight_of_the_peer_is_as_memory_was_found(monkeypatch, tmp_path):
    open_clip = pytest.importorskip("open_clip", reason="needs the extra 'parity'")
    import recaption_peer
    import torch

    (tmp_path / "coca_small.json").write_text(json.dumps(SMALL))
    open_clip.add_model_config(tmp_path / "coca_small.json")
    found = torch.empty

    def empty(*shape, **more):
        return found(*shape, **more).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", empty)
    model, _ = recaption_peer.built("coca_small")
    assert [name for name, x in model.named_parameters() if not x.isfinite().all()] == []
