"""Models as ONNX files, and those that compute in other types than onnxruntime does."""

import pathlib

import jax
import numpy as np
import pytest
from test_inference import images, model, no_compile_cache, words  # noqa: F401

import coca_jax
from coca_jax import inference
from coca_jax.config import typed
from coca_jax.inference import export_onnx
from coca_jax.models import param_groups


@pytest.fixture
def onnx_packages(monkeypatch):
    pytest.importorskip("jax2onnx", reason="needs the extra 'onnx'")
    pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")
    return monkeypatch


@pytest.fixture(scope="module")
def in_bfloat16(model):  # noqa: F811
    config = typed(model.config).change({"model.dtype": "bfloat16"})
    return inference.CoCaModel(config, model.params, model.vocabulary, batch_size=8)


@pytest.mark.long
def test_onnx_programs_equal_the_model_in_float32(
    model,  # noqa: F811
    in_bfloat16,
    words,  # noqa: F811
    images,  # noqa: F811
    tmp_path,
    onnx_packages,
):
    """Of one in bfloat16 too, of which onnxruntime would load no products: both are the same."""
    found = export_onnx.export(in_bfloat16, str(tmp_path), batch=2, int8=True)
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
        token = decoder.step(token).argmax(-1).astype(np.int32)
        ids.append(token)
    for row, (caption,) in zip(np.stack(ids, 1), model.captions(pair, max_new_tokens=6)):
        assert (words.bos_id, *row[: caption.num_tokens].tolist()) == caption.tokens
    loaded = coca_jax.load(str(tmp_path))  # it is an export as well
    assert loaded.max_len == model.max_len and loaded.config.model.dtype == "bfloat16"
    exports_again(model, tmp_path, onnx_packages)


def exports_again(model, out, monkeypatch):  # noqa: F811
    """Over an export with int8: none of that stays, and what fails its check changes nothing."""
    kept = {name: (out / f"onnx/{name}.onnx").read_bytes() for name in export_onnx.NAMES}

    def again(function, arguments, name, path):  # to convert takes seconds
        pathlib.Path(path).write_bytes(kept[name])

    monkeypatch.setattr(export_onnx, "write", again)
    found = export_onnx.export(model, str(out), batch=2)
    assert max(found["differences"].values()) < 1e-5
    assert coca_jax.load(str(out)).config.model.dtype == "float32"
    programs = {f"onnx/{name}.onnx" for name in export_onnx.NAMES}
    assert {name for name in found["files"] if name.startswith("onnx/")} == programs
    other = inference.CoCaModel(
        model.config, jax.tree.map(lambda x: 2 * x, model.params), model.vocabulary
    )
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="encode_image.onnx differs from the model by"):
        export_onnx.export(other, str(out), batch=2)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_what_is_traced_for_onnx_is_in_float32(in_bfloat16):
    rounded = inference.CoCaModel(
        in_bfloat16.config, param_groups.narrow(in_bfloat16.params), in_bfloat16.vocabulary
    )
    assert "bfloat16" in {x.dtype.name for x in jax.tree.leaves(rounded.params)}
    found = export_onnx.in_float32(rounded)
    assert found.config.model.dtype == "float32" and found.max_len == rounded.max_len
    assert {x.dtype.name for x in jax.tree.leaves(found.params)} == {"float32"}
    assert export_onnx.in_float32(found) is found
