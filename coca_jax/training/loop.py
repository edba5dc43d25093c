"""The loop over the steps of a run."""

from __future__ import annotations

from collections.abc import Callable

from coca_jax.training.feed import Feed
from coca_jax.training.hooks import Evaluation, Log
from coca_jax.training.programs import Programs
from coca_jax.training.replicas import Replicas
from coca_jax.training.saving import Save
from coca_jax.training.skipping import Skipping
from coca_jax.training.spikes import Spikes
from coca_jax.training.state import TrainState
from coca_jax.training.stopping import Preempted, Stop


def run(
    state: TrainState,
    start: int,
    steps: int,
    *,
    feed: Feed,
    step_fn: Programs,
    log: Log,
    check: Skipping,
    spikes: Spikes,
    replicas: Replicas,
    save: Save,
    evaluate: Evaluation,
    stop: Stop,
    trace: Callable[[int], None],
) -> TrainState:
    """The state after `steps` steps, from that after `start`.

    Raises Preempted after a save, when the run is asked to stop; Diverged when it learns nothing;
    WentUp when the loss has spiked; Corrupted when devices differ that must not.
    """
    for step in range(start + 1, steps + 1):
        trace(step)
        batch = next(feed)
        state, values = step_fn(step, state, batch)
        log(step, values)  # reads the step before last: the device stays busy
        check(step, values)
        spikes(step, values)
        stopping = stop.reached(step)
        saving = stopping or save.due(step)
        if replicas.due(step, saving):
            replicas(step, state)
        if saving:
            spikes.settle(step)
            last = stopping or step == steps
            with log.paused():
                saved = save(step, state, last=last)
        if stopping:
            raise Preempted(saved)
        if evaluate.due(step):
            with log.paused():
                evaluate(step, state)
    return state
