"""Exported programs run without the package and equal the model."""

import importlib.util
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
from docs_walk import ROOT
from test_inference import images, model, no_compile_cache, words  # noqa: F401

import coca_jax
from coca_jax import export
from coca_jax.inference import export_folder, export_onnx, export_programs
from coca_jax.models.pixels import normalise_pixels

# What a user without this package runs: jax, NumPy and the files.
WITHOUT_PACKAGE = """
import json, sys
import jax, numpy as np
from jax import export
folder = sys.argv[1]
data = open(f"{folder}/params.safetensors", "rb").read()
size = int.from_bytes(data[:8], "little")
header = json.loads(data[8 : 8 + size])
params = {
    name: np.frombuffer(data[8 + size :], np.float32, count=int(np.prod(entry["shape"])),
                        offset=entry["data_offsets"][0]).reshape(entry["shape"])
    for name, entry in header.items() if name != "__metadata__"
}
def program(name):
    data = open(f"{folder}/programs/{name}.jax_export", "rb").read()
    return export.deserialize(bytearray(data)).call
images = np.load(f"{folder}/images.npy")
embedding, tokens = program("encode_image")(params, images)
weights = program("decode_weights")(params)
state = program("decode_start")(weights, tokens)
step, token, caption = program("decode_step"), np.full(len(images), 3, np.int32), []
for place in range(6):
    log_probs, state = step(weights, state, token, np.int32(place))
    token = np.asarray(log_probs)[:, :300].argmax(-1).astype(np.int32)
    caption.append(token)
assert not any(name.startswith(("coca_jax", "flax")) for name in sys.modules)
np.savez(f"{folder}/found.npz", embedding=embedding, caption=np.stack(caption, 1))
"""


def test_programs_equal_the_model_without_its_code(model, words, images, tmp_path):  # noqa: F811
    files = export_programs.export(model, str(tmp_path))
    assert {"config.json", "params.safetensors", "vocabulary.model"} < set(files)
    assert max(export_programs.check(model, str(tmp_path)).values()) < 1e-5
    np.save(tmp_path / "images.npy", images)
    subprocess.run([sys.executable, "-c", WITHOUT_PACKAGE, str(tmp_path)], check=True, cwd=tmp_path)
    found = np.load(tmp_path / "found.npz")
    np.testing.assert_allclose(found["embedding"], model.encode_image(images), atol=1e-5)
    captions = model.captions(images, max_tokens=6)
    for tokens, (caption,) in zip(found["caption"], captions):
        ids = tokens[: caption.num_tokens].tolist()
        assert words.decode(ids) == caption.text


@pytest.fixture
def onnx_packages(monkeypatch):
    """They stand beside the environment, see .ci/run, and behind it."""
    beside = os.environ.get("COCA_JAX_ONNX", os.path.join(ROOT, ".venv", "onnx-packages"))
    if os.path.isdir(beside):
        monkeypatch.syspath_prepend(beside)
        sys.path.remove(beside)
        sys.path.append(beside)
    pytest.importorskip("jax2onnx", reason="needs the extra 'onnx'")
    pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")


def test_onnx_programs_equal_the_model(model, words, images, tmp_path, onnx_packages):  # noqa: F811
    found = export_onnx.export(model, str(tmp_path), batch=2, int8=True)
    assert set(found["differences"]) == {"encode_image", "encode_text", "decode_step"}
    assert max(found["differences"].values()) < 1e-5
    assert found["int8"]["image_cosine"] > 0.98 and found["int8"]["text_cosine"] > 0.98
    assert 0 < found["int8"]["log_prob"] < 0.5
    sizes = found["files"]
    assert sizes["onnx/encode_image.int8.onnx"] < 0.75 * sizes["onnx/encode_image.onnx"]
    pair = images[:2]
    embedding, tokens = export_onnx.run(f"{tmp_path}/onnx/encode_image.onnx", pair)
    np.testing.assert_allclose(embedding, model.encode_image(pair), atol=1e-5)
    decoder = export_onnx.Decoder(str(tmp_path), tokens)
    token, ids = np.full(2, words.bos_id, np.int32), []
    for _ in range(6):
        token = decoder.step(token)[:, : words.size].argmax(-1).astype(np.int32)
        ids.append(token)
    for row, (caption,) in zip(np.stack(ids, 1), model.captions(pair, max_tokens=6)):
        assert words.decode(row[: caption.num_tokens].tolist()) == caption.text
    assert coca_jax.load(str(tmp_path)).max_len == model.max_len  # it is an export as well


def test_config_says_what_the_model_is(model, tmp_path):  # noqa: F811
    export_programs.export(model, str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model"]["text"]["vocab_size"] == 320
    assert config["preprocess"]["resize"] == "squash"
    assert config["tokenizer"]["file"] == "vocabulary.model"


@pytest.mark.torch
def test_the_example_in_torch_gives_what_the_model_gives(model, images, tmp_path):  # noqa: F811
    torch = pytest.importorskip("torch", reason="needs the extra 'parity'")
    spec = importlib.util.spec_from_file_location("coca_torch", ROOT / "examples/coca_torch.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    export_folder.write(model, str(tmp_path))
    other = example.CoCa.load(str(tmp_path))
    length = model.max_len
    tokens = np.random.default_rng(0).integers(4, 300, (len(images), length))
    pixels = np.asarray(normalise_pixels(images, model.config.model))
    wanted = model.forward(pixels, tokens.astype(np.int32))
    with torch.no_grad():
        image, seen = other.encode_image(torch.tensor(images).float())
        ids = torch.tensor(tokens)
        text = other.encode_text(ids, torch.ones_like(ids, dtype=torch.bool))
        logits = other.caption_logits(ids, seen)
    for found, want in zip((image, text, seen, logits), wanted_of(wanted)):
        np.testing.assert_allclose(found.numpy(), want, atol=2e-5)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"]["text"]["cross"] = "open_clip"
    with pytest.raises(ValueError, match="model.text.cross='open_clip': not here"):
        example.CoCa(config, {})


def wanted_of(found):
    return found.image_embedding, found.text_embedding, found.image_tokens, found.logits


def test_onnx_without_its_packages_is_a_line_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    given = dict(checkpoint="nowhere", out=str(tmp_path / "out"), format="onnx", push="")
    args = types.SimpleNamespace(**given, platforms=["cpu"], int8=False, batch=1)
    monkeypatch.setattr(export, "flags", types.SimpleNamespace(FLAGS=args))
    with pytest.raises(ValueError, match="--format=onnx needs jax2onnx: pip install"):
        export.main(["export"])
    assert not (tmp_path / "out").exists()
