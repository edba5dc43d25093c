"""Runs whose first state no program draws."""

import jax
import pytest
from ops_cases import drawn

from coca_jax.models import coca
from coca_jax.training import state


def _draw(model, alike, mesh):
    """As `state._draw`, of parameters by NumPy, the same for all seeds."""
    abstract, sharding = state._shardings(model, alike, mesh)

    def begin(params, seed):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(coca, "init", lambda *_: params)
            return state.make_state(model, alike.config, jax.random.key(seed))

    program = jax.jit(begin, out_shardings=sharding)
    return lambda seed: program(drawn(abstract.params, 0.1), seed)


def first_state(model, config, mesh):
    """As `init_state`."""
    return _draw(model, state.of_state(config), mesh)(0)


@pytest.fixture(scope="module", autouse=True)
def drawn_by_numpy():
    """In a module that imports this, runs begin with parameters by NumPy: to compile the program
    that draws them takes a third as long as to compile a step. test_train.py has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "_draw", _draw)
        yield
