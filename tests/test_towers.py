"""CLIP, MetaCLIP and SigLIP: files with random weights, against open_clip and transformers."""

import json
import shutil

import numpy as np
import pytest
from one_device import models_on_one  # noqa: F401
from PIL import Image
from quick_conversion import conversions_are_forks  # noqa: F401

import coca_jax
from coca_jax.apps.recaption import job
from coca_jax.apps.recaption.request import Request
from coca_jax.cli import convert
from coca_jax.data import vocabulary
from coca_jax.data.tower_texts import canonical
from coca_jax.inference.model import TwoTowerModel
from coca_jax.interop import timm_trunks
from coca_jax.runtime.workers import Engine

torch = pytest.importorskip("torch", reason="needs the extra 'parity'")
transformers = pytest.importorskip("transformers", reason="needs the extra 'parity'")
open_clip = pytest.importorskip("open_clip", reason="needs the extra 'parity'")
pytestmark = pytest.mark.torch

PHOTOS = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
# CLIP's "!" before another sign has the id of its padding.
TEXTS = ["a photo of a cat", "two Dogs, in a park!", "it", "a cat !;) a cat"]
VISION = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
TOWER = VISION | dict(hidden_size=40, intermediate_size=80)


def randomise(module):
    """All weights drawn, norms and biases too: a part that is left out would show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in module.named_parameters():
            if "logit" not in name:
                x.add_(0.1 * torch.randn(x.shape, generator=generator))
    return module.eval()


def in_transformers(kind, folder):
    """(a random model of transformers, written to a folder)."""
    names = {
        "clip": ("CLIPConfig", "CLIPModel"),
        "metaclip_2": ("MetaClip2Config", "MetaClip2Model"),
        "siglip": ("SiglipConfig", "SiglipModel"),
    }[kind]
    vision = VISION | dict(image_size=32, patch_size=8)
    text = dict(TOWER, vocab_size=49408)
    more = dict(projection_dim=24)
    if kind == "siglip":
        text |= VISION | dict(vocab_size=330, max_position_embeddings=16, projection_size=48)
        more = {}
    if kind == "metaclip_2":
        text |= dict(vocab_size=330, eos_token_id=1)
    config = getattr(transformers, names[0])(vision_config=vision, text_config=text, **more)
    model = randomise(getattr(transformers, names[1])(config))
    model.save_pretrained(folder)
    if kind != "clip":
        words = ["a photo of a cat", "two dogs in a park", "it is"] * 9
        vocabulary.train(words, 310, str(folder / "spiece.model"), 0)
    return model


def in_open_clip(folder, quick):
    """A random CLIP of open_clip in a folder: weights and configuration."""
    cfg = dict(
        embed_dim=24,
        vision_cfg=dict(image_size=32, layers=2, width=48, patch_size=8, head_width=12),
        text_cfg=dict(context_length=77, vocab_size=49408, width=40, heads=4, layers=2),
        quick_gelu=quick,
    )
    model = randomise(open_clip.CLIP(**cfg))
    folder.mkdir()
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=cfg)))
    return model


def siglip_in_open_clip(folder, tanh):
    """A random SigLIP of open_clip in a folder: timm's trunk, and the tokenizer beside it."""
    timm = pytest.importorskip("timm")
    text = dict(context_length=16, vocab_size=330, width=40, heads=4, layers=2)
    text |= dict(no_causal_mask=True, proj_bias=True, pool_type="last", norm_kwargs=dict(eps=1e-6))
    if tanh:
        text["act_kwargs"] = dict(approximate="tanh")
    vision = dict(image_size=32, width=48, layers=1, patch_size=8, head_width=12)
    model = open_clip.CustomTextCLIP(48, vision, text, init_logit_bias=-10.0)
    trunk = timm.models.vision_transformer.VisionTransformer(
        *(32, 8, 3, 0, "map", 48, 2, 4, 2.0), class_token=False
    )
    model.visual = torch.nn.Module()
    model.visual.trunk = trunk
    model.visual.forward = trunk.forward
    randomise(model)
    folder.mkdir()
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    name = dict(timm_model_name="vit_small8_patch8_siglip_32", timm_pool="map", timm_proj="none")
    cfg = dict(embed_dim=48, init_logit_bias=-10, custom_text=True, text_cfg=text)
    cfg["vision_cfg"] = dict(image_size=32, timm_model_pretrained=False) | name
    (folder / "open_clip_config.json").write_text(
        json.dumps(dict(model_cfg=cfg, preprocess_cfg=dict(mean=[0.5] * 3, std=[0.5] * 3)))
    )
    vocabulary.train(
        ["a photo of a cat", "two dogs in a park"] * 9, 310, folder / "spiece.model", 0
    )
    return model


def pixels_of(model):
    """PHOTOS as the original takes them."""
    sizes = model.config.model
    x = (PHOTOS / 255 - np.array(sizes.image_mean)) / np.array(sizes.image_std)
    return torch.from_numpy(x.transpose(0, 3, 1, 2).astype(np.float32))


def unit(x):
    return (x / x.norm(dim=-1, keepdim=True)).detach().numpy()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """(a random CLIP of transformers, its folder)."""
    folder = tmp_path_factory.mktemp("clip")
    return in_transformers("clip", folder), folder


@pytest.mark.parametrize("kind", ["clip", "metaclip_2", "siglip"])
def test_embeddings_equal_those_of_transformers(kind, clip, tmp_path):
    original, folder = clip if kind == "clip" else (in_transformers(kind, tmp_path), tmp_path)
    model = coca_jax.load(str(folder))
    assert isinstance(model, TwoTowerModel)
    tokens, valid = model._tokenize(TEXTS)
    assert valid.any(1).all() and len(tokens[0]) % 16 == 0
    with torch.no_grad():
        images = original.get_image_features(pixels_of(model))
        texts = original.get_text_features(torch.from_numpy(tokens).long())
    np.testing.assert_allclose(model.encode_image(PHOTOS), unit(images), atol=1e-5)
    np.testing.assert_allclose(model.encode_text(TEXTS), unit(texts), atol=1e-5)
    ids, valid = model.tokenize_with_mask(TEXTS)  # as CLIP_benchmark gives them
    assert ids.shape == valid.shape == (len(TEXTS), model.max_len)
    np.testing.assert_allclose(model.encode_tokens(ids, valid), unit(texts), atol=1e-5)
    scale = original.logit_scale.exp().item()
    logits = scale * unit(images) @ unit(texts).T
    wanted = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    found = model.zero_shot(PHOTOS, TEXTS, ["{}"])
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize(
    "given, told",
    [
        (dict(do_center_crop=True, size={"shortest_edge": 48}, crop_size=32), "size=48 and crop"),
        (dict(do_normalize=False), "do_normalize=false"),
        (dict(rescale_factor=1.0), "rescale_factor=1.0; only 1/255"),
        (dict(resample=0), r"resample=0; of cropped images only 3 \(bicubic\)$"),
        (dict(resample=2, do_center_crop=True), "resample=2; of cropped images only 3"),
        (dict(resample=1, do_center_crop=False), "resample=1; of squashed images only 2 .* or 3"),
    ],
)
def test_images_that_come_to_a_model_otherwise_are_refused(given, told, clip, tmp_path):
    shutil.copytree(clip[1], tmp_path, dirs_exist_ok=True)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(given))
    with pytest.raises(ValueError, match=f"preprocessor_config.json: {told}"):
        coca_jax.load(str(tmp_path))


def test_images_that_come_to_a_model_as_usual_are_cropped(clip, tmp_path):
    shutil.copytree(clip[1], tmp_path, dirs_exist_ok=True)
    usual = dict(do_center_crop=True, size=32, crop_size={"height": 32, "width": 32})
    usual |= dict(rescale_factor=0.00392156862745098, do_resize=True, do_normalize=True, resample=3)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(usual))
    assert coca_jax.load(str(tmp_path)).resize == "crop"


def test_what_is_no_whole_patch_is_cut_off_as_in_transformers(tmp_path):
    """Images of 384 in patches of 14, as SigLIP's largest has them, are no whole number of them."""
    image = VISION | dict(num_hidden_layers=1, image_size=37, patch_size=8)
    text = VISION | dict(num_hidden_layers=1, vocab_size=330, max_position_embeddings=16)
    config = transformers.SiglipConfig(vision_config=image, text_config=text)
    original = randomise(transformers.SiglipModel(config))
    original.save_pretrained(tmp_path)
    vocabulary.train(["a photo of a cat"] * 9, 310, str(tmp_path / "spiece.model"), 0)
    model = coca_jax.load(str(tmp_path))
    photos = np.random.default_rng(0).integers(0, 256, (2, 37, 37, 3), np.uint8)
    pixels = torch.from_numpy((photos / 127.5 - 1).transpose(0, 3, 1, 2).astype(np.float32))
    with torch.no_grad():
        wanted = unit(original.get_image_features(pixels))
    np.testing.assert_allclose(model.encode_image(photos), wanted, atol=1e-5)


@pytest.mark.parametrize("quick", [False, True])
def test_embeddings_equal_those_of_open_clip(quick, tmp_path):
    original = in_open_clip(tmp_path / "weights", quick)
    model = coca_jax.load(str(tmp_path / "weights"))
    with torch.no_grad():
        images = original.encode_image(pixels_of(model))
        texts = original.encode_text(open_clip.tokenize(TEXTS))
    np.testing.assert_allclose(model.encode_image(PHOTOS), unit(images), atol=1e-5)
    np.testing.assert_allclose(model.encode_text(TEXTS), unit(texts), atol=1e-5)
    config, layout = convert.from_open_clip(str(tmp_path / "weights"), str(tmp_path / "out"))
    assert config["model"]["family"] == "clip"
    assert len(layout.tensors()) == len(original.state_dict())
    assert coca_jax.load(str(tmp_path / "out")).checksum() == model.checksum()


def test_the_model_that_is_asked_for_is_not_taken_from_beside_the_weights(tmp_path):
    in_open_clip(tmp_path / "weights", False)
    given = str(tmp_path / "weights"), str(tmp_path / "out")
    for model in ("nonsense", str(tmp_path / "typo.json")):
        with pytest.raises(FileNotFoundError, match=f"^--model={model}: no such file, and not one"):
            convert.from_open_clip(*given, model)
    with pytest.raises(ValueError, match="do not fit the model: missing: visual.transformer"):
        convert.from_open_clip(*given, "coca_ViT-L-14")
    own = tmp_path / "own.json"
    (tmp_path / "weights/open_clip_config.json").rename(own)
    assert convert.from_open_clip(*given, str(own))[0]["model"]["family"] == "clip"


@pytest.mark.parametrize("tanh", [False, True])
def test_siglip_of_open_clip_equals_its_own(tanh, tmp_path, monkeypatch):
    monkeypatch.setitem(timm_trunks.TRUNKS, "small8", (48, 2, 4, 2.0))
    original = siglip_in_open_clip(tmp_path / "weights", tanh)
    config, layout = convert.from_open_clip(str(tmp_path / "weights"), str(tmp_path / "out"))
    assert len(layout.tensors()) == len(original.state_dict())
    assert config["model"]["family"] == "siglip" and config["preprocess"]["resize"] == "squash"
    model = coca_jax.load(str(tmp_path / "out"))
    tokens, _ = model._tokenize(TEXTS)
    with torch.no_grad():
        images = original.encode_image(pixels_of(model))
        texts = original.encode_text(torch.from_numpy(tokens).long())
    np.testing.assert_allclose(model.encode_image(PHOTOS), unit(images), atol=1e-5)
    np.testing.assert_allclose(model.encode_text(TEXTS), unit(texts), atol=1e-5)
    words = transformers.SiglipTokenizer(str(tmp_path / "weights" / "spiece.model"))
    words.save_pretrained(tmp_path / "words")
    its_own = open_clip.tokenizer.HFTokenizer(
        str(tmp_path / "words"), context_length=16, clean="canonicalize"
    )
    texts = ["a cat\u00e2\u20ac\u2122s park", "two  dogs\u2019 park!", "a cat &amp;amp; two dogs"]
    np.testing.assert_array_equal(model._tokenize(texts)[0], its_own(texts))


def test_what_needs_a_decoder_says_so(commands, tmp_path):
    in_open_clip(tmp_path / "weights", False)
    (tmp_path / "photos").mkdir()
    Image.fromarray(PHOTOS[0]).save(tmp_path / "photos/photo.png")
    command = ["caption", f"--checkpoint={tmp_path / 'weights'}", str(tmp_path / "photos")]
    done = commands.run(command, tmp_path)
    assert done.returncode == 2 and "has no decoder" in done.stderr.splitlines()[-1]
    weights, out = str(tmp_path / "weights"), str(tmp_path / "out")
    asked = Request(str(tmp_path / "photos"), "imagefolder", out, checkpoints=(weights,))
    with pytest.raises(ValueError, match="--checkpoint=.*weights: .* 'clip' has no decoder"):
        job.run(asked, job.plan(asked), Engine(), say=print, progress=False)
    assert not (tmp_path / "out/recaption/request.json").exists()  # another model may begin there
    model = coca_jax.load(str(tmp_path / "weights"))
    with pytest.raises(AttributeError, match="has no decoder"):
        model.caption([PHOTOS[0]])
    assert not hasattr(model, "caption_log_likelihood")


def test_what_is_not_supported_is_named(tmp_path):
    folder = tmp_path / "weights"
    in_open_clip(folder, False)
    file = folder / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["vision_cfg"]["timm_model_name"] = "eva02_base_patch16_clip_224"
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="vision_cfg.timm_model_name"):
        convert.from_open_clip(str(folder), str(tmp_path / "out"))
    assert canonical("Two Dogs,  in a_park!") == "two dogs in a park"
