"""A loss spike sends the run back to before it, without its batches, the same after every kill."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from conftest import scenes_words
from data_cases import data_config, write_folder
from one_device import train_alone
from quick_start import drawn_by_numpy  # noqa: F401
from test_train import tiny_run

from coca_jax.checkpoints import config_file, manager
from coca_jax.cli import prepare
from coca_jax.config import typed
from coca_jax.data.mixture import Mixture
from coca_jax.runtime import json_files, signals
from coca_jax.runtime.metric_log import read_metrics
from coca_jax.training import bad_steps, skipped_batches, train_step
from coca_jax.training.bad_steps import Detector, Diverged, LossSpikes
from coca_jax.training.callbacks import LossSpike

pytestmark = pytest.mark.usefixtures("compile_once")


def test_numbers_of_batches_skip_those_that_are_left_out():
    ranges = skipped_batches.leave_out(4, 6, ())  # the steps 5 to 7, counted from 1
    assert ranges == ((4, 6),)
    assert [skipped_batches.number_of(n, ranges) for n in range(7)] == [0, 1, 2, 3, 7, 8, 9]
    ranges = skipped_batches.leave_out(5, 6, ranges)  # which train on the batches 8 and 9
    assert ranges == ((4, 6), (8, 9))
    assert [skipped_batches.number_of(n, ranges) for n in range(8)] == [0, 1, 2, 3, 7, 10, 11, 12]
    assert skipped_batches.leave_out(2, 4, ranges) == ((2, 9),)  # what lies between them goes too


def test_two_thousand_random_ranges_leave_each_other_batch_once():
    rng = np.random.default_rng(0)
    for _ in range(200):
        ranges, gone = (), set()
        for _ in range(10):
            first = int(rng.integers(0, 50))
            last = first + int(rng.integers(0, 5))
            numbers = [skipped_batches.number_of(n, ranges) for n in range(first, last + 1)]
            ranges = skipped_batches.leave_out(first, last, ranges)
            gone |= set(range(numbers[0], numbers[-1] + 1))
        assert {n for a, b in ranges for n in range(a, b + 1)} == gone
        shown = [skipped_batches.number_of(n, ranges) for n in range(100)]
        assert shown == [n for n in range(500) if n not in gone][:100]


def test_inspect_shows_what_a_step_of_a_run_trained_on(tmp_path, capsys):
    """Counted as logs do, without the batches left out, from wherever the run lies now."""
    workdir = tmp_path / "before"
    prepare.prepare(
        "imagefolder",
        str(write_folder(tmp_path / "raw", 9)),
        str(workdir / "data/nine"),
        progress=False,
    )
    config = data_config(dict(path=f"{workdir}/data/nine", kind="caption"), batch=4)
    config.steps, config.optimizer.warmup_steps = 6, 0
    config, words = typed(config), types.SimpleNamespace(checksum="")
    mixture = Mixture(config)
    told = (str(workdir), words, (), mixture.data_digests)
    config_file.write(config_file.contents(config, *told), str(workdir))
    batches = [[row["index"] for row in mixture.step_examples(n)] for n in range(8)]
    now = str(workdir.rename(tmp_path / "now"))

    def shown(step):
        return [row["index"] for row in prepare.inspect_run(now, step)["examples"]]

    assert [shown(step) for step in range(1, 7)] == batches[:6]
    json_files.write_sealed(tmp_path / "now/spikes.json", {"left_out": [(2, 3)]})
    assert [shown(step) for step in range(1, 7)] == [*batches[:2], *batches[4:]]
    for number, says in ((0, "steps count from 1"), (7, "--step=7: the run has 6 steps")):
        with pytest.raises(ValueError, match=says):
            shown(number)


def detect(losses, deviations=6.0):
    found = Detector()
    return [n for n, loss in enumerate(losses) if found.add(float(loss), deviations)]


def test_noise_drift_and_one_hard_batch_are_no_spike_and_a_spike_is():
    rng = np.random.default_rng(0)
    losses = 5 * np.exp(-np.arange(2000) / 500) + 0.1 * rng.normal(size=2000)
    assert detect(losses) == []
    losses[700] += 5
    losses[900:902] += 5
    losses[1000] = np.nan
    assert detect(losses) == []
    losses[1200:1210] += 2
    assert detect(losses)[0] == 1202
    losses[:50] += 100  # the first steps say nothing
    assert detect(losses)[0] == 1202


def watch(found, losses, start=0, stop=None):
    """The step at which `found` sees a spike in the losses of the steps from start + 1 on, or None;
    settled at stop."""
    found.begin(start)
    try:
        for step in range(start + 1, (stop or len(losses)) + 1):
            found.after_step(step, dict(loss=np.float32(losses[step - 1])))
        found.before_save(stop or len(losses))
    except LossSpike as error:
        return error.step
    return None


def test_a_larger_batch_is_no_spike_and_a_spike_after_it_is(tmp_path, config):
    config.faults.spike_deviations = 6.0
    config.steps, config.batch_sizes, config.image_sizes = 2000, ((0.5, 8),), ((0.25, 16),)
    config.data.sources = (dict(builtin="scenes"),)
    config, rng = typed(config), np.random.default_rng(0)
    losses = 4 + 0.1 * rng.normal(size=2000)
    losses[500:] += 2  # larger images
    losses[1000:] += 2  # larger batches, of which more are as unlike
    faults = config.faults
    assert watch(LossSpikes(str(tmp_path / "none"), faults), losses) == 503

    def run_in(workdir):
        run = types.SimpleNamespace(config=config, mixture=Mixture(config), steps=2000)
        run.workdir, run.main_process = str(tmp_path / workdir), True
        return LossSpikes.of(run)

    assert watch(run_in("whole"), losses) is None
    # The same, stopped where a stage ends, and after it before it was watched for long.
    for start, stop in ((0, 500), (500, 1000), (1000, 1050), (1050, 2000)):
        assert watch(run_in("stopped"), losses, start, stop) is None
    kept = [
        json_files.read_sealed(tmp_path / name / bad_steps.FILE) for name in ("whole", "stopped")
    ]
    assert kept[0]["detector"]["2000"] == kept[1]["detector"]["2000"]
    assert kept[1]["detector"]["500"][2] == 500 and kept[1]["detector"]["1050"][2] == 50
    losses[1200:1210] += 2
    assert watch(run_in("high"), losses) == 1203


def test_batches_that_are_left_out_bring_the_next_stage_nearer(tmp_path, config):
    """With 10 of them step 191, the first to see a loss of 9, has batch 200."""
    config.faults.spike_deviations, config.faults.spike_batches = 6.0, 10
    losses = np.where(np.arange(400) < 190, 4.0, 9.0) + 0.1 * np.sin(np.arange(400))
    found = LossSpikes(str(tmp_path), typed(config).faults, batches_grow=[0, 200])
    found.plan(LossSpike(150, 9.0, 1.0), [])
    found.gone_back()
    assert found.left_out == ((140, 149),)
    assert watch(found, losses) is None
    assert (
        watch(LossSpikes(str(tmp_path), typed(config).faults, batches_grow=[0, 210]), losses) == 193
    )


def test_too_many_spikes_end_the_run(tmp_path, config):
    config.faults.spike_deviations, config.faults.spike_batches = 6.0, 5
    found = LossSpikes(str(tmp_path), typed(config).faults)
    for n in range(bad_steps.MOST):
        assert (
            found.plan(LossSpike(100 + 10 * n, 9.0, 1.0), [60 + 10 * n, 80 + 10 * n]) == 80 + 10 * n
        )
        found.gone_back()
    with pytest.raises(ValueError, match="spike 11; lower optimizer.learning_rate"):
        found.plan(LossSpike(300, 9.0, 1.0), [280])


def test_no_checkpoint_is_given_up_where_an_earlier_one_was_rotated_away(tmp_path, config):
    """120 saves, of which the detector is kept at 50; and steps that were not watched."""
    faults = typed(config).faults
    faults = dataclasses.replace(faults, spike_deviations=6.0, spike_batches=70)
    found = LossSpikes(str(tmp_path), faults)
    found.begin(0)
    assert LossSpikes(str(tmp_path / "new"), faults).plan(LossSpike(120, 9.0, 1.0), []) == 0
    for number in range(1, 120):
        found.before_save(number)
    with pytest.raises(Diverged, match="no checkpoint from before step 51 is left; raise check"):
        found.plan(LossSpike(120, 9.0, 1.0), [117, 118, 119])
    again = LossSpikes(str(tmp_path), faults)
    again.begin(119)
    with pytest.raises(Diverged, match="no checkpoint from before step 60"):
        again.plan(LossSpike(129, 9.0, 1.0), [119])
    unwatched = LossSpikes(str(tmp_path / "other"), faults)
    unwatched.begin(10_000)
    with pytest.raises(Diverged, match="no checkpoint from before"):
        unwatched.plan(LossSpike(10_060, 9.0, 1.0), [10_050])
    late = LossSpikes(str(tmp_path / "late"), faults)
    late.begin(0)
    late.before_save(60)
    assert late.plan(LossSpike(100, 9.0, 1.0), [60]) == 0  # nothing was saved before step 31


def test_a_run_that_was_killed_while_it_went_back_knows(tmp_path, config):
    config.faults.spike_batches = 10
    faults = typed(config).faults
    LossSpikes(str(tmp_path), faults).plan(LossSpike(50, 9.0, 1.0), [20, 40, 45])
    again = LossSpikes(str(tmp_path), faults)
    assert again.back == 40 and again.left_out == ((40, 49),)
    again.gone_back()
    assert LossSpikes(str(tmp_path), faults).back is None


@pytest.fixture
def spiking(monkeypatch):
    """A run of 24 steps whose batches 13 to 16 (from 1) have a loss of 1000 as far as it sees."""
    monkeypatch.setattr(bad_steps, "WARM", 6)
    monkeypatch.setattr(bad_steps, "DECAY", 0.8)
    shown = []
    look = LossSpikes._look

    def see(self, found):
        if found is not None:
            number = skipped_batches.number_of(found[0] - 1, self.left_out)
            shown.append((found[0], number))
            if 12 <= number <= 15:
                found = (found[0], dict(found[1], loss=np.float32(1000)))
        look(self, found)

    monkeypatch.setattr(LossSpikes, "_look", see)
    config = tiny_run(steps=24)
    config.data.vocabulary = scenes_words()
    config.loss.captioning_weight = 0.0  # half as much to compile
    config.optimizer.ema = 0.0  # and less to save, thirteen times
    config.batch_size = 4
    config.faults.spike_deviations, config.faults.spike_batches = 20.0, 4
    config.checkpoint.every_steps = 5
    return config, shown


@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.long
def test_a_spike_is_left_out_and_a_kill_changes_nothing(spiking, tmp_path, monkeypatch, capfd):
    """Seen at step 15, the third of the spike: back to 10, without the batches 12 to 15. The step
    is traced once, by all runs together."""
    config, shown = spiking
    plain, traced = train_step.value_and_gradients, []
    monkeypatch.setattr(
        train_step, "value_and_gradients", lambda *of: traced.append(1) or plain(*of)
    )
    train_alone(config, tmp_path / "calm")
    told = capfd.readouterr().err
    assert "going back to step 10 and leaving out the batches of the steps 12 to 15" in told
    rows = read_metrics(tmp_path / "calm")
    assert [row["step"] for row in rows] == list(range(1, 25))
    last = {step: number for step, number in shown}  # as trained in the end
    assert [last[n] for n in (10, 11, 12, 13, 24)] == [9, 10, 15, 16, 27]
    assert rows[-1]["time/lost"] > 0
    # The same, stopped before the spike, in it, and after it.
    reached, stops = signals.Stop.reached, [7, 14, 13, 20]
    monkeypatch.setattr(
        signals.Stop, "reached", lambda self, step: step in stops and not stops.remove(step)
    )
    for _ in range(9):
        try:
            train_alone(config, tmp_path / "stopped")
            break
        except signals.Preempted:
            continue
    monkeypatch.setattr(signals.Stop, "reached", reached)
    again = read_metrics(tmp_path / "stopped")
    assert [row["loss"] for row in again] == [row["loss"] for row in rows]
    params = [manager.load_params(str(tmp_path / n))[0] for n in ("calm", "stopped")]
    jax.tree.map(np.testing.assert_array_equal, *params)
    assert len(traced) == 1
