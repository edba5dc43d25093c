"""Every benchmark runs at a tiny size and reports a rate that fits its time."""

import numpy as np
import pytest
from conftest import tiny_config

from coca_jax import benchmark


def test_rates_are_work_over_time():
    config = tiny_config()
    config.mesh.update(data=8)
    result = benchmark.train(config, repeats=2)
    np.testing.assert_allclose(result["pairs_per_second"] * result["seconds"], config.batch_size)
    assert result["seconds_low"] <= result["seconds"] <= result["seconds_high"]
    result = benchmark.encode(config, batch=4, repeats=2)
    np.testing.assert_allclose(result["images_per_second"] * result["seconds"], 4)
    result = benchmark.caption(config, batch=2, tokens=5, beams=2, repeats=2)
    np.testing.assert_allclose(result["tokens_per_second"] * result["seconds"], 10)


def test_unknown_benchmarks_are_named():
    with pytest.raises(ValueError, match="give one of train"):
        benchmark.main(["benchmark", "fly"])
