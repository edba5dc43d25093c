"""PE-Core in open_clip's layout: files with random weights, against open_clip on timm's trunks."""

import json

import numpy as np
import pytest
from test_towers import PHOTOS, TEXTS, pixels_of, randomise, unit

import coca_jax
from coca_jax.cli import convert
from coca_jax.interop import pe_core

torch = pytest.importorskip("torch", reason="needs the extra 'parity'")
open_clip = pytest.importorskip("open_clip", reason="needs the extra 'parity'")
timm = pytest.importorskip("timm", reason="needs the extra 'parity'")
pytestmark = pytest.mark.torch

# timm's own arguments, for a trunk with a class token and for one without.
SMALL = dict(
    base=dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, ref_feat_shape=(4, 4)),
    gigantic=dict(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, ref_feat_shape=(4, 4)
    ),
)
TRUNKS = dict(
    base=pe_core.Trunk(64, 2, 4, 256), gigantic=pe_core.Trunk(48, 2, 3, 280, class_token=False)
)
NAMES = dict(base="vit_pe_core_base_patch16_224", gigantic="vit_pe_core_gigantic_patch14_448")


def in_open_clip(folder, name, monkeypatch):
    """A random PE-Core of open_clip in a folder: the trunk of timm's recipe, with small sizes."""
    make = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: make(*a, **k, **SMALL[name]))
    monkeypatch.setitem(pe_core.TRUNKS, name, TRUNKS[name])
    text = dict(context_length=32, vocab_size=49408, width=40, heads=4, layers=2)
    vision = dict(image_size=32, timm_model_name=NAMES[name], timm_model_pretrained=False)
    vision |= dict(timm_pool="map", timm_proj=None)
    model = randomise(open_clip.CustomTextCLIP(24, open_clip.CLIPVisionCfg(**vision), text))
    folder.mkdir()
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    vision["timm_model_name"] = NAMES[name].rsplit("_", 2)[0] + "_patch8_32"
    cfg = dict(embed_dim=24, vision_cfg=vision, text_cfg=text, custom_text=True)
    how = dict(mean=[0.5] * 3, std=[0.5] * 3, interpolation="bilinear", resize_mode="squash")
    (folder / "open_clip_config.json").write_text(
        json.dumps(dict(model_cfg=cfg, preprocess_cfg=how))
    )
    return model


@pytest.mark.parametrize("name", ["base", "gigantic"])
def test_embeddings_equal_those_of_open_clip(name, tmp_path, monkeypatch):
    original = in_open_clip(tmp_path / "weights", name, monkeypatch)
    config, layout = convert.from_open_clip(str(tmp_path / "weights"), str(tmp_path / "out"))
    assert len(layout.tensors()) == len(original.state_dict())
    assert config["model"]["family"] == "pe" and config["preprocess"]["resize"] == "squash"
    model = coca_jax.load(str(tmp_path / "out"))
    with torch.no_grad():
        images = original.encode_image(pixels_of(model))
        texts = original.encode_text(open_clip.tokenize(TEXTS, context_length=32))
    np.testing.assert_allclose(model.encode_image(PHOTOS), unit(images), atol=1e-5)
    np.testing.assert_allclose(model.encode_text(TEXTS), unit(texts), atol=1e-5)
