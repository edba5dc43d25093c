"""metrics.jsonl across resumes, the TensorBoard file, time buckets, the progress line."""

import io
import json
import time
import types

import numpy as np
import pytest
from conftest import tiny_config

from coca_jax.config import typed
from coca_jax.runtime import metric_log
from coca_jax.training import callbacks


def test_lines_are_json_objects_and_resume_drops_later_steps(tmp_path):
    writer = metric_log.MetricWriter(tmp_path)
    for step in (10, 20, 30):
        writer.write(step, {"loss": step / 10})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')  # killed while writing
    writer = metric_log.MetricWriter(tmp_path, start_step=20)
    writer.write(30, {"loss": 7.5})
    writer.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [
        {"step": 10, "loss": 1.0},
        {"step": 20, "loss": 2.0},
        {"step": 30, "loss": 7.5},
    ]
    assert metric_log.read_metrics(tmp_path) == rows
    metric_log.MetricWriter(tmp_path, start_step=0).close()
    assert metric_log.read_metrics(tmp_path) == []


def test_non_finite_values_become_null(tmp_path):
    writer = metric_log.MetricWriter(tmp_path / "new")
    writer.write(1, {"loss": float("nan"), "gradient_norm": float("inf"), "skipped": 1})
    writer.close()
    text = (tmp_path / "new" / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        **{"step": 1, "loss": None, "gradient_norm": None, "skipped": 1.0}
    }


def test_buckets_exclude_each_other_and_are_taken_once(monkeypatch):
    now = [100.0]
    clock = types.SimpleNamespace(perf_counter=lambda: now[0], process_time=lambda: 0.0)
    monkeypatch.setattr(metric_log, "time", clock)
    buckets = metric_log.TimeBuckets()
    with buckets("step"):
        now[0] += 2.0
        with buckets("data_wait"):
            now[0] += 5.0
        now[0] += 1.0
    now[0] += 64.0  # in none
    taken = buckets.take()
    assert set(taken) == {f"{name}_seconds" for name in metric_log.BUCKETS}
    assert taken["data_wait_seconds"] == 5.0 and taken["step_seconds"] == 3.0
    assert sum(taken.values()) == 8.0
    assert sum(buckets.take().values()) == 0
    assert buckets.total()["data_wait_seconds"] == pytest.approx(taken["data_wait_seconds"])
    with pytest.raises(ValueError, match="time bucket is 'saving'; use one of init"):
        with buckets("saving"):
            pass


def test_a_row_that_follows_at_once_has_no_rate_of_its_own(monkeypatch):
    """Before a save two rows come together: the first with the time of the second's step."""
    clock = iter((0.0, 2.0, 4.0, 4.0001, 14.0, 18.0))
    monkeypatch.setattr(metric_log.time, "perf_counter", lambda: next(clock))
    file = io.StringIO()
    progress = metric_log.Progress(100, pairs=lambda step: 8 * step, file=file)
    assert progress.update(1, {}, 0.0) == progress.update(2, {}, 0.0) == 4
    assert progress.update(3, {}, 1.0, at_once=True) == pytest.approx(4)
    assert "waiting for data 50%" in file.getvalue()
    assert progress.update(4, {}, 0.0) == pytest.approx(8 / 9.9999)
    assert progress.update(6, {}, 0.0, at_once=True) == pytest.approx(16 / 19.9998)


def test_time_that_trains_nothing_is_none_of_the_rate_s(monkeypatch):
    """Three steps, a save of 100 s between two rows, two steps more."""
    now = [0.0]
    monkeypatch.setattr(metric_log.time, "perf_counter", lambda: now[0])
    progress = metric_log.Progress(100, pairs=lambda step: 8 * step, file=io.StringIO())
    now[0] = 6.0
    with progress.paused():
        now[0] += 100.0
    now[0] += 4.0
    assert progress.update(5, {}, 0.0) == pytest.approx(4)


def test_compilation_is_none_of_the_rate_s_and_of_the_time_left(monkeypatch):
    """The first step is compiled in 60 s, another size at step 11 in 40; each other takes 2 s."""
    now, file = [0.0], io.StringIO()
    monkeypatch.setattr(metric_log.time, "perf_counter", lambda: now[0])
    progress = metric_log.Progress(110, pairs=lambda step: 8 * step, file=file)
    rates = []
    for step in range(1, 22):
        compiling = {1: 60.0, 11: 40.0}.get(step, 0.0)
        now[0] += compiling or 2.0 * (step < 21)
        if compiling:
            progress.compiled(step, compiling)
        if step in (11, 21):  # a row comes a step late, when the step after it has begun
            rates.append(progress.update(step - 1, {}, 0.0))
    assert rates == pytest.approx([4, 4])
    lines = file.getvalue().splitlines()
    assert lines[0].endswith("03:20 left") and lines[1].endswith("03:00 left")
    alone = metric_log.Progress(9, pairs=lambda step: 8 * step, file=file)
    now[0] += 16.0
    alone.compiled(1, 15.0)
    assert alone.update(1, {}, 0.0) == pytest.approx(0.5)  # no other step tells a rate
    assert "left" not in file.getvalue().splitlines()[-1]  # nor how long the others take


def test_a_run_s_rows_leave_out_the_steps_that_were_compiled(monkeypatch, tmp_path):
    now = [0.0]
    clock = types.SimpleNamespace(
        perf_counter=lambda: now[0], process_time=lambda: 0.0, monotonic=lambda: 0.0
    )
    monkeypatch.setattr(metric_log, "time", clock)
    config = typed(tiny_config()).change({"log.every_steps": 5})
    buckets = metric_log.TimeBuckets()
    run = types.SimpleNamespace(
        config=config,
        workdir=str(tmp_path),
        buckets=buckets,
        steps=10,
        main_process=True,
        say=print,
    )
    run.mixture = types.SimpleNamespace(pairs=lambda step: 8 * step)
    feed = types.SimpleNamespace(take_waited=lambda: 0.0)
    beside = types.SimpleNamespace(
        progress=lambda step: {}, shares=dict, first_step=lambda: None, note=lambda *a: None
    )
    beside.close = lambda: None
    run.step, run.feed, run.batches, run.goodput = 0, feed, beside, beside
    log = callbacks.Log(run)
    for step in range(1, 11):
        with buckets("compile" if step in (1, 8) else "step"):
            now[0] += {1: 50.0, 6: 0.0, 7: 4.0, 8: 50.0}.get(step, 2.0)  # 6 is done in 7
        log.after_step(step, {"loss": np.float32(1)})
    log.at_end(None)
    rates = [row["pairs_per_second"] for row in metric_log.read_metrics(tmp_path)]
    assert rates == pytest.approx([4, 4])


def test_progress_prints_rate_losses_and_waiting_share():
    file = io.StringIO()
    progress = metric_log.Progress(100, start_step=50, pairs=lambda step: 8 * step, file=file)
    time.sleep(0.05)
    rate = progress.update(60, {"loss": 1.25, "learning_rate": 1e-5}, data_wait_seconds=0.0)
    assert 10 * 8 / 0.5 < rate <= 10 * 8 / 0.05
    line = file.getvalue()
    assert (
        line.startswith("step 60/100 (60%) loss 1.25 learning_rate 1e-05 | ") and "pairs/s" in line
    )
    assert "waiting for data 0%" in line and "left" in line
    quiet = io.StringIO()
    silent = metric_log.Progress(100, pairs=lambda step: 8 * step, enabled=False, file=quiet)
    assert silent.update(1, {}, 0.0) > 0
    silent.write("x")
    assert quiet.getvalue() == ""


def test_a_run_that_goes_on_traces_the_steps_that_are_to_come(tmp_path, monkeypatch):
    """It traced nothing, without a word, where it went on behind the first of them."""
    at, traced = [0], []
    monkeypatch.setattr(callbacks.jax.profiler, "start_trace", lambda _: traced.append(at[0]))
    monkeypatch.setattr(callbacks.jax.profiler, "stop_trace", lambda: traced.append(at[0]))
    config = typed(tiny_config()).change({"log.profile_steps": (20, 22)})
    said: list[str] = []
    run = types.SimpleNamespace(
        config=config, workdir=tmp_path, main_process=True, steps=40, say=said.append
    )
    for start, steps in ((40, []), (30, []), (0, [20, 23]), (20, [21, 23]), (21, [22, 23])):
        run.step = start
        profile = callbacks.Profile(run)
        for at[0] in range(start + 1, 41):
            profile.before_step(at[0])
        profile.at_end(None)
        assert traced == steps
        traced.clear()
    assert said == [
        "warning: log.profile_steps=(20, 22) is behind step 30, from which the run goes on, and "
        "traces nothing; name steps to come"
    ]
    run.step = 30
    callbacks.Profile(run)  # the same command again, once they are traced
    assert len(said) == 1
