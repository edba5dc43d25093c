"""The loop over the steps of a run."""

from __future__ import annotations

import functools
from collections.abc import Callable

from coca_jax.train_step import TrainState
from coca_jax.training.feed import Feed
from coca_jax.training.hooks import Evaluation, Log, Save
from coca_jax.training.programs import Programs
from coca_jax.training.stopping import Preempted, Stop


def run(
    state: TrainState,
    start: int,
    steps: int,
    *,
    feed: Feed,
    step_fn: Programs,
    log: Log,
    save: Save,
    evaluate: Evaluation,
    stop: Stop,
    trace: Callable[[int], None],
) -> TrainState:
    """The state after `steps` steps, from that after `start`.

    Raises Preempted after a save, when the run is asked to stop.
    """
    for step in range(start + 1, steps + 1):
        trace(step)
        batch = next(feed)
        state, values = step_fn(step, state, batch)
        log(step, values)  # reads the step before last: the device stays busy
        stopping = stop.reached(step)
        if stopping or save.due(step):
            apart(log, functools.partial(save, step, state))
        if stopping:
            raise Preempted(step)
        if evaluate.due(step):
            apart(log, functools.partial(evaluate, step, state))
    return state


def apart(log: Log, work: Callable[[], object]) -> None:
    """Does what trains nothing: the log is brought up to date before and its clock starts anew."""
    log.flush()
    work()
    log.pause()
