"""A run from its config to its report: mesh, data, model, state, restore, loop, evaluation."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from coca_jax import checkpointing, metrics, partitioning, run_config, train_step
from coca_jax.data import run_vocabulary
from coca_jax.data.batches import check_loader, open_stream
from coca_jax.data.mixture import Mixture, head_classes
from coca_jax.models import coca
from coca_jax.training import hooks, loop
from coca_jax.training.feed import Feed
from coca_jax.training.programs import Programs
from coca_jax.training.stopping import Preempted, Stop


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
        check_loader(config.data.loader)
        os.makedirs(workdir, exist_ok=True)
        process = dict(process_index=jax.process_index(), process_count=jax.process_count())
        mixture = Mixture(config, workdir, **process)
        class_names = head_classes(config, mixture)
        run_config.check_resumable(config, workdir, class_names)
        vocabulary = run_vocabulary.load_or_train(
            config, workdir, mixture, process_index=jax.process_index()
        )
        run_config.check_vocabulary(config, vocabulary)
        steps = run_config.num_steps(config, mixture.num_examples)
        model = build_model(config, mesh, len(class_names))
        checkpoints = checkpointing.Checkpoints(workdir, keep=config.checkpoint.keep)
        state, start = restore_or_begin(model, config, mesh, checkpoints, class_names)
        if jax.process_index() == 0:  # only now: a config that fails must not claim the workdir
            run_config.write(config, workdir, vocabulary, class_names)
            announce(config, mesh, state, steps, start)
        batches = open_stream(
            config, vocabulary, mixture, start_step=start, class_names=class_names, **process
        )
        if jax.process_index() == 0:
            print(mixture.describe(), file=sys.stderr)
            if remark := run_config.remark_batch(config, mixture.num_examples):
                print(remark, file=sys.stderr)

    feed = Feed(batches, config, mesh, buckets)
    log = hooks.Log(config, workdir, steps, start, feed, batches, buckets)
    save = hooks.Save(config, checkpoints, steps, buckets)
    evaluate = hooks.Evaluation(config, vocabulary, class_names, workdir, steps, buckets)
    stop = Stop()
    preempted = None
    try:
        state = loop.run(
            state,
            start,
            steps,
            feed=feed,
            step_fn=Programs(model, config, mesh, steps, buckets),
            log=log,
            save=save,
            evaluate=evaluate,
            stop=stop,
            trace=functools.partial(hooks.trace, config, workdir=workdir),
        )
    except Preempted as asked:
        preempted = asked
    finally:
        feed.close()
        batches.close()
        stop.close()
    log.close()
    save.close()
    if preempted is not None:
        raise preempted
    scores = evaluate(steps, state)
    summary = {"workdir": str(workdir), "steps": steps, "skipped_steps": int(state.skipped)}
    return summary | scores | report(workdir, buckets)


def restore_or_begin(
    model: coca.CoCa,
    config: ConfigDict,
    mesh: Mesh,
    checkpoints: checkpointing.Checkpoints,
    class_names: Sequence[str],
) -> tuple[train_step.TrainState, int]:
    """(state, the steps that it has seen): the newest checkpoint's, else a fresh one, which starts
    from the weights at config.init_from where one is given."""
    start = checkpoints.latest_step()
    if start is not None:
        abstract, shardings = train_step.state_shardings(model, config, mesh)
        state = checkpoints.restore(start, abstract, shardings)
        logging.info("resumed at step %d", start)
        return state, start
    state = train_step.init_state(model, config, mesh)
    if config.init_from:
        from coca_jax import warm_start

        state = warm_start.apply(state, config.init_from, class_names)
    return state, 0


def report(workdir: str, buckets: metrics.TimeBuckets) -> dict[str, Any]:
    """Writes report.html and seconds.json on process 0; returns what the summary says of it."""
    if jax.process_index():
        return {}
    from coca_jax import report as reports

    path = reports.write_report(workdir)
    seconds = {k: round(v, 1) for k, v in buckets.total().items()}
    pathlib.Path(workdir, "seconds.json").write_text(json.dumps(seconds))
    return {"report": str(path)}


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
