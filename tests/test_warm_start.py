"""Starting from other weights: exact copies, resized positions, clear refusals."""

import jax
import numpy as np
import pytest
from conftest import tiny_config

from coca_jax import export_format, train_step, warm_start
from coca_jax.models import coca


def test_positions_of_the_same_grid_stay_and_others_interpolate():
    grid = np.arange(16, dtype=np.float32).reshape(16, 1)
    np.testing.assert_allclose(warm_start.resize_positions(grid, 16), grid, atol=1e-5)
    bigger = warm_start.resize_positions(grid, 64).reshape(8, 8)
    assert (np.diff(bigger, axis=1) > 0).all() and (np.diff(bigger, axis=0) > 0).all()
    np.testing.assert_allclose(bigger.mean(), grid.mean(), rtol=1e-3)
    with_class = np.concatenate([[[99.0]], grid]).astype(np.float32)
    assert warm_start.resize_positions(with_class, 65)[0, 0] == 99
    with pytest.raises(ValueError, match="not both square grids"):
        warm_start.resize_positions(grid, 60)


def test_weights_start_a_model_of_another_image_size(tmp_path, one_device_mesh):
    small, large = tiny_config(), tiny_config(image_size=32)
    source = train_step.init_state(coca.build(small.model), small, one_device_mesh)
    vocabulary = tmp_path / "vocabulary.model"
    vocabulary.write_bytes(b"-")
    host = jax.device_get(source.params)
    export_format.write_export(tmp_path / "export", host, {"model": {}}, vocabulary)
    state = train_step.init_state(coca.build(large.model), large, one_device_mesh)
    state = warm_start.apply(state, str(tmp_path / "export"))
    assert state.params["image_encoder"]["positions"]["value"].shape == (16, 16)
    for part in ("text_decoder", "generative_pooler"):
        jax.tree.map(np.testing.assert_array_equal, state.params[part], host[part])

    other = tiny_config()
    other.model.text.max_len = 9
    state = train_step.init_state(coca.build(other.model), other, one_device_mesh)
    with pytest.raises(ValueError, match="text_decoder/positions/value has shape"):
        warm_start.apply(state, str(tmp_path / "export"))
    with pytest.raises(FileNotFoundError, match="no checkpoint under"):
        warm_start.apply(state, str(tmp_path / "nothing"))
