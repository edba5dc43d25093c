"""Where the time of a run went, over its restarts: sums, lost steps, time in which nothing ran."""

import json
import time

import pytest

from coca_jax.runtime import goodput
from coca_jax.runtime.goodput import Goodput, between, fold
from coca_jax.runtime.metric_log import TimeBuckets


def former(first, last, step=100.0, earlier=0.0, **more):
    life = dict(
        seconds={"step": step, "save": 5.0, "other": 1.0} | more, first_step=first, step=last
    )
    return dict(starts=1, parts={"step": earlier, "down": 7.0}, life=life)


def test_a_new_run_has_no_past():
    assert sum(fold(None, 0, 9.0).values()) == 0


def test_steps_after_the_checkpoint_are_lost():
    parts = fold(former(0, 100), 80, down=3.0)  # a step took a second
    assert parts["step"] == pytest.approx(80) and parts["lost"] == pytest.approx(20)
    assert parts["down"] == 10.0 and parts["save"] == 5.0 and parts["other"] == 1.0


def test_a_run_that_goes_back_behind_its_last_start_loses_earlier_steps_too():
    parts = fold(former(50, 100, earlier=200.0), 25, down=0.0)  # 4 s a step, then 2 s
    assert parts["lost"] == pytest.approx(100 + 100) and parts["step"] == pytest.approx(100)


def test_a_start_without_a_step_loses_nothing():
    parts = fold(former(40, 40, step=0.0, earlier=80.0), 40, down=0.0)
    assert parts["step"] == 80 and parts["lost"] == 0


def test_a_wall_clock_that_jumps_does_not_count_on_the_same_machine():
    before = dict(wall=1e9, boot="a", since_boot=100.0)
    assert between(before, dict(wall=5e9, boot="a", since_boot=103.0)) == 3.0
    assert between(before, dict(wall=1e9 + 60, boot="b", since_boot=5.0)) == 60.0
    assert between(before, dict(wall=1e9 - 60, boot="b", since_boot=5.0)) == 0.0


def start(workdir, step, **more):
    buckets = TimeBuckets()
    return buckets, Goodput(str(workdir), buckets, step, **more)


def test_shares_of_two_starts_add_up_to_the_time_since_the_first(tmp_path):
    first, good = start(tmp_path, 0)
    with first("compile"):
        time.sleep(0.02)
    with first("step"):
        time.sleep(0.05)
    good.first_step()
    good.note(10, now=True)
    time.sleep(0.05)  # killed here: what came after the file was written is not known
    second, good = start(tmp_path, 5)  # half of the steps were saved
    with second("step"):
        time.sleep(0.05)
    good.first_step()
    shares = good.shares()
    assert sum(shares.values()) == pytest.approx(1)
    lost = first.seconds("step") / 2
    kept = lost + second.seconds("step")
    assert shares["goodput"] / shares["time/lost"] == pytest.approx(kept / lost, rel=1e-6)
    compiling = first.seconds("compile")
    assert shares["time/compile"] / shares["time/lost"] == pytest.approx(compiling / lost, rel=1e-6)
    assert shares["time/down"] / shares["time/lost"] > 0.05 / lost / 2
    assert good.summary()["restarts"] == 1
    assert good.summary()["seconds_to_first_step"] >= 0.05


def test_a_start_that_goes_back_behind_its_beginning_loses_what_earlier_ones_trained(tmp_path):
    first, good = start(tmp_path, 0)
    first._seconds["step"] = 1000.0
    good.first_step()
    good.note(1000, now=True)
    second, good = start(tmp_path, 1000)
    second._seconds["step"] = 10.0
    good.first_step()
    good.note(1010, now=True)
    good.go_back(500)
    shares = good.shares()
    assert shares["time/lost"] / shares["goodput"] == pytest.approx(510 / 500)
    good.note(500, now=True)
    assert fold(json.loads((tmp_path / goodput.FILE).read_text()), 500, 0.0)["lost"] == 510


def test_a_start_that_trains_nothing_leaves_the_file_and_the_figures_alone(tmp_path):
    first, good = start(tmp_path, 0)
    with first("step"):
        time.sleep(0.05)
    good.first_step()
    good.note(10, now=True)
    text = (tmp_path / goodput.FILE).read_text()
    again, good = start(tmp_path, 10)  # a finished run, started again
    with again("init"):
        time.sleep(0.05)
    good.close()
    assert (tmp_path / goodput.FILE).read_text() == text
    parts = {name: 0.0 for name in goodput.PARTS} | json.loads(text)["life"]["seconds"]
    share = parts["step"] / sum(parts.values())
    assert 0.2 < share and good.shares()["goodput"] == pytest.approx(share)
    assert good.summary() == {"goodput": round(share, 4), "restarts": 0}


def test_a_file_that_is_not_whole_counts_as_none(tmp_path):
    for text in ("", "{", "[]", json.dumps({"parts": 3})):
        (tmp_path / goodput.FILE).write_text(text)
        assert start(tmp_path, 0)[1].summary()["restarts"] == 0


def test_imports_count_as_start_up(tmp_path):
    buckets, good = start(tmp_path, 0, before=5.0)
    assert good.shares()["time/init"] > 0.5
    assert 0 < goodput.process_age() < 36_000
