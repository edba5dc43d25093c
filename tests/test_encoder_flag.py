"""`--encoder`: captioners on encoders in ONNX files, and on weights that are not converted yet."""

import json
import shutil

import numpy as np
import pytest
from conftest import tiny_config
from one_device import models_on_one, train_alone  # noqa: F401
from quick_conversion import conversions_are_forks  # noqa: F401

import coca_jax
from coca_jax.config import typed
from coca_jax.inference import export_folder
from coca_jax.interop import onnx_encoder
from coca_jax.training import encoder_flag

torch = pytest.importorskip("torch", reason="needs the extra 'parity'")
transformers = pytest.importorskip("transformers", reason="needs the extra 'parity'")
pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
pytestmark = pytest.mark.torch

PHOTOS = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3), np.uint8)


class Tokens(torch.nn.Module):
    """An encoder as an ONNX file has it: pixels in, one tensor out."""

    def __init__(self, encoder, take):
        super().__init__()
        self.encoder, self.take = encoder, take

    def forward(self, pixels):
        return self.take(self.encoder(pixels).last_hidden_state)


def as_tokens(x):
    return x


def as_vector(x):
    return x[:, 0]


def as_map(x):
    return x[:, 1:].transpose(1, 2).reshape(-1, 64, 2, 2)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """(a random DINOv2 of transformers, the folder with its files)."""
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2)
    config = transformers.Dinov2Config(**sizes, image_size=28, attn_implementation="eager")
    torch.manual_seed(0)
    model = transformers.Dinov2Model(config).eval()
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder)
    given = dict(do_center_crop=False, size=dict(height=28, width=28))
    (folder / "preprocessor_config.json").write_text(json.dumps(given))
    return model, folder


def exported(model, file, take=as_tokens, **axes):
    """Writes an ONNX file; gives the tokens of PHOTOS, normalised as ImageNet's are."""
    wrapped = Tokens(model, take)
    how = dict(dynamo=False, input_names=["pixels"], output_names=["found"], dynamic_axes=axes)
    torch.onnx.export(wrapped, torch.zeros(1, 3, 28, 28), str(file), **how)
    x = (PHOTOS / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    with torch.no_grad():
        return wrapped(torch.from_numpy(x.transpose(0, 3, 1, 2).astype(np.float32))).numpy()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("take, batch", [(as_tokens, "any"), (as_vector, "one"), (as_map, "any")])
def test_an_onnx_file_gives_its_own_tokens(take, batch, theirs, tmp_path):
    """Tokens with a class token, one vector, and a map of features; files of any batch size, and
    of one image at a time."""
    axes = dict(pixels={0: "b"}, found={0: "b"}) if batch == "any" else {}
    wanted = exported(theirs[0], tmp_path / "model.onnx", take, **axes)
    onnx_encoder.write(str(tmp_path / "model.onnx"), str(tmp_path / "encoder"))
    (tmp_path / "model.onnx").unlink()
    moved = shutil.move(tmp_path / "encoder", tmp_path / "moved")
    model = coca_jax.load(moved)
    if take is as_map:
        wanted = wanted.reshape(3, 64, 4).transpose(0, 2, 1)
    tokens = wanted[:, None] if take is as_vector else wanted
    np.testing.assert_allclose(model.features(PHOTOS), tokens.mean(1), atol=1e-5)
    pooled = tokens.mean(1) if take is as_map else tokens[:, 0]
    pooled = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
    np.testing.assert_allclose(model.encode_image(PHOTOS), pooled, atol=1e-5)


def recipe():
    config = tiny_config(embed_dim=8)
    config.model.text.vocab_size = 320
    config.batch_size, config.steps = 4, 3
    scenes = dict(builtin="scenes", split="train", kind="caption", limit=12)
    config.data.sources = (scenes,)
    config.log.every_steps = config.checkpoint.every_steps = 3
    return config


@pytest.mark.filterwarnings("ignore")
def test_a_captioner_on_an_onnx_file_equals_one_on_the_same_weights(theirs, tmp_path):
    """Both ways to run an encoder give the same run: trained on stored tokens, loaded, exported."""
    file = tmp_path / "model.onnx"
    exported(theirs[0], file, pixels={0: "b"}, found={0: "b"})
    models = {}
    for kind, place in (("onnx", f"{file}:found"), ("native", str(theirs[1]))):
        workdir = str(tmp_path / kind)
        config = typed(encoder_flag.use(recipe(), place, workdir, {}))
        assert config.data.features == f"{workdir}/features" and config.frozen_encoder
        train_alone(config, workdir)
        models[kind] = coca_jax.load(workdir)
    a, b = models["onnx"], models["native"]
    assert "image_encoder" not in a.params
    assert "image_encoder" in b.params
    np.testing.assert_allclose(a.encode_image(PHOTOS), b.encode_image(PHOTOS), atol=2e-4)
    np.testing.assert_allclose(a.encode_text(["a cat"]), b.encode_text(["a cat"]), atol=2e-4)
    assert a.caption(PHOTOS) == b.caption(PHOTOS)
    export_folder.write(a, str(tmp_path / "export"))
    shutil.rmtree(tmp_path / "onnx")
    file.unlink()
    moved = coca_jax.load(str(tmp_path / "export"))
    np.testing.assert_array_equal(moved.encode_image(PHOTOS), a.encode_image(PHOTOS))
    assert moved.checksum() == a.checksum()
    (tmp_path / "export/onnx/encoder.onnx").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="encoder.onnx is damaged"):
        coca_jax.load(str(tmp_path / "export")).caption(PHOTOS)


def test_an_encoder_and_weights_to_train_exclude_each_other(tmp_path):
    with pytest.raises(ValueError, match="--encoder=x.onnx and --config.init_from both"):
        encoder_flag.use(recipe(), "x.onnx", str(tmp_path), {"init_from": "y"})
    with pytest.raises(FileNotFoundError, match="x.onnx: no such file"):
        encoder_flag.use(recipe(), "x.onnx", str(tmp_path), {})
