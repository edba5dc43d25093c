"""What a run does when its disk is full: goes on, tries again, and says so where it cannot end."""

import contextlib
import resource
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import flags_of, tiny
from test_checkpointing import assert_equal, restore, state_of

from coca_jax.apps import fit as fitting
from coca_jax.checkpoints import manager
from coca_jax.cli import fit
from coca_jax.data.mixture import Mixture
from coca_jax.runtime import json_files, signals
from coca_jax.runtime.metric_log import TimeBuckets
from coca_jax.training import bad_steps, callbacks, recipes, replicas


@contextlib.contextmanager
def full_disk():
    """No file can be longer than 100 bytes. Gives what makes room again."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def free():
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        yield free
    finally:
        free()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of 100 steps that saves every 10, alone, and tries again at once."""
    monkeypatch.setattr(callbacks, "RETRY", (0.0,))
    monkeypatch.setattr(callbacks, "LAST_RETRY", (0.0, 0.0))
    said: list[str] = []
    config = tiny(**{"checkpoint.every_steps": 10, "steps": 100})
    return types.SimpleNamespace(
        config=config,
        step=0,
        steps=100,
        state=state_of(0),
        buckets=TimeBuckets(),
        stop=types.SimpleNamespace(alone=True),
        said=said,
        say=said.append,
        checkpoints=manager.Checkpoints(str(tmp_path)),
        workdir=tmp_path,
        shared_quarantine=list,
    )


def saved(run, save, step, state, **how):
    """`save.save` of a state, which the run then has."""
    run.state = state
    return save.save(step, **how)


def settle(run):
    """Waits as long as steps would that come behind a save."""
    while run.checkpoints.busy():
        time.sleep(0.01)


def test_a_full_disk_costs_no_step_and_the_next_one_is_saved_when_there_is_room(run):
    save = callbacks.Save(run)
    assert [step for step in range(1, 101) if save.due(step)] == [*range(10, 101, 10)]
    assert saved(run, save, 10, state_of(10)) == 10
    settle(run)
    with full_disk():
        saved(run, save, 20, state_of(20))
        settle(run)
        assert save.due(21)  # at once, by RETRY above, and not ten steps later
    (line,) = run.said
    assert line.startswith("warning: could not ") and "step 10 stays the newest" in line
    assert saved(run, save, 21, state_of(21)) == 21
    settle(run)
    assert not save.due(22) and save.due(30)
    save.at_end(None)
    state, step, _ = restore(run.workdir)
    assert step == 21 and run.checkpoints.steps() == [10, 21]
    assert_equal(state, state_of(21))


def test_the_last_save_is_tried_several_times(run):
    save = callbacks.Save(run)
    saved(run, save, 10, state_of(10), last=True)
    with full_disk() as free:
        with pytest.raises(manager.SaveFailed) as error:
            saved(run, save, 99, state_of(99), last=True)
        assert len(run.said) == 3  # at first, and after each pause of LAST_RETRY
        begin = (
            f"step 99 could not be saved in {run.workdir} (the disk is full); step 10 is the newest"
        )
        assert str(error.value).startswith(begin)
        run.say = lambda line: (run.said.append(line), free())  # somebody deletes something
        assert saved(run, save, 100, state_of(100), last=True) == 100
    assert len(run.said) == 4 and run.checkpoints.steps() == [10, 100]
    save.at_end(None)


def test_a_run_without_a_save_is_not_told_of_step_0(run):
    save = callbacks.Save(run)
    with full_disk(), pytest.raises(manager.SaveFailed, match="; no step is kept; once"):
        saved(run, save, 9, state_of(9), last=True)
    assert all("; no step is kept yet; it is tried again" in line for line in run.said)
    save.at_end(None)


def test_a_step_that_is_not_saved_begins_an_interval_that_is_measured_too(run):
    run.config = run.config.change({"checkpoint.every": "auto"})
    skipping_all = [types.SimpleNamespace(skipped=step) for step in range(60)]
    run.state = skipping_all[0]
    save, asked = callbacks.Save(run), []
    for step in range(1, 60):
        if save.due(step):
            asked.append(step)
            assert saved(run, save, step, skipping_all[step]) == 0
    assert asked == [callbacks.FIRST, 2 * callbacks.FIRST] and len(run.said) == 2


def test_a_state_that_learned_nothing_takes_no_checkpoint_s_place(run):
    save = callbacks.Save(run)
    saved(run, save, 10, state_of(10), last=True)
    skipped = state_of(20).replace(skipped=state_of(10).skipped + 10)
    assert saved(run, save, 20, skipped) == 10
    assert run.said == ["step 20 is not saved: every step since 10 was skipped"]
    one = skipped.replace(skipped=jnp.int32(skipped.skipped - 1))
    assert saved(run, save, 20, one, last=True) == 20 and run.checkpoints.steps() == [10, 20]
    assert int(np.asarray(restore(run.workdir, state_of(0))[0].skipped)) == int(one.skipped)
    save.at_end(None)


def test_what_spikes_are_seen_by_is_written_when_there_is_room_again(run, caplog):
    faults = run.config.change({"faults.spike_deviations": 6.0}).faults
    found, file = bad_steps.LossSpikes(str(run.workdir), faults), run.workdir / bad_steps.FILE
    with full_disk():
        for step in (10, 20):
            found.after_step(step, {"loss": np.float32(2.0)})
            found.before_save(step)
        assert not file.exists() and caplog.text.count("spikes.json is not written") == 1
        with pytest.raises(OSError):  # a run that goes back must be able to after a kill too
            found.plan(callbacks.LossSpike(999, 9.0, 2.0), [10])
    found.before_save(30)
    assert {"10", "30"} <= json_files.read_sealed(file)["detector"].keys()
    with full_disk():
        found.before_save(40)
    assert caplog.text.count("spikes.json is not written") == 2


def test_a_run_that_diverges_on_a_full_disk_still_says_so(run):
    scenes = dict(builtin="scenes", kind="caption", limit=40)
    config = run.config.change({"data.sources": (scenes,)})
    run.main_process, run.mixture = True, Mixture(config, str(run.workdir))
    limit = run.config.checkpoint.max_skipped
    run.spikes = types.SimpleNamespace(left_out=())
    check = bad_steps.NonFiniteSteps(run)
    with full_disk(), pytest.raises(bad_steps.Diverged) as error:
        for step in range(1, limit + 2):
            check.after_step(
                step, dict(skipped_steps=run.state.skipped + step, loss=np.float32("nan"))
            )
    told = str(error.value)
    assert f"of {limit} steps in a row (1 to {limit}) are not finite; step 1 was made of" in told
    assert "skipped_step_1.json with all of them is not written: [Errno 27]" in told
    assert "lower optimizer.learning_rate" in told and "\n" not in told


BREAKS = """
from coca_jax.training import bad_steps, recipes

def breaks(self, step, metrics):
    if step == 3:
        raise ValueError("a shard is damaged")

bad_steps.NonFiniteSteps.after_step = breaks

def get_config():
    config = recipes.load("tiny")
    config.checkpoint.every_steps = 2
    config.model.text.mlp_dim = 65536  # whose save takes a while
    return config
"""


@pytest.mark.long
def test_a_save_under_way_is_finished_before_an_error_ends_the_run(commands, tmp_path):
    """With the process it would be lost: "its last checkpoint stays" is said of it."""
    (tmp_path / "breaks.py").write_text(BREAKS)
    done = commands.run(["train", "--config=breaks.py", f"--workdir={tmp_path}"], tmp_path)
    assert done.returncode == 2 and "error: a shard is damaged" in done.stderr
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["2"]
    manager.load_params(str(tmp_path))


@pytest.mark.parametrize(
    "error", [manager.SaveFailed("step 9 could not be saved"), replicas.Corrupted("after 8")]
)
def test_fit_ends_with_a_line_as_train_does(error, tmp_path, monkeypatch):
    for function in ("define_overrides", "changes"):  # which read the command line of the tests
        monkeypatch.setattr(recipes, function, lambda *_: {})
    flags_of("fit", monkeypatch)

    def fail(*_, **__):
        raise error

    def leave(line, status):
        raise SystemExit(f"{status} {line}")

    monkeypatch.setattr(fitting, "fit", fail)
    monkeypatch.setattr(signals, "leave", leave)
    fit.flags.FLAGS(["fit", f"--workdir={tmp_path}/out"])
    with pytest.raises(SystemExit, match=f"1 error: {error}"):
        fit.main(["fit", str(tmp_path)])
