"""One training run, from its config to its report."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from coca_jax.checkpoints import config_file, manager
from coca_jax.config import Config, Recipe, typed
from coca_jax.data import batch_schedule, prepare, source_index, teachers, texts
from coca_jax.data.mixture import Mixture, head_classes
from coca_jax.data.quarantine import Quarantine, Row
from coca_jax.data.vocabulary import Vocabulary
from coca_jax.evaluation.evaluators import base
from coca_jax.models.network import Network
from coca_jax.parallel import sharding
from coca_jax.runtime import (
    lease,
    metric_log,
    multihost,
    notes,
    out_folder,
    signals,
    storage,
    watchdog,
)
from coca_jax.runtime.goodput import Goodput, age_before
from coca_jax.training import (
    bad_steps,
    feature_extraction,
    guard,
    memory,
    multihost_checks,
    run_vocabulary,
    setup,
    warm_start,
)
from coca_jax.training.best_checkpoint import Best
from coca_jax.training.callbacks import EXPECTED, Callback, Evaluate, Log, Profile, Save
from coca_jax.training.feed import Feed
from coca_jax.training.optimizer import learning_rate, make_schedule
from coca_jax.training.programs import Programs
from coca_jax.training.replicas import CompareReplicas
from coca_jax.training.skipped_batches import Batches
from coca_jax.training.state import (
    TrainState,
    build_model,
    init_state,
    state_shardings,
    trainable,
)


def train(config: Recipe, workdir: str) -> dict[str, Any]:
    """Trains by `config` in `workdir`, resuming what is there. See `Trainer.fit`."""
    return Trainer(config, workdir).fit()


class Trainer:
    """A training run and all that belongs to it. `Trainer(config, workdir).fit()` trains.

    The methods stand in the order in which a run calls them. Each step does, in this order:

    1. `before_step` of every callback: the profiler starts or stops.
    2. The next batch is taken; a thread reads and places it up to two batches ahead.
    3. The compiled train step makes the new state.
    4. `after_step` of every callback, in the order of `make_callbacks`:
       - Log writes the metrics of the step before, so that the device never waits for the host;
       - NonFiniteSteps and LossSpikes look at that step's metrics too, and may end or rewind;
       - CompareReplicas compares devices, where this step is one of those that are compared;
       - Save saves when it is due or the run was asked to stop. Before that it calls `before_save`
         of every callback, so that nothing unchecked is saved. Then a stopping run ends;
       - Evaluate scores the state, which is saved at that point, so a kill costs no evaluation.

    When the loop ends, for whatever reason, `at_end` of every callback is called.

    Attributes:
        config: typed; completed by what the data say.
        buckets: where the time goes.
        stop: whether the run was asked to stop (Ctrl-C, SIGTERM).
        mixture, vocabulary, class_names: the data; classes are () without a task head.
        steps: where the run ends. steps_before: where it was to end when it ran last; 0 for a new
            run, and another number than `steps` when it is trained longer.
        state, step: the state, and the number of steps that it has seen.
        evaluate, spikes: callbacks that live as long as the run; the others are made anew when it
            goes back to an earlier checkpoint.
    """

    mesh: Mesh
    mixture: Mixture
    vocabulary: Vocabulary
    class_names: Sequence[str]
    steps: int
    model: Network
    best: Best | None
    checkpoints: manager.Checkpoints
    evaluate: Evaluate
    spikes: bad_steps.LossSpikes
    state: TrainState
    recorded: list[Sequence[Any]]  # quarantine of the checkpoint that the run resumes
    quarantine: Quarantine
    goodput: Goodput
    train_step: Programs
    batches: Batches
    feed: Feed
    log: Log
    callbacks: list[Callback]

    def __init__(self, config: Recipe, workdir: str):
        self.buckets = metric_log.TimeBuckets()
        self.workdir = storage.plain_path(str(workdir))
        self.config: Config = typed(config)
        self.stop = signals.current()
        self.step = self.steps_before = 0

    @property
    def main_process(self) -> bool:
        """Whether this process writes and speaks for the run."""
        return jax.process_index() == 0

    def say(self, line: str) -> None:
        """Prints a line on standard error, on the main process."""
        setup.say(line)

    def begin(self, work: str) -> None:
        """Says on standard error what takes the time that follows ('reading data'). A request to
        stop can leave it at any moment."""
        setup.begin(self.stop, work)

    def fit(self) -> dict[str, Any]:
        """Trains, evaluates and reports; resumes what is in the workdir. Returns the summary.

        Raises ValueError for bad configuration or data before any long work, and Preempted once the
        state is saved when the run is asked to stop.
        """
        with out_folder.gone_if_refused(self.workdir):
            with self.buckets("init"):
                self.check()
            with jax.set_mesh(self.mesh), self.owning_workdir():
                with self.buckets("init"):
                    self.open_data()
                    self.open_checkpoints()
                    self.restore_or_init()
                    self.begin_run()
                try:
                    with memory.explained(self.config, self.mesh):
                        self.evaluate.catch_up()
                        self.train()
                        return self.finish()
                except guard.LostTooMuch:
                    self.goodput.close()
                    self.report()
                    raise
                finally:
                    # Callbacks refer back to the trainer. Without this cycle the memory of a run is
                    # free as soon as nobody holds its trainer, before the next run needs it.
                    for name in ("callbacks", "log", "evaluate"):
                        vars(self).pop(name, None)

    # Before anything is written.

    def check(self) -> None:
        """Refuses a config that cannot be, and makes the mesh and the indexes of the sources."""
        multihost_checks.on_command(self.config.to_dict(), self.workdir)
        self.mesh = setup.check(self.config, self.workdir)
        with prepare.within("--workdir", self.workdir):
            self.config = source_index.of_sources(
                self.config, self.workdir, main_process=self.main_process
            )

    @contextlib.contextmanager
    def owning_workdir(self) -> Iterator[None]:
        """Inside, no other process trains in the workdir, and one that hangs is ended."""
        self.stop.joined(jax.process_count())
        # A program that calls `train` is not ended from here.
        hang = 60 * self.config.faults.hang_minutes if self.stop.watched else 0
        watching = watchdog.Watchdog(self.workdir, self.buckets, hang, process=jax.process_index())
        with lease.held(self.workdir), contextlib.closing(watching):
            watching.start()
            with out_folder.cleaned_if_refused(self.workdir, self.main_process):
                yield

    # Data, model, checkpoints and state.

    def open_data(self) -> None:
        """Reads the data's sizes and classes and the vocabulary, which is trained where there is
        none, and builds the model for them.

        Raises ValueError when the data or what the workdir holds does not fit the config.
        """
        # Compiled in processes of their own while the data are read.
        kernels = setup.begin_kernels(self.config, self.mesh.devices.flat[0].platform)
        self.begin("reading data")
        base.check(self.config.eval.tasks)  # not only at the end of the run
        mixture = self._open_mixture(self.config)
        config = setup.with_examples(self.config, mixture)
        teachers.check(mixture.sources, mixture.entries, config.loss)
        texts.check_scores(mixture.sources, mixture.entries)
        self.class_names = head_classes(config, mixture)
        if (storage.place(self.workdir) / "config.json").exists():
            old = manager.read_run(self.workdir)
            # First: other data have other classes and numbers of examples, which say less.
            config_file.check_data(mixture.data_digests, config, old, self.workdir)
            config_file.check_resumable(config, old, self.workdir, self.class_names)
            setup.check_vocabulary(config, old, self.workdir)
            longer, self.steps_before = config_file.continue_longer(
                config, old, mixture.num_examples, self.workdir
            )
            if longer != config:  # the stages of a run that is trained longer stay where they were
                config, mixture = longer, self._open_mixture(longer)
        self.config, self.mixture = config, mixture
        self.steps = config_file.num_steps(config, mixture.num_examples)
        self.vocabulary = run_vocabulary.load_or_train(
            config, self.workdir, mixture, process_index=jax.process_index()
        )
        self.model = build_model(config, self.mesh, len(self.class_names))
        setup.wait_for_kernels(kernels, self.stop)

    def _open_mixture(self, config: Config) -> Mixture:
        return Mixture(config, self.workdir, jax.process_index(), jax.process_count())

    def open_checkpoints(self) -> None:
        """Opens the checkpoints, and finishes going back to one if the last start was killed in
        it."""
        memory.check(self.config, self.mesh, self.say)
        contents = self._config_contents()
        multihost_checks.on_data(contents, self.workdir, self.mixture.num_examples)
        checkpoint = self.config.checkpoint
        self.best = (
            Best(self.config.checkpoint.best, self.config.eval, self.workdir)
            if checkpoint.best
            else None
        )
        self.checkpoints = manager.Checkpoints(
            self.workdir, keep=checkpoint.keep, best=self.best, run=contents
        )
        self.evaluate = Evaluate(self)
        self.spikes = bad_steps.LossSpikes.of(self)
        if self.spikes.back is not None:
            self._forget_after(self.spikes.back)

    def _config_contents(self) -> dict[str, Any]:
        """The contents of config.json."""
        known = (self.vocabulary, self.class_names, self.mixture.data_digests)
        return config_file.contents(self.config, self.workdir, *known)

    def restore_or_init(self) -> None:
        """Sets the state and its step: the newest checkpoint's, else a fresh one, which starts from
        the weights at config.init_from where one is given."""
        steps = self.checkpoints.steps()
        if steps:
            self.begin(f"restoring step {steps[-1]}")
            target = state_shardings(self.model, self.config, self.mesh)
            found = self.checkpoints.restore_newest(*target)
            if found is not None:
                self.state, self.step, lines = found
                self.recorded = self.checkpoints.quarantine(self.step)
                if lines:
                    line = f"warning: {'; '.join(lines)}"
                    self.say(line)
                    notes.add(line)  # with the result, too
                return
        self.begin("making the model")
        config = self.config
        self.recorded = []
        self.state, self.step = init_state(self.model, config, self.mesh), 0
        if config.init_from:
            if line := warm_start.remark(config):
                self.say(line)
            how = (config.init_positions, config.init_parts, config.model.table_grid)
            self.state = warm_start.apply(self.state, config.init_from, self.class_names, *how)

    def begin_run(self) -> None:
        """Writes config.json, says what is about to run and begins to account for its time."""
        if self.main_process:  # only now: a config that fails must not claim the workdir
            config_file.write(self._config_contents(), self.workdir)
        self._announce()
        # A command's import time counts as part of the run.
        before = age_before(self.buckets) if self.stop.watched else 0.0
        self.goodput = Goodput(
            self.workdir, self.buckets, self.step, before=before, write=self.main_process
        )

    def _announce(self) -> None:
        count = sum(x.size for x in jax.tree.leaves(self.state.params))
        trained = jax.tree.leaves(trainable(self.state.params, self.config))
        moving = sum(x.size for x in trained)
        part = "" if moving == count else f" ({moving / 1e6:.2f}M trained)"
        shape = " x ".join(f"{k} {v}" for k, v in self.mesh.shape.items())
        platform = self.mesh.devices.flat[0].platform
        self.say(
            f"{count / 1e6:.1f}M parameters{part} on {self.mesh.size} {platform} device(s) "
            f"({shape}); batch {batch_schedule.words(self.config)}, "
            f"steps {self.step} to {self.steps}"
        )
        if 0 < self.step < self.steps and self.steps_before not in (0, self.steps):
            optimizer = self.config.optimizer
            old, new = (
                float(learning_rate(optimizer.schedule, make_schedule(optimizer, n), self.step))
                for n in (self.steps_before, self.steps)
            )
            self.say(
                f"training longer: {self.steps} steps, {self.steps_before} before. The learning "
                f"rate follows the schedule of {self.steps} steps: {new:.3g} at step {self.step}, "
                f"where the schedule of {self.steps_before} has {old:.3g}"
            )

    # The steps.

    def train(self) -> None:
        """Takes all steps, going back to an earlier checkpoint when the loss spikes.

        Raises Preempted after a save, Diverged when the run learns nothing, and Corrupted when
        devices differ that must not.
        """
        self.train_step = Programs(
            self.config, self.model, self.mesh, self.steps, self.buckets, self.stop
        )
        while True:
            self.spikes.begin(self.step)
            try:
                return self.run_steps()
            except bad_steps.LossSpike as error:
                spike = error.with_traceback(None)  # whose frames hold arrays
            self.go_back(spike)

    def run_steps(self) -> None:
        """Runs the remaining steps, in the order that the class docstring states.

        Raises LossSpike, and what `train` raises.
        """
        with self.buckets("init"):
            self.open_batches()
        self.callbacks = self.make_callbacks()
        ended: BaseException | None = None
        self.stop.listen()
        try:
            for step in range(self.step + 1, self.steps + 1):
                for callback in self.callbacks:
                    callback.before_step(step)
                batch = next(self.feed)
                self.state, metrics = self.train_step(step, self.state, batch)
                self.step = step
                for callback in self.callbacks:
                    callback.after_step(step, metrics)
        except BaseException as error:
            ended = error
            raise
        finally:
            self.feed.close()
            self.batches.close()
            self.stop.close()
            self._end_callbacks(ended)

    def open_batches(self) -> None:
        """Opens the stream of batches from the state's step on. Where the tokens of a frozen image
        encoder are kept (data.features), they are computed first."""
        remarks = config_file.remarks(self.config, self.mixture.num_examples)
        remarks += [self.mixture.remark_small(), self.mixture.remark_uneven()]
        for remark in filter(None, remarks):
            self.say(remark)  # before hours go into tokens that are kept
        features = feature_extraction.keep(self)
        reader, readers = sharding.readers(self.mesh)
        self.quarantine = Quarantine(self.workdir, self.recorded)
        self.batches = Batches(
            self.spikes.left_out,
            self.step,
            self.config,
            self.vocabulary,
            self.mixture,
            class_names=self.class_names,
            features=features,
            quarantine=self.quarantine,
            process_index=reader,
            process_count=readers,
        )
        self.say(self.mixture.describe())
        self.feed = Feed(self.batches, self.config, self.mesh, self.buckets)

    def shared_quarantine(self) -> list[Row]:
        """The examples that cannot be used, as all processes have found them by now; written to
        the workdir. All processes call it."""
        if jax.process_count() > 1:
            new = json.dumps([dataclasses.astuple(row) for row in self.quarantine.take_new()])
            for entries in multihost.gathered("quarantine", new):
                self.quarantine.merge(Row(*row) for row in json.loads(entries))
        if self.main_process:
            try:
                self.quarantine.write()
            except OSError as error:  # as of a full disk, which the save says too
                self.say(f"warning: the list of damaged examples is not written ({error})")
        return self.quarantine.rows()

    def make_callbacks(self) -> list[Callback]:
        """The callbacks of a run from the state's step on, in the order in which they are called.

        The log comes first, so that the rows of a step are shown before what ends or rewinds the
        run; what inspects a state comes before what saves it, and that before evaluation.
        """
        self.log = Log(self)
        return [
            Profile(self),
            self.log,
            bad_steps.NonFiniteSteps(self),
            self.spikes,
            CompareReplicas(self),
            Save(self),
            self.evaluate,
        ]

    def _end_callbacks(self, ended: BaseException | None) -> None:
        """Calls `at_end` of all callbacks. An error in one does not hide the error that ends the run."""
        for callback in self.callbacks:
            try:
                callback.at_end(ended)
            except Exception as late:
                if ended is None or isinstance(ended, EXPECTED):
                    raise
                self.say(f"warning: {late}")

    def go_back(self, spike: bad_steps.LossSpike) -> None:
        """Restores the newest checkpoint from before a spike, whose batches are then left out."""
        with contextlib.suppress(manager.SaveFailed):
            self.checkpoints.wait()
        step = self.spikes.plan(spike, self.checkpoints.steps())
        first = max(1, spike.step - self.config.faults.spike_batches + 1)
        self.say(
            f"warning: {spike}; going back to step {step} and leaving out the batches of the steps "
            f"{first} to {spike.step}"
        )
        self._forget_after(step)
        self.goodput.go_back(step)
        del self.state  # two would not fit the memory
        with self.buckets("init"):
            self.restore_or_init()

    def _forget_after(self, step: int) -> None:
        """Removes the scores and checkpoints of later steps than `step`, which the run gives up."""
        self.evaluate.forget_after(step)  # before the checkpoints go, at which the processes meet
        self.checkpoints.drop_after(step)
        self.spikes.gone_back()

    # After the last step.

    def finish(self) -> dict[str, Any]:
        """Evaluates the last state and writes the report; returns the summary."""
        skipped = int(self.state.skipped)
        if line := bad_steps.summary(skipped, self.steps):
            self.say(f"warning: {line}")
        self.stop.end("evaluating")
        scores = self.evaluate.evaluate(self.steps)
        if self.best is not None:
            self.say(self.best.line(self.checkpoints.steps(), self.checkpoints.directory))
        self.goodput.note(self.steps, now=True)
        summary = {"workdir": str(self.workdir), "steps": self.steps, "skipped_steps": skipped}
        return summary | self.goodput.summary() | scores | self.report()

    def report(self) -> dict[str, Any]:
        """Writes seconds.json and report.html on process 0; returns what the summary says of it.

        The page is written last, from saved data. If that fails, the error is logged and the run
        still counts as finished.
        """
        if not self.main_process:
            return {}
        from coca_jax.evaluation import report as reports

        seconds = {k: round(v, 1) for k, v in self.buckets.total().items()}
        storage.write_text(storage.place(self.workdir) / "seconds.json", json.dumps(seconds))
        try:
            return {"report": str(reports.write_report(self.workdir))}
        except Exception as error:
            self.say(
                f"report.html was not written ({type(error).__name__}: {error}); all else of the "
                f"run is saved, and `coca-jax report {self.workdir}` writes it again"
            )
            return {}
