"""checkpoint.best: the step that scored best stays, however many steps later ones there are."""

import os
import time

import pytest
from conftest import scenes_words, tiny_config
from one_device import smallest_run, train_alone
from quick_start import drawn_by_numpy  # noqa: F401

from coca_jax.checkpoints import manager
from coca_jax.config import typed
from coca_jax.evaluation import history, runner
from coca_jax.training import bad_steps, best_checkpoint, callbacks

NAME = "retrieval/s/mean_recall"
TASK = dict(kind="retrieval", name="s", data=dict(builtin="scenes", split="test", kind="caption"))
CAPTIONING = TASK | {"kind": "captioning"}


def run_of(name=NAME, every=1, given=(TASK, CAPTIONING)):
    config = smallest_run()
    config.optimizer.ema = 0.0  # fewer arrays to save
    config.eval.tasks, config.eval.every_steps = given, every
    config.checkpoint.update(best=name, keep=1)
    return config


def settled(folder):
    """What is in a folder of checkpoints once it stays so: what writes and deletes there does not
    end with a run that is killed in this process, as it would with its own."""
    seen, deadline = None, time.monotonic() + 60
    while seen != (now := sorted(os.listdir(folder))) or any("tmp" in name for name in now):
        assert time.monotonic() < deadline, now
        seen = now
        time.sleep(0.5)
    return seen


def test_scores_behind_a_spike_go_with_the_steps(tmp_path, monkeypatch):
    """Seen at step 5: back to step 2, past the scores of 3 and 4. Killed in the evaluation of the
    new step 3, the next start does that."""
    config = run_of(given=(TASK,))
    config.steps, config.data.vocabulary, config.checkpoint.keep = 6, scenes_words(), 3
    config.loss.captioning_weight = 0.0
    config.faults.update(spike_deviations=20.0, spike_batches=3)
    spike, scores = [5], iter([0.2, 0.5, 0.9, 0.1, None, 0.3, 0.1, 0.1, 0.1])

    def looked(self, found):
        if found and found[0] in spike:
            raise callbacks.LossSpike(spike.pop(), 9.0, 1.0)

    def scored(*_):
        value = next(scores)
        if value is None:
            raise KeyboardInterrupt
        return {NAME: value}

    monkeypatch.setattr(bad_steps.LossSpikes, "_look", looked)
    monkeypatch.setattr(runner, "run_task", scored)
    with pytest.raises(KeyboardInterrupt):
        train_alone(config, tmp_path)
    assert [row["step"] for row in history.read(tmp_path)] == [1, 2]
    settled(tmp_path / "checkpoints")
    train_alone(config, tmp_path)
    found = {row["step"]: row["scores"][NAME] for row in history.read(tmp_path)}
    assert found == {1: 0.2, 2: 0.5, 3: 0.3, 4: 0.1, 5: 0.1, 6: 0.1}
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["2", "4", "5", "6"]


def test_the_best_step_stays_when_the_run_is_killed_and_goes_on(tmp_path, monkeypatch, capfd):
    config = run_of(given=(TASK,))
    config.steps, config.data.vocabulary = 6, scenes_words()
    config.loss.captioning_weight = 0.0  # half as much to compile
    scores = iter([0.2, 0.5, 0.3, 0.1, None, 0.4, 0.4])

    def scored(*_):
        value = next(scores)
        if value is None:
            raise KeyboardInterrupt
        return {NAME: value}

    monkeypatch.setattr(runner, "run_task", scored)
    with pytest.raises(KeyboardInterrupt):
        train_alone(config, tmp_path)
    assert "2" in settled(tmp_path / "checkpoints")
    train_alone(config, tmp_path)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["2", "6"]
    told = f"best {NAME}: 0.5 after step 2, {tmp_path}/checkpoints/2"
    assert told in capfd.readouterr().err
    params, _ = manager.load_params(f"{tmp_path}/checkpoints/2")
    assert params and history.read(tmp_path)[-1]["scores"] == {NAME: 0.4}


def best(config, workdir):
    run = typed(config)
    return best_checkpoint.Best(run.checkpoint.best, run.eval, workdir)


def check(config):
    run = typed(config)
    best_checkpoint.check(run.checkpoint.best, run.eval)


def test_lower_is_better_where_the_metric_says_so_and_equals_are_the_later(tmp_path):
    history.add(tmp_path, 1, {NAME: 0.5, "captioning/s/perplexity": 9.0})
    history.add(tmp_path, 2, {NAME: 0.5, "captioning/s/perplexity": 7.0})
    history.add(tmp_path, 3, {NAME: float("nan"), "captioning/s/perplexity": 8.0})
    recall = best(run_of(), tmp_path)
    perplexity = best(run_of("captioning/s/perplexity"), tmp_path)
    assert recall.among([1, 2, 3]) == 2 and recall.among([1, 3]) == 1
    assert perplexity.among([1, 2, 3]) == 2 and perplexity.among([1, 3]) == 3
    assert recall.among([3, 4]) is None
    assert recall.line([3], "x") == f"best {NAME}: no checkpoint in x has a score"
    recall.note(4, {NAME: 0.6})
    assert recall.among([2, 4]) == 4


@pytest.mark.parametrize(
    "config, line",
    [
        (run_of("retrieval/s/mean_recal"), f"no score of eval.tasks; the nearest is '{NAME}'"),
        (run_of("retrieval/t/mean_recall"), f"no score of eval.tasks; the nearest is '{NAME}'"),
        (run_of(every=0), "compares evaluations inside the run: give --config.eval.every_steps"),
        (run_of(given=()), "compares evaluations inside the run"),
    ],
)
def test_a_score_that_the_run_does_not_give_is_refused(config, line):
    with pytest.raises(ValueError, match=line):
        check(config)
    check(tiny_config())  # without one
