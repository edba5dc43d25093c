"""Evaluations inside a run: compiled once, each kept once, whatever stops the run."""

import json
import re
import shutil
import types

import jax
import pytest
from conftest import scenes_words
from one_device import smallest_run, train_alone
from quick_start import drawn_by_numpy  # noqa: F401
from test_train import tiny_run

import coca_jax
from coca_jax.checkpoints import manager
from coca_jax.cli import report
from coca_jax.config import typed
from coca_jax.evaluation import history, runner
from coca_jax.evaluation.evaluators import results
from coca_jax.runtime import signals
from coca_jax.runtime.metric_log import TimeBuckets
from coca_jax.training import callbacks


def scored_run(captioning=True):
    config = tiny_run(4)
    config.data.vocabulary = scenes_words()
    label = dict(builtin="scenes", split="heldout", kind="label")
    captions = dict(builtin="scenes", split="test", kind="caption", objects=(1,))
    config.eval.tasks = (
        dict(kind="zero_shot", name="s", data=label, limit=20),
        dict(kind="retrieval", name="s", data=captions, limit=20),
    )
    if captioning:
        how = dict(max_new_tokens=4)
        config.eval.tasks += (
            dict(kind="captioning", name="s", data=captions, limit=6, decode=how),
        )
    config.eval.every_steps = 2
    return config


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run with evaluations after steps 2 and 4, and the programs compiled in each of them."""
    workdir, compiled, inside = str(tmp_path_factory.mktemp("whole")), [], []

    def listen(event, duration, **_):
        if inside and event.endswith("backend_compile_duration"):
            compiled[-1] += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    plain = runner.run_tasks

    def counted(*args, **how):
        compiled.append(0)
        inside.append(True)
        try:
            return plain(*args, **how)
        finally:
            inside.pop()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "run_tasks", counted)
        summary = train_alone(scored_run(), workdir)
    return workdir, summary, compiled


@pytest.mark.long
def test_only_the_first_evaluation_compiles(whole):
    _, _, compiled = whole
    assert compiled[0] > 3 and compiled[1:] == [0]


@pytest.mark.long
def test_every_evaluation_is_kept_and_eval_json_is_the_last(whole):
    workdir, summary, _ = whole
    rows = history.read(workdir)
    assert [row["step"] for row in rows] == [2, 4]
    last = json.loads((results.storage.place(workdir) / "eval.json").read_text())
    assert rows[-1]["scores"] | {"step": 4.0} == last
    assert all(summary[name] == value for name, value in last.items())
    assert len({row["scores"]["captioning/s/perplexity"] for row in rows}) == 2  # it learns


@pytest.mark.long
def test_scores_of_an_earlier_step_say_so_in_the_report(whole, tmp_path):
    """As of `evaluate` while the run went on."""
    workdir, _, _ = whole
    out = results.storage.place(shutil.copytree(workdir, tmp_path / "run"))
    steps = json.loads((out / results.STEPS).read_text())
    assert steps == {"zero_shot/s": 4, "retrieval/s": 4, "captioning/s": 4}
    assert "after step" not in report.write_report(out).read_text()
    model = coca_jax.load(out / "checkpoints/2")
    assert (model.step, coca_jax.load(out).step) == (2, 4)
    label = dict(builtin="scenes", split="test", kind="label")
    task = dict(kind="zero_shot", name="early", data=label, limit=4)
    found = runner.run_tasks(model, [task], str(out), of_step=model.step)
    assert json.loads((out / results.STEPS).read_text()) == steps | {"zero_shot/early": 2}
    assert report.write_report(out).read_text().count("after step 2") == 1
    assert json.loads((out / "eval.json").read_text()).items() >= found.items()
    shutil.rmtree(out / "checkpoints/4/ema/d")
    assert coca_jax.load(out).step == 2  # whose weights are read, as those of 4 are damaged


@pytest.mark.slow  # six runs of a minute each
@pytest.mark.parametrize("kill", ["before the first task", "between tasks", "before the history"])
def test_an_evaluation_that_was_left_is_done_when_the_run_goes_on(whole, tmp_path, kill):
    """Step 2 is saved, its evaluation is not done: the next start does it before step 3."""

    class Killed(Exception):
        pass

    def dies(*args, **how):
        raise Killed

    place, number = {
        "before the first task": ((callbacks.Evaluate, "_load_model"), 1),
        "between tasks": ((runner, "run_task"), 2),
        "before the history": ((history, "add"), 1),
    }[kill]
    plain, calls = getattr(*place), []

    def counted(*args, **how):
        calls.append(args)
        return (dies if len(calls) == number else plain)(*args, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(*place, counted)
        with pytest.raises(Killed):
            train_alone(scored_run(captioning=False), tmp_path)
    assert history.read(tmp_path) == []
    train_alone(scored_run(captioning=False), tmp_path)
    found, undisturbed = history.read(tmp_path), history.read(whole[0])
    assert [row["step"] for row in found] == [row["step"] for row in undisturbed]
    for row, want in zip(found, undisturbed):  # of the same tasks
        assert row["scores"] and row["scores"].items() <= want["scores"].items()


@pytest.mark.parametrize(("step", "told"), [(0, "no step is lost"), (2, "could not save step 2")])
def test_a_stop_in_an_evaluation_says_what_is_lost(tmp_path, monkeypatch, step, told):
    """Before the first step, where eval.guard scores too, nothing is."""
    stop, left = signals.Stop(), []
    monkeypatch.setattr(signals, "leave", lambda *line: left.append(line))
    monkeypatch.setattr(
        callbacks.Evaluate,
        "_load_model",
        lambda *of: types.SimpleNamespace(set_params=lambda params: None),
    )
    monkeypatch.setattr(runner, "run_tasks", lambda *of, **how: stop._leave("stopped") or {})
    config = typed(scored_run(captioning=False))
    run = types.SimpleNamespace(
        config=config,
        workdir=str(tmp_path),
        steps=4,
        stop=stop,
        say=lambda line: None,
        buckets=TimeBuckets(),
        best=None,
        checkpoints=manager.Checkpoints(str(tmp_path)),
    )
    callbacks.Evaluate(run).evaluate(step)
    run.checkpoints.close()
    line = f"stopped while evaluating: {told}; {signals.AGAIN}"
    assert left == [(line, signals.EXIT_AGAIN)]


def test_a_step_occurs_once_and_damage_is_left_out(tmp_path):
    for step in (10, 20, 30):
        history.add(tmp_path, step, {"a/b/c": step / 100, "a/b/nan": float("nan")})
    assert history.read(tmp_path)[0] == dict(step=10, scores={"a/b/c": 0.1, "a/b/nan": None})
    history.add(tmp_path, 20, {"a/b/c": 0.5})  # back to 10, and on from there
    assert [(row["step"], row["scores"]["a/b/c"]) for row in history.read(tmp_path)] == [
        (10, 0.1),
        (20, 0.5),
    ]
    file = tmp_path / history.FILE
    file.write_text(file.read_text().replace("0.5", "0.9") + '{"step": 30')
    assert [row["step"] for row in history.read(tmp_path)] == [10]
    assert history.has(tmp_path, 10) and not history.has(tmp_path, 20)
    data = file.read_bytes()
    file.write_bytes(data[:-3] + bytes([data[-3] ^ 0x80]) + data[-2:])  # a bit, as disks lose them
    history.add(tmp_path, 40, {"a/b/c": 0.25})
    assert [row["step"] for row in history.read(tmp_path)] == [10, 40]


def test_a_report_that_cannot_be_written_costs_the_run_nothing_else(tmp_path, capsys):
    """The run is done and says why; without what was in the way the same command writes it."""
    config, workdir = smallest_run(), tmp_path / "run"
    config.optimizer.ema = 0.0  # fewer arrays to save
    config.loss.captioning_weight = 0.0  # half as much to compile
    config.data.vocabulary = scenes_words()
    (workdir / "report.html").mkdir(parents=True)
    summary = train_alone(config, workdir)
    assert summary["steps"] == 4 and "report" not in summary
    said = capsys.readouterr().err
    assert re.search(r"report\.html was not written \(IsADirectoryError: .*\); all else of", said)
    assert f"`coca-jax report {workdir}` writes it again" in said
    assert {"seconds.json", "goodput.json"} <= {path.name for path in workdir.iterdir()}
    (workdir / "report.html").rmdir()
    assert train_alone(config, workdir)["report"] == str(workdir / "report.html")
