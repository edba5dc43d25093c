"""Learning rates step by step, by hand and against the definition (update_rules.py)."""

import jax.numpy as jnp
import numpy as np
import pytest
import update_rules
from conftest import tiny
from optimizer_cases import make_config

from coca_jax.config import Optimizer
from coca_jax.training import optimizer


def rates(kind, warmup, steps, count, peak=0.8):
    options = Optimizer(learning_rate=peak, warmup_steps=warmup, schedule=kind, decay_share=0.25)
    schedule = optimizer.make_schedule(options, steps)
    rates = [optimizer.learning_rate(kind, schedule, jnp.int32(step)) for step in range(count)]
    return np.array(rates, np.float64)


def test_schedules_step_by_step():
    """By hand: it starts above zero, has the peak at the warm-up's last step and at the next,
    falls by equal parts and reaches zero where the run has ended."""
    linear = [0.2, 0.4, 0.6, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, 0.0]
    np.testing.assert_allclose(rates("linear", 4, 12, 14), linear, rtol=1e-6, atol=1e-7)
    cosine = [0.4, 0.8, 0.8, 0.4 * (1 + 0.5**0.5), 0.4, 0.4 * (1 - 0.5**0.5), 0.0, 0.0]
    np.testing.assert_allclose(rates("cosine", 2, 6, 8), cosine, rtol=1e-6, atol=1e-7)
    constant = [0.8 / 3, 1.6 / 3, 0.8, 0.8, 0.8, 0.8]
    np.testing.assert_allclose(rates("constant", 3, 4, 6), constant, rtol=1e-6)
    fall = [0.8 * (1 - share**0.5) for share in (0, 1 / 4, 2 / 4, 3 / 4, 1, 1)]
    wsd = [0.4, 0.8, *[0.8] * 10, *fall]
    np.testing.assert_allclose(rates("wsd", 2, 16, 18), wsd, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rates("linear", 0, 4, 5), [0.8, 0.6, 0.4, 0.2, 0], atol=1e-7)


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup, steps", [(0, 1), (0, 13), (1, 2), (5, 13), (12, 13)])
def test_schedules_of_other_lengths(kind, warmup, steps):
    wanted = [update_rules.rate(kind, 0.8, warmup, steps, step) for step in range(steps + 2)]
    np.testing.assert_allclose(rates(kind, warmup, steps, steps + 2), wanted, rtol=2e-6, atol=1e-7)


def test_impossible_schedules_and_rules_are_named():
    for warmup, steps in ((4, 4), (9, 4)):
        with pytest.raises(ValueError, match=f"warmup_steps={warmup} is not below the run's 4"):
            rates("linear", warmup, steps, 0)
    rates("linear", 4, 0, 0)  # a run whose steps are not known yet
    with pytest.raises(ValueError, match="schedule"):
        rates("step", 0, 4, 0)
    with pytest.raises(ValueError, match="optimizer.name='sgd'"):
        optimizer.make_optimizer(make_config().optimizer.change({"name": "sgd"}, "optimizer"))


def test_a_profile_behind_the_run_is_refused():
    """It would never be taken."""
    config = tiny(**{"data.sources": (dict(builtin="scenes"),), "log.profile_steps": (5, 7)})
    config.check_length(5)
    config.check_length(0)  # a run whose steps are not known yet
    with pytest.raises(ValueError, match=r"profile_steps=\(5, 7\) is behind the run's 4 steps"):
        config.check_length(4)
