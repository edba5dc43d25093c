"""ONNX of models that compute in other types than onnxruntime does."""

import jax
import numpy as np
import pytest
from test_export import onnx_packages  # noqa: F401
from test_inference import images, model, no_compile_cache, words  # noqa: F401

import coca_jax
from coca_jax import inference
from coca_jax.config import typed
from coca_jax.inference import export_onnx
from coca_jax.models import roles


@pytest.fixture(scope="module")
def in_bfloat16(model):  # noqa: F811
    config = typed(model.config).change({"model.dtype": "bfloat16"})
    return inference.CoCaModel(config, model.params, model.vocabulary, batch_size=8)


@pytest.mark.long
def test_onnx_of_a_model_in_bfloat16_computes_in_float32(
    model,  # noqa: F811
    in_bfloat16,
    images,  # noqa: F811
    tmp_path,
    onnx_packages,  # noqa: F811
):
    """onnxruntime loads no products of bfloat16, so no such model could be exported."""
    found = export_onnx.export(in_bfloat16, str(tmp_path), batch=2)
    assert max(found["differences"].values()) < 1e-5
    embedding, _ = export_onnx.run(f"{tmp_path}/onnx/encode_image.onnx", images[:2])
    np.testing.assert_allclose(embedding, model.encode_image(images[:2]), atol=1e-5)
    assert coca_jax.load(str(tmp_path)).config.model.dtype == "bfloat16"  # as the model is


def test_what_is_traced_for_onnx_is_in_float32(in_bfloat16):
    rounded = inference.CoCaModel(
        in_bfloat16.config, roles.narrow(in_bfloat16.params), in_bfloat16.vocabulary
    )
    assert "bfloat16" in {x.dtype.name for x in jax.tree.leaves(rounded.params)}
    found = export_onnx.in_float32(rounded)
    assert found.config.model.dtype == "float32" and found.max_len == rounded.max_len
    assert {x.dtype.name for x in jax.tree.leaves(found.params)} == {"float32"}
    assert export_onnx.in_float32(found) is found
