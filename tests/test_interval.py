"""The interval between checkpoints: Daly's formulas against a simulation and a search."""

import math
import pathlib
import re

import numpy as np
import pytest
from conftest import flags_of, scenes_words
from one_device import smallest_run, train_alone
from test_train import tiny_run

from coca_jax.checkpoints import manager
from coca_jax.cli import compile
from coca_jax.config import typed
from coca_jax.runtime import goodput
from coca_jax.training import callbacks

CASES = [(10.0, 300.0, 3_600.0), (60.0, 600.0, 3_600.0), (2.0, 30.0, 50_000.0), (30.0, 0.0, 600.0)]


@pytest.mark.parametrize("save, restart, between", CASES)
def test_the_simulation_agrees_with_the_formula(save, restart, between):
    best = goodput.best_interval(save, between)
    for interval in (best / 3, best, 3 * best):
        want = goodput.expected(interval, save, restart, between)
        got = [
            goodput.simulate(interval, save, restart, between, saves=20_000, seed=seed)
            for seed in range(4)
        ]
        assert np.mean(got) == pytest.approx(want, rel=0.01)


@pytest.mark.parametrize("save, restart, between", CASES)
def test_no_other_interval_is_better(save, restart, between):
    best = goodput.best_interval(save, between)
    top = goodput.expected(best, save, restart, between)
    others = [goodput.expected(best * f, save, restart, between) for f in np.linspace(0.2, 5, 97)]
    assert max(others) <= top * 1.001  # Daly's is an expansion: within a thousandth
    assert best == pytest.approx(math.sqrt(2 * save * between), rel=0.3)  # Young's


def test_more_hosts_have_less_left():
    found = [goodput.estimate(n, goodput.HOST_HOURS, 10.0, 300.0) for n in (1, 64, 2048)]
    assert found[0]["hours_between_failures"] == pytest.approx(6_334, rel=1e-3)
    assert found[2]["hours_between_failures"] == pytest.approx(3.09, rel=1e-2)
    values = [f["expected_goodput"] for f in found]
    assert values[0] > 0.999 > values[1] > 0.99 > values[2] > 0.9
    for f in found:
        assert f["simulated_goodput"] == pytest.approx(f["expected_goodput"], rel=0.01)
    assert goodput.estimate(10_000_000, 1.0, 10.0, 300.0)["expected_goodput"] < 0.01


@pytest.mark.long
def test_a_run_chooses_its_interval_and_the_first_save_measures(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(callbacks, "FIRST", 3)
    config = smallest_run()
    config.steps, config.data.vocabulary = 7, scenes_words()
    config.loss.captioning_weight = 0.0  # half as much to compile
    config.optimizer.ema = 0.0
    config.checkpoint.every = "auto"
    config.checkpoint.mean_hours_between_failures = 1e-9  # every few microseconds: save always
    config.checkpoint.keep = 20
    train_alone(config, tmp_path)
    _, steps = manager.find_steps(str(tmp_path))
    assert steps[-1] == 3 and steps[0] == 7 and len(steps) > 3
    assert "a checkpoint every " in capfd.readouterr().err


def test_what_cannot_be_is_refused():
    config = tiny_run()
    config.checkpoint.every = "never"
    with pytest.raises(ValueError, match="checkpoint.every='never'"):
        typed(config).check()


def test_pages_count_the_hosts_that_a_slice_has():
    root, found = pathlib.Path(__file__).parent.parent, []
    for text in (compile.__doc__, *(page.read_text() for page in root.glob("docs/*.md"))):
        found += re.findall(r"--topology=v4:(\d+)x(\d+)x(\d+) --hosts=(\d+)", text)
    assert len(found) >= 2
    for x, y, z, hosts in found:
        assert int(hosts) == int(x) * int(y) * int(z) // 4  # chips that a host of v4 has


def test_the_command_says_what_so_many_hosts_leave(monkeypatch, capsys):
    assert {"hosts", "host_hours", "save_seconds", "restart_seconds"} <= flags_of(
        "compile", monkeypatch
    )
    compile.flags.FLAGS(["compile", "--hosts=64", "--save_seconds=20", "--restart_seconds=600"])
    compile.check_goodput()
    found = compile.show_goodput()
    assert found == goodput.estimate(64, round(goodput.HOST_HOURS), 20.0, 600.0)
    page = pathlib.Path(__file__).parent.parent / "docs/scaling.md"
    assert f"({round(goodput.HOST_HOURS):,} by default" in page.read_text()
    assert capsys.readouterr().out.startswith("64 host(s) fail every 99.0 h: with a save every")
    compile.flags.FLAGS(["compile", "--hosts=4000", "--host_hours=1"])
    assert compile.show_goodput()["expected_goodput"] < 0.01
    assert capsys.readouterr().out == "4000 hosts fail too often to train\n"
    for flag in ("--host_hours=0", "--save_seconds=nan", "--restart_seconds=-1", "--hosts=-1"):
        compile.flags.FLAGS(["compile", "--host_hours=5", "--save_seconds=1", flag])
        with pytest.raises(ValueError, match=rf"{flag}(\.0)?: give a number"):
            compile.check_goodput()
        compile.flags.FLAGS(["compile", "--hosts=1", "--save_seconds=1", "--restart_seconds=1"])
    compile.flags.FLAGS(["compile", "--hosts=0", "--config=tiny", "--topology=cpu:1"])
    with pytest.raises(ValueError, match=r"--host_hours=5.0: it is for --hosts; leave it out"):
        compile.main(["compile"])
