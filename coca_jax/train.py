"""The main job: `python -m coca_jax.train --config=configs/X.py --workdir=DIR`.

Runs the acts in order: processes, mesh, data, model, state, restore, loop, evaluation. Running the
same command again resumes where the last whole checkpoint stands, bit for bit.
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import queue
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags, logging
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from coca_jax import (
    checkpointing,
    cli,
    metrics,
    partitioning,
    run_config,
    text_lengths,
    train_step,
)
from coca_jax.models import coca


class Preempted(Exception):
    """The run saved itself because the platform asked it to stop."""


def train(config: ConfigDict, workdir: str) -> dict[str, Any]:
    """Trains by `config` in `workdir`, resuming what is there; returns the summary that it prints.

    Raises ValueError for bad configuration or data before any long work, Preempted after a save.
    """
    buckets = metrics.TimeBuckets()
    with buckets("init"):
        run_config.check(config)
        if "://" in str(workdir):
            raise ValueError(f"workdir={workdir} is a URL; mount it and give the folder")
        mesh = partitioning.make_mesh(**config.mesh)
        run_config.check_batch(config, partitioning.batch_parts(mesh), jax.process_count())
    with jax.set_mesh(mesh):
        return train_on(mesh, config, workdir, buckets)


def train_on(
    mesh: Mesh, config: ConfigDict, workdir: str, buckets: metrics.TimeBuckets
) -> dict[str, Any]:
    """`train` once the config is checked and the mesh is set."""
    with buckets("init"):
        main_process = jax.process_index() == 0

        # TensorFlow takes seconds to import, so not before the checks.
        from coca_jax.data import pipeline

        os.makedirs(workdir, exist_ok=True)
        class_names = pipeline.head_classes(config)
        run_config.check_resumable(config, workdir, class_names)
        vocabulary = pipeline.load_vocabulary_or_train(
            config, workdir, process_index=jax.process_index()
        )
        run_config.check_vocabulary(config, vocabulary)
        steps = run_config.num_steps(config, pipeline.num_examples(config))
        model = build_model(config, mesh, len(class_names))
        checkpoints = checkpointing.Checkpoints(workdir, keep=config.checkpoint.keep)
        start = checkpoints.latest_step()
        if start is not None:
            abstract, shardings = train_step.state_shardings(model, config, mesh)
            state = checkpoints.restore(start, abstract, shardings)
            logging.info("resumed at step %d", start)
        else:
            state = train_step.init_state(model, config, mesh)
            if config.init_from:
                from coca_jax import warm_start

                state = warm_start.apply(state, config.init_from, class_names)
        start = start or 0
        if main_process:  # only now: a config that fails above must not claim the workdir
            run_config.write(config, workdir, vocabulary, class_names)
        announce(config, mesh, state, steps, start)

        batches = pipeline.train_batches(
            config,
            vocabulary,
            start_step=start,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            class_names=class_names,
        )
        if main_process:
            print(batches.describe(), file=sys.stderr)
        feed = prefetch((text_lengths.arrange(batch, config) for batch in batches), mesh)
        measured_feed = measured(feed, config)

    with buckets("compile"):
        _, shardings = train_step.state_shardings(model, config, mesh)

        @functools.cache
        def step_for(size: int, lengths: text_lengths.Lengths) -> Any:
            return jax.jit(
                train_step.make_train_step(model, config, steps, size, lengths),
                donate_argnums=0,
                out_shardings=(shardings, None),
            )

        compiled: set[tuple[int, text_lengths.Lengths]] = set()

    writer = metrics.MetricWriter(workdir, start_step=start) if main_process else None
    progress = metrics.Progress(
        steps, start_step=start, pairs_per_step=config.batch_size, enabled=main_process
    )
    preemption = checkpointing.Preemption()
    evaluate = make_evaluation(config, vocabulary, class_names, workdir)

    pending: tuple[int, dict[str, jax.Array]] | None = None
    previous: jax.Array | None = None
    waited = 0.0

    def log_pending() -> None:
        """Fetches the metrics of the step before last: the device has work while we wait."""
        nonlocal pending, waited
        if pending is None:
            return
        step, values = pending
        pending = None
        numbers = {k: float(v) for k, v in jax.device_get(values).items()}
        shown = {k: numbers[k] for k in SHOWN if k in numbers}
        rate = progress.update(step, shown, waited)
        numbers |= {"pairs_per_second": rate, "data_wait_seconds": waited}
        numbers |= batches.progress(step)
        waited = 0.0
        if writer is not None:
            times = {k: v for k, v in buckets.take().items() if k != "data_wait_seconds"}
            writer.write(step, {**numbers, **times})

    preempted = False
    step = start
    for step in range(start + 1, steps + 1):
        profile(config, step, workdir)
        tick = time.perf_counter()
        with buckets("data_wait"):
            batch, lengths = next(measured_feed)
        waited += time.perf_counter() - tick
        shape = (train_step.size_at(config, step - 1, steps), lengths)
        with buckets("step" if shape in compiled else "compile"):
            compiled.add(shape)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, values = step_for(*shape)(state, batch)
            log_pending()
            if step % config.log.every_steps == 0 or step == steps:
                pending = (step, values)
            if step == start + 1:
                jax.block_until_ready(values)
            elif previous is not None:
                jax.block_until_ready(previous)  # one step ahead at most: batches do not pile up
            previous = values["loss"]
        preempted = preemption.reached(step)
        if preempted or step % config.checkpoint.every_steps == 0 or step == steps:
            log_pending()
            with buckets("save"):
                checkpoints.save(step, state)
            progress.pause()
        if preempted:
            break
        if config.eval.every_steps and step % config.eval.every_steps == 0 and step < steps:
            log_pending()
            with buckets("eval"):
                evaluate(state, step)
            progress.pause()
    log_pending()
    feed.close()
    preemption.close()
    progress.close()
    with buckets("save"):
        checkpoints.close()
    if preempted:
        if writer is not None:
            writer.close()
        raise Preempted(f"asked to stop: saved step {step}; run the same command to go on")

    summary: dict[str, Any] = {"workdir": str(workdir), "steps": steps}
    with buckets("eval"):
        scores = evaluate(state, steps)
    summary |= {"skipped_steps": int(state.skipped)} | scores
    if writer is not None:
        writer.close()
        from coca_jax import report

        summary["report"] = str(report.write_report(workdir))
        seconds = {k: round(v, 1) for k, v in buckets.total().items()}
        pathlib.Path(workdir, "seconds.json").write_text(json.dumps(seconds))
    return summary


SHOWN = (
    *("loss", "contrastive_loss", "captioning_loss"),
    *("head_loss", "head_accuracy", "learning_rate"),
)


def build_model(config: ConfigDict, mesh: Mesh, num_classes: int = 0) -> coca.CoCa:
    """The module of `config` for the devices of `mesh`; num_classes: of its task head."""
    return coca.build(
        config.model,
        remat=config.remat,
        sigmoid=config.loss.contrastive == "sigmoid",
        platform=mesh.devices.flat[0].platform,
        head=config.head,
        num_classes=num_classes,
    )


def announce(config: ConfigDict, mesh: Mesh, state: Any, steps: int, start: int) -> None:
    """Says on standard error what is about to run."""
    if jax.process_index():
        return
    count = sum(x.size for x in jax.tree.leaves(state.params))
    trained = jax.tree.leaves(train_step.trainable(state.params, config))
    moving = sum(x.size for x in trained)
    part = "" if moving == count else f" ({moving / 1e6:.2f}M trained)"
    shape = " x ".join(f"{k} {v}" for k, v in mesh.shape.items())
    print(
        f"{count / 1e6:.1f}M parameters{part} on {mesh.size} {mesh.devices.flat[0].platform} "
        f"device(s) ({shape}); batch {config.batch_size}, steps {start} to {steps}",
        file=sys.stderr,
    )


class prefetch:  # noqa: N801 (used like a function)
    """Reads batches in a thread and places them on the mesh, two ahead of the step."""

    _END = object()

    def __init__(self, batches: Iterator[dict[str, np.ndarray]], mesh: Mesh, depth: int = 2):
        self._queue: queue.Queue = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(batches, mesh), daemon=True)
        self._thread.start()

    def _work(self, batches: Iterator[dict[str, np.ndarray]], mesh: Mesh) -> None:
        try:
            for batch in batches:
                rows = {k: v for k, v in batch.items() if k not in ("source", "index")}
                self._put(partitioning.place_batch(mesh, rows))
                if self._stop.is_set():
                    return
            self._put(self._END)
        except BaseException as error:  # handed to the training thread, which raises it
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.2)
            except queue.Full:
                continue

    def __iter__(self) -> prefetch:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        item = self._queue.get()
        if item is self._END:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stops the reading thread."""
        self._stop.set()
        self._thread.join(timeout=30)


def measured(
    feed: Iterator[dict[str, jax.Array]], config: ConfigDict
) -> Iterator[tuple[dict[str, jax.Array], text_lengths.Lengths]]:
    """Batches with the lengths to which their captions are cut.

    The devices find the longest captions of the global batch, so all processes agree. Those of a
    batch are asked for before the step of the batch ahead of it, so the answer does not wait for
    that step.
    """
    if not config.text_lengths:
        for batch in feed:
            yield batch, (config.model.text.max_len,) * 2
        return
    longest = jax.jit(lambda valid: text_lengths.longest(valid, config))
    ahead: tuple[dict[str, jax.Array], jax.Array] | None = None
    for batch in feed:
        asked = (batch, longest(batch["text_valid"]))
        if ahead is not None:
            yield ahead[0], text_lengths.choose(config, np.asarray(ahead[1]).tolist())
        ahead = asked


def profile(config: ConfigDict, step: int, workdir: str) -> None:
    """Traces the steps [first, last] of config.log.profile_steps into workdir/profile."""
    if not config.log.profile_steps or jax.process_index():
        return
    first, last = config.log.profile_steps
    if step == first:
        jax.profiler.start_trace(os.path.join(workdir, "profile"))
    elif step == last + 1:
        jax.profiler.stop_trace()


def make_evaluation(
    config: ConfigDict, vocabulary: Any, class_names: Sequence[str], workdir: str
) -> Any:
    """(state, step) -> scores of config.eval.tasks, also written to workdir/eval.json."""

    def run(state: train_step.TrainState, step: int) -> dict[str, float]:
        if not config.eval.tasks:
            return {}
        from coca_jax import evaluate, inference

        params = state.params
        if state.ema is not None:
            params = train_step.merge(params, state.ema)
        size = max(64, 16 * jax.device_count())
        model = inference.CoCaModel(
            config, params, vocabulary, batch_size=size, class_names=class_names
        )
        return evaluate.run_tasks(model, config.eval.tasks, workdir, step=step)

    return run


def define_flags() -> None:
    """Defines the command's flags; importing this module defines none."""
    config_flags.DEFINE_config_file("config", None, "Recipe, a file with get_config().")
    flags.DEFINE_string("workdir", None, "Where the run lives; made when missing.")
    flags.DEFINE_string("coordinator", "", "host:port of process 0, for several.")
    flags.DEFINE_integer("num_processes", 0, "Processes of this run.")
    flags.DEFINE_integer("process_id", -1, "This process's number, from 0.")


def main(argv: Sequence[str]) -> dict[str, Any] | None:
    """Command-line entry."""
    if len(argv) > 1:
        raise ValueError(f"unexpected argument {argv[1]!r}; options are --config and --workdir")
    if flags.FLAGS.config is None or flags.FLAGS.workdir is None:
        raise ValueError("give --config=configs/X.py and --workdir=DIR")
    partitioning.start_processes(
        flags.FLAGS.coordinator, flags.FLAGS.num_processes, flags.FLAGS.process_id
    )
    try:
        summary = train(flags.FLAGS.config, flags.FLAGS.workdir)
    except Preempted as stop:
        print(stop, file=sys.stderr)
        sys.exit(checkpointing.EXIT_PREEMPTED)
    return summary if jax.process_index() == 0 else None


if __name__ == "__main__":
    define_flags()
    cli.run(main)
