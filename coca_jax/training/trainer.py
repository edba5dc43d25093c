"""A run from its config to its report: mesh, data, model, state, restore, loop, evaluation."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax

from coca_jax.checkpoints import config_file, manager
from coca_jax.config import Config, Recipe, shapes, typed
from coca_jax.data import batch_schedule, prepare, source_index
from coca_jax.data.feature_cache import Features
from coca_jax.parallel import sharding
from coca_jax.runtime import (
    goodput,
    lease,
    metric_log,
    notes,
    out_folder,
    signals,
    storage,
    watchdog,
)
from coca_jax.runtime.signals import Preempted, Stop
from coca_jax.training import (
    bad_steps,
    callbacks,
    feature_extraction,
    guard,
    memory,
    multihost_checks,
    setup,
)
from coca_jax.training.bad_steps import Skipping, Spikes, WentUp
from coca_jax.training.best_checkpoint import Best
from coca_jax.training.callbacks import Evaluation, Log, Save
from coca_jax.training.feed import Feed
from coca_jax.training.optimizer import learning_rate, make_schedule
from coca_jax.training.programs import Programs
from coca_jax.training.replicas import Replicas
from coca_jax.training.setup import Run
from coca_jax.training.skipped_batches import Batches, Ranges
from coca_jax.training.state import TrainState, init_state, state_shardings, trainable

# The loop over the steps of a run.


def run_loop(
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


def train(config: Recipe, workdir: str) -> dict[str, Any]:
    """Trains by `config` in `workdir`, resuming what is there; returns the summary that it prints.

    Raises ValueError for bad configuration or data before any long work, Preempted after a save.
    """
    buckets, workdir = metric_log.TimeBuckets(), storage.plain_path(str(workdir))
    with out_folder.gone_if_refused(workdir):
        with buckets("init"):
            config = typed(config)
            multihost_checks.on_command(config, workdir)
            mesh = setup.check(config, workdir)
            with prepare.within("--workdir", workdir):
                first = jax.process_index() == 0
                config = source_index.of_sources(config, workdir, main_process=first)
        with jax.set_mesh(mesh):
            return train_on(mesh, config, workdir, buckets)


def train_on(
    mesh: jax.sharding.Mesh, config: Config, workdir: str, buckets: metric_log.TimeBuckets
) -> dict[str, Any]:
    """`train` once the config is checked and the mesh is set."""
    stop = signals.current()
    stop.joined(jax.process_count())
    # A program that calls `train` is not ended from here.
    hang = 60 * config.faults.hang_minutes if stop.watched else 0
    watching = watchdog.Watchdog(workdir, buckets, hang, process=jax.process_index())
    first = jax.process_index() == 0
    with lease.held(workdir), contextlib.closing(watching):
        watching.start()
        with out_folder.cleaned_if_refused(workdir, first):
            return train_alone(mesh, config, workdir, buckets, stop)


def train_alone(
    mesh: jax.sharding.Mesh,
    config: Config,
    workdir: str,
    buckets: metric_log.TimeBuckets,
    stop: signals.Stop,
) -> dict[str, Any]:
    """`train_on` once no other process trains in `workdir`."""
    with buckets("init"):
        run = setup.prepare(mesh, config, workdir, buckets, stop)
        config = run.config  # which the data may have completed
        memory.check(config, mesh, run.say)
        told = (run.vocabulary, run.class_names, run.mixture.data_told)
        contents = config_file.contents(config, workdir, *told)
        multihost_checks.on_data(contents, workdir, run.mixture.num_examples)
        best = Best(config, workdir) if config.checkpoint.best else None
        checkpoints = manager.Checkpoints(
            workdir, keep=config.checkpoint.keep, best=best, run=contents
        )
        evaluate, spikes = callbacks.Evaluation(run, checkpoints, best), Spikes.of(run)
        if spikes.back is not None:  # killed while it went back
            give_up_after(spikes.back, evaluate, checkpoints, spikes)
        state, start = restore_or_begin(run, checkpoints)
        if run.main_process:  # only now: a config that fails must not claim the workdir
            config_file.write(contents, workdir)
        announce(run, state, start)
        before = goodput.age_before(buckets) if stop.watched else 0.0
        good = goodput.Goodput(workdir, buckets, start, before=before, write=run.main_process)
    try:
        try:
            evaluate.catch_up(start, state)
            state = steps(run, state, start, checkpoints, evaluate, good, spikes)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise ValueError(
                f"out of memory in a step of batch_size={config.batch_size} "
                f"({str(error).splitlines()[0]}); give {less_memory(config, mesh)}"
            ) from None
        if line := bad_steps.told(int(state.skipped), run.steps):
            run.say(f"warning: {line}")
        stop.end("evaluating")
        scores = evaluate(run.steps, state)
    except guard.LostTooMuch:
        good.close()
        report(run)
        raise
    if best is not None:
        run.say(best.line(checkpoints.steps(), checkpoints.directory))
    summary = {"workdir": str(workdir), "steps": run.steps, "skipped_steps": int(state.skipped)}
    good.note(run.steps, now=True)
    return summary | good.summary() | scores | report(run)


def less_memory(config: Config, mesh: jax.sharding.Mesh) -> str:
    """Flags of the same run in less memory: at least twice as many micro-batches, if the batches
    split into these, and remat."""
    rows = math.gcd(*batch_schedule.sizes(config)) // (
        sharding.batch_parts(mesh) * config.text_parts
    )
    more = (n for n in range(2 * config.accumulate_steps, rows + 1) if rows % n == 0)
    parts = "".join(f"--config.accumulate_steps={n} " for n in [*more][:1])
    return f"{parts}--config.remat=named, or a smaller batch_size"


def steps(
    run: Run,
    state: TrainState,
    start: int,
    checkpoints: manager.Checkpoints,
    evaluate: callbacks.Evaluation,
    good: goodput.Goodput,
    spikes: Spikes,
) -> TrainState:
    """All steps from `start` on, going back where the loss spikes.

    Raises Preempted after a save, when asked to stop.
    """
    step_fn = Programs(run)
    while True:
        spikes.begin(start)
        try:
            return steps_from(run, state, start, step_fn, checkpoints, evaluate, good, spikes)
        except WentUp as error:
            spike = error.with_traceback(None)  # whose frames hold the state
        del state
        state, start = go_back(run, spike, checkpoints, evaluate, good, spikes)


def go_back(
    run: Run,
    spike: WentUp,
    checkpoints: manager.Checkpoints,
    evaluate: callbacks.Evaluation,
    good: goodput.Goodput,
    spikes: Spikes,
) -> tuple[TrainState, int]:
    """The state of the newest checkpoint from before a spike, and its step."""
    with contextlib.suppress(manager.SaveFailed):
        checkpoints.wait()
    step = spikes.plan(spike, checkpoints.steps())
    first = max(1, spike.step - run.config.faults.spike_batches + 1)
    run.say(
        f"warning: {spike}; going back to step {step} and leaving out the batches of the steps "
        f"{first} to {spike.step}"
    )
    give_up_after(step, evaluate, checkpoints, spikes)
    good.go_back(step)
    with run.buckets("init"):
        return restore_or_begin(run, checkpoints)


def give_up_after(
    step: int,
    evaluate: callbacks.Evaluation,
    checkpoints: manager.Checkpoints,
    spikes: Spikes,
) -> None:
    """Removes what is there of later steps than `step`, to which the run goes back."""
    evaluate.forget_after(step)  # before the checkpoints go, at which the processes meet
    checkpoints.drop_after(step)
    spikes.gone_back()


def steps_from(
    run: Run,
    state: TrainState,
    start: int,
    step_fn: Programs,
    checkpoints: manager.Checkpoints,
    evaluate: callbacks.Evaluation,
    good: goodput.Goodput,
    spikes: Spikes,
) -> TrainState:
    """All steps from `start` on. Raises WentUp besides."""
    with run.buckets("init"):
        remarks = config_file.remarks(run.config, run.mixture.num_examples)
        remarks += [run.mixture.remark_small(), run.mixture.remark_uneven()]
        for remark in filter(None, remarks):
            run.say(remark)  # before hours go into tokens that are kept
        batches = open_batches(run, start, spikes.left_out, feature_extraction.keep(run, state))
        run.say(run.mixture.describe())
        feed = Feed(batches, run.config, run.mesh, run.buckets)
    log = callbacks.Log(run, start, feed, batches, good)
    save = callbacks.Save(run, checkpoints, state, start)
    trace = callbacks.Trace(run, start)
    ended: signals.Preempted | WentUp | guard.LostTooMuch | None = None
    run.stop.listen()
    try:
        state = run_loop(
            state,
            start,
            run.steps,
            feed=feed,
            step_fn=step_fn,
            log=log,
            check=bad_steps.Skipping(run, state, spikes.left_out),
            spikes=spikes,
            replicas=Replicas(run.mesh, run.config.faults.compare_every_steps),
            save=save,
            evaluate=evaluate,
            stop=run.stop,
            trace=trace,
        )
    except (signals.Preempted, WentUp, guard.LostTooMuch) as error:
        ended = error
    except Exception:
        finish(run, log, save)
        raise
    finally:
        trace.close()
        feed.close()
        batches.close()
        run.stop.close()
    log.close()
    if isinstance(ended, WentUp):
        raise ended
    save.close()
    if ended is not None:
        raise ended
    return state


def finish(run: Run, log: callbacks.Log, save: callbacks.Save) -> None:
    """Of a run that an error ends: its rows are written and a save under way is waited for, else it
    would be lost with the process. Not with several processes, where others may not come to it."""
    for close in (log.close, save.close) if run.stop.alone else (log.close,):
        try:
            close()
        except Exception as late:  # the error that ends the run is the one to tell
            run.say(f"warning: {late}")


def open_batches(
    run: Run, start: int, left_out: Ranges, features: Sequence[Features] = ()
) -> Batches:
    """The batches of this process from step `start` on, without those that are left out; features:
    the kept tokens of each source, see locked.py."""
    reader, readers = sharding.readers(run.mesh)
    return Batches(
        left_out,
        start,
        run.config,
        run.vocabulary,
        run.mixture,
        class_names=run.class_names,
        features=features,
        process_index=reader,
        process_count=readers,
    )


def restore_or_begin(run: Run, checkpoints: manager.Checkpoints) -> tuple[TrainState, int]:
    """(state, the steps that it has seen): the newest checkpoint's, else a fresh one, which starts
    from the weights at config.init_from where one is given."""
    steps = checkpoints.steps()
    if steps:
        run.begin(f"restoring step {steps[-1]}")
        target = state_shardings(run.model, run.config, run.mesh)
        found = checkpoints.restore_newest(*target)
        if found is not None:
            state, start, lines = found
            if lines:
                line = f"warning: {'; '.join(lines)}"
                run.say(line)
                notes.add(line)  # with the result, too
            return state, start
    run.begin("making the model")
    state = init_state(run.model, run.config, run.mesh)
    if run.config.init_from:
        from coca_jax.training import warm_start

        config, model = run.config, run.config.model
        if line := warm_start.remark(config):
            run.say(line)
        grid = shapes.grid(model.image_size, model.patch_size)
        how = (config.init_positions, config.init_parts, grid)
        state = warm_start.apply(state, config.init_from, run.class_names, *how)
    return state, 0


def report(run: Run) -> dict[str, Any]:
    """Writes report.html and seconds.json on process 0; returns what the summary says of it. The
    page comes last and all that it shows is kept, so that where it fails the run is told why and
    stays done."""
    if not run.main_process:
        return {}
    from coca_jax.evaluation import report as reports

    seconds = {k: round(v, 1) for k, v in run.buckets.total().items()}
    storage.write_text(storage.place(run.workdir) / "seconds.json", json.dumps(seconds))
    try:
        return {"report": str(reports.write_report(run.workdir))}
    except Exception as error:
        run.say(
            f"report.html was not written ({type(error).__name__}: {error}); all else of the run "
            f"is saved, and `coca-jax report {run.workdir}` writes it again"
        )
        return {}


def announce(run: Run, state: TrainState, start: int) -> None:
    """Says on standard error what is about to run."""
    count = sum(x.size for x in jax.tree.leaves(state.params))
    trained = jax.tree.leaves(trainable(state.params, run.config))
    moving = sum(x.size for x in trained)
    part = "" if moving == count else f" ({moving / 1e6:.2f}M trained)"
    shape = " x ".join(f"{k} {v}" for k, v in run.mesh.shape.items())
    devices = f"{run.mesh.size} {run.mesh.devices.flat[0].platform} device(s) ({shape})"
    run.say(
        f"{count / 1e6:.1f}M parameters{part} on {devices}; batch {batch_schedule.words(run.config)}, "
        f"steps {start} to {run.steps}"
    )
    if start and start < run.steps and run.steps_before not in (0, run.steps):
        kind = run.config.optimizer.schedule
        old, new = (
            float(learning_rate(kind, make_schedule(run.config.optimizer, steps), start))
            for steps in (run.steps_before, run.steps)
        )
        run.say(
            f"training longer: {run.steps} steps, {run.steps_before} before. The learning rate "
            f"follows the schedule of {run.steps} steps: {new:.3g} at step {start}, where the "
            f"schedule of {run.steps_before} has {old:.3g}"
        )
