"""DINOv2 and DINOv3: files with random weights, against transformers."""

import json
import re

import jax
import numpy as np
import pytest
from conftest import tiny_config
from one_device import models_on_one, train_alone  # noqa: F401
from quick_conversion import conversions_are_forks  # noqa: F401

import coca_jax
from coca_jax.cli import convert
from coca_jax.interop import export_format
from coca_jax.models import vision

torch = pytest.importorskip("torch", reason="needs the extra 'parity'")
transformers = pytest.importorskip("transformers", reason="needs the extra 'parity'")
pytestmark = pytest.mark.torch

SIZES = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=1, image_size=42)
KINDS = {
    "dinov2": ("Dinov2", dict(patch_size=14, mlp_ratio=2)),
    "giant": ("Dinov2", dict(patch_size=14, mlp_ratio=2, use_swiglu_ffn=True)),
    "registers": ("Dinov2WithRegisters", dict(patch_size=14, num_register_tokens=3)),
    "dinov3": ("DINOv3ViT", dict(patch_size=7, intermediate_size=96, num_register_tokens=2)),
    "dinov3 gated": (
        "DINOv3ViT",
        dict(patch_size=7, intermediate_size=96, use_gated_mlp=True, hidden_act="silu"),
    ),
}


def original(kind, folder):
    """A random model of transformers, written to a folder; every weight differs from its default."""
    name, more = KINDS[kind]
    config = getattr(transformers, f"{name}Config")(**SIZES, **more)
    model = getattr(transformers, f"{name}Model")(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for x in model.parameters():
            x.add_(0.1 * torch.randn(x.shape, generator=generator))
    model.eval().save_pretrained(folder)
    return model


def tokens_of(folder, pixels, dtype="float64", **model):
    """The tokens of pixels [N, S, T, 3] by a converted encoder."""
    params, config = export_format.read_export(folder)
    with jax.enable_x64(dtype == "float64"):
        sizes = config.change({"model.dtype": dtype, **model}).model
        params = jax.tree.map(lambda x: np.asarray(x, dtype), params)
        return np.asarray(
            vision.build(sizes).apply({"params": params}, pixels, method="encode_pixels")
        )


def images_of(*size):
    return np.random.default_rng(0).normal(size=(2, *size, 3))


def in_torch(model, pixels, layers=0):
    """The original's tokens without its registers: the last, or those after so many blocks."""
    count, found = getattr(model.config, "num_register_tokens", 0), []
    blocks = model.layer if hasattr(model, "layer") else model.encoder.layer
    hook = blocks[layers - 1].register_forward_hook(lambda *call: found.append(call[2]))
    with torch.no_grad():
        out = model.double()(torch.from_numpy(pixels.transpose(0, 3, 1, 2))).last_hidden_state
    hook.remove()
    tokens = (found[0][0] if isinstance(found[0], tuple) else found[0]) if layers else out
    return np.delete(tokens.numpy(), range(1, 1 + count), axis=1)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_equal_those_of_transformers(kind, tmp_path):
    """At the size of its own positions, at others, smaller and larger, and after every block."""
    model = original(kind, tmp_path / "theirs")
    convert.from_open_clip(str(tmp_path / "theirs"), str(tmp_path / "ours"))
    for size in ((42, 42), (28, 28), (70, 70), (28, 56)):
        sizes = {"model.image_size": size}
        if "dinov2" in kind or kind in ("giant", "registers"):
            sizes["model.image.table_size"] = 42
        found = tokens_of(tmp_path / "ours", images_of(*size), **sizes)
        np.testing.assert_allclose(found, in_torch(model, images_of(*size)), atol=1e-6)
    for layers in (1, 2, 3):
        out = str(tmp_path / f"first{layers}")
        convert.from_open_clip(str(tmp_path / "theirs"), out, layers=layers)
        wanted = in_torch(model, images_of(42, 42), layers)
        np.testing.assert_allclose(tokens_of(out, images_of(42, 42)), wanted, atol=1e-6)


def as_meta(kind, tensors):
    """The tensors of transformers under Meta's names."""
    third = kind.startswith("dinov3")
    registers = "storage_tokens" if third else "register_tokens"
    renames = [
        (r"embeddings\.(cls_token|mask_token)", r"\1"),
        (r"embeddings\.position_embeddings", "pos_embed"),
        (r"embeddings\.register_tokens", registers),
        (r"embeddings\.patch_embeddings(?:\.projection)?", "patch_embed.proj"),
        (r"(?:encoder\.)?layer\.(\d+)\.", r"blocks.\1."),
        (r"^layernorm\.", "norm."),
        (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
        (r"attention\.(?:output\.dense|o_proj)", "attn.proj"),
        (r"mlp\.weights_in", "mlp.w12"),
        (r"mlp\.weights_out", "mlp.w3"),
    ]
    gate = ("gate_proj", "w1"), ("up_proj", "w2"), ("down_proj", "w3")
    plain = ("up_proj", "fc1"), ("down_proj", "fc2")
    renames += [(rf"mlp\.{a}", f"mlp.{b}") for a, b in (gate if "gated" in kind else plain)]
    found = {}
    for name, tensor in tensors.items():
        for old, new in renames:
            name = re.sub(old, new, name)
        found[name] = tensor
    for block in range(SIZES["num_hidden_layers"]):
        for leaf in ("weight", "bias"):
            rows = []
            for part in ("query", "key", "value"):
                own = f"attention.{part[0]}_proj" if third else f"attention.attention.{part}"
                rows.append(found.pop(f"blocks.{block}.{own}.{leaf}", torch.full((64,), 9.0)))
            found[f"blocks.{block}.attn.qkv.{leaf}"] = torch.cat(rows)
        if third:  # the file has a bias of keys, which this mask turns off
            mask = torch.ones(192)
            mask[64:128] = 0
            found[f"blocks.{block}.attn.qkv.bias_mask"] = mask
    if third:
        found["rope_embed.periods"] = torch.ones(16)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_meta_give_the_same_parameters(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(convert.vision_weights.HEADS, 64, 1)
    model = original(kind, tmp_path / "theirs")
    torch.save(as_meta(kind, model.state_dict()), tmp_path / "meta.pth")
    convert.from_open_clip(str(tmp_path / "theirs"), str(tmp_path / "a"), image_size=28)
    config, _ = convert.from_open_clip(
        str(tmp_path / "meta.pth"), str(tmp_path / "b"), image_size=28
    )
    (ours, one), (theirs, two) = map(export_format.read_export, (tmp_path / "a", tmp_path / "b"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    if kind == "dinov3 gated":
        assert config["model"]["image"]["block"]["activation"] == "silu"
    assert one.model == two.model


def test_an_encoder_loads_trains_and_locks(tmp_path):
    model = original("registers", tmp_path / "theirs")
    given = dict(do_center_crop=False, size=dict(height=28, width=28), image_mean=[0.5, 0.4, 0.3])
    (tmp_path / "theirs/preprocessor_config.json").write_text(json.dumps(given))
    photos = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3), np.uint8)
    loaded = coca_jax.load(str(tmp_path / "theirs"))
    pixels = (photos / 255 - given["image_mean"]) / [0.229, 0.224, 0.225]
    wanted = in_torch(model, pixels)[:, 0]
    wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
    np.testing.assert_allclose(loaded.encode_image(photos), wanted, atol=1e-5)
    assert loaded.resize == "squash" and loaded.features(photos).shape == (3, 64)
    with pytest.raises(ValueError, match="image encoder alone and reads no texts"):
        loaded.encode_text(["a cat"])
    with pytest.raises(AttributeError, match="caption: an image encoder alone"):
        loaded.caption(photos)


def run_config(sizes, init_from):
    """Two steps of a tiny captioner on an encoder of these sizes."""
    config = tiny_config(embed_dim=8)
    config.model.text.vocab_size = 320
    for key in ("image_size", "patch_size", "image_mean", "image_std"):
        config.model[key] = getattr(sizes, key)
    config.model.image = {k: v for k, v in sizes.image.to_dict().items()}
    config.batch_size, config.steps = 4, 2
    config.data.sources = (dict(builtin="scenes", split="train", kind="caption"),)
    config.log.every_steps = config.checkpoint.every_steps = 2
    config.init_from, config.init_parts = str(init_from), "image"
    return config


@pytest.mark.parametrize("kind, size", [("registers", 28), ("dinov3 gated", 21)])
def test_a_captioner_trains_on_an_encoder(kind, size, tmp_path):
    """Locked, its parameters stay; at a learning rate, every one of them changes."""
    original(kind, tmp_path / "theirs")
    encoder = str(tmp_path / "encoder")
    convert.from_open_clip(str(tmp_path / "theirs"), encoder, layers=2, image_size=size)
    before, stored = export_format.read_export(encoder)
    for rate in (0.0, 1.0):
        config = run_config(stored.model, encoder)
        config.optimizer.image_learning_rate = rate
        train_alone(config, tmp_path / f"run{rate}")
        model = coca_jax.load(str(tmp_path / f"run{rate}"))
        after = export_format.flatten(model.params["image_encoder"])
        for name, old in export_format.flatten(before["image_encoder"]).items():
            # Softmax does not see a bias of keys that are not rotated, so it has no gradient.
            still = rate == 0 or (kind == "registers" and name.endswith("key/bias"))
            assert np.array_equal(old, after[name]) == still, name


class WithHead(torch.nn.Module):
    """An encoder in a larger model, as such files come."""

    def __init__(self, encoder):
        super().__init__()
        self.backbone, self.decoder = encoder, torch.nn.Linear(64, 3)

    def forward(self, input_image):
        return self.decoder(self.backbone(input_image).last_hidden_state)


@pytest.mark.filterwarnings("ignore")
def test_an_onnx_file_of_dinov2_gives_the_same_parameters(tmp_path, monkeypatch):
    pytest.importorskip("onnx", reason="needs the extra 'onnx'")
    model = original("dinov2", tmp_path / "theirs")
    monkeypatch.setitem(convert.vision_weights.HEADS, 64, 1)
    model.config._attn_implementation = "eager"
    file = str(tmp_path / "model.onnx")
    shapes = dict(dynamic_axes={"input_image": {0: "batch"}}, input_names=["input_image"])
    torch.onnx.export(WithHead(model), torch.zeros(1, 3, 28, 28), file, dynamo=False, **shapes)
    convert.from_open_clip(str(tmp_path / "theirs"), str(tmp_path / "a"), image_size=28)
    convert.from_open_clip(file, str(tmp_path / "b"), image_size=28)
    (ours, one), (theirs, two) = map(export_format.read_export, (tmp_path / "a", tmp_path / "b"))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert one.model == two.model
