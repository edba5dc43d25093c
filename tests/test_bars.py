"""Bars of long work on a terminal and in a log file."""

import dataclasses
import io
import time

import pytest
from prepare_cases import encode

from coca_jax.data import prepare
from coca_jax.data.sources import registry
from coca_jax.evaluation.evaluators import in_batches
from coca_jax.runtime import activity, progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def count(monkeypatch, file, every, **how):
    monkeypatch.setattr("sys.stderr", file)
    monkeypatch.setattr(progress, "LINE_EVERY", every)
    with progress.Bar(how.pop("total", 3000), how.pop("unit", "pictures"), "looking", **how) as bar:
        for done in (1000, 500):
            bar.update(done)
    return file.getvalue()


def test_a_log_file_has_whole_lines_now_and_then(monkeypatch):
    said = count(monkeypatch, io.StringIO(), 0.0)
    lines = [
        "looking: 1,000 of 3,000 pictures in 00:00",
        "looking: 1,500 of 3,000 pictures in 00:00",
    ]
    assert said.splitlines() == lines and "\r" not in said
    assert count(monkeypatch, io.StringIO(), 30.0) == ""  # short work
    said = count(monkeypatch, io.StringIO(), 0.0, total=None, unit="", thousands=True)
    assert said.splitlines() == ["looking: 1.00k in 00:00", "looking: 1.50k in 00:00"]
    assert count(monkeypatch, io.StringIO(), 0.0, shown=False) == ""


def test_the_last_line_says_how_far_long_work_came(monkeypatch):
    monkeypatch.setattr("sys.stderr", file := io.StringIO())
    with pytest.raises(OSError), progress.Bar(9, "texts") as bar:
        monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
        bar.update(4)
        monkeypatch.setattr(progress, "LINE_EVERY", 30.0)
        bar.update(3)
        raise OSError
    assert file.getvalue().splitlines() == ["4 of 9 texts in 00:00", "7 of 9 texts in 00:00"]


def test_a_terminal_has_a_bar(monkeypatch):
    said = count(monkeypatch, Terminal(), 0.0)
    assert "\rlooking:" in said and "1500/3000" in said and said.count("\n") == 1
    assert count(monkeypatch, Terminal(), 0.0, shown=False) == ""


def test_an_evaluation_writes_no_bar_into_a_log_file(monkeypatch):
    monkeypatch.setattr("sys.stderr", file := io.StringIO())
    assert [len(batch) for batch in in_batches(range(5), 2, show="zero_shot")] == [2, 2, 1]
    assert file.getvalue() == ""


def slow(work):
    def later(*given, **how):
        time.sleep(0.1)
        return work(*given, **how)

    return later


def test_what_takes_long_is_said_as_long_as_it_goes_on(monkeypatch, capsys):
    monkeypatch.setattr(activity, "SAID_EVERY", 0.04)
    with activity.announce("listing"), activity.announce("a part of it"):
        time.sleep(0.1)
    assert set(capsys.readouterr().err.splitlines()) == {"listing ... 0 s so far"}
    with activity.announce("listing"):
        pass
    time.sleep(0.1)
    assert capsys.readouterr().err == ""


def test_a_folder_that_takes_long_to_list_is_said(monkeypatch, capsys, tmp_path):
    """One of ten million files took a quarter of an hour without a word."""
    (tmp_path / "in/a").mkdir(parents=True)
    (tmp_path / "in/a/1.jpg").write_bytes(encode(1))
    where = "imagefolder", str(tmp_path / "in"), str(tmp_path / "out")
    monkeypatch.setattr(activity, "SAID_EVERY", 0.04)
    folders = registry.formats()["imagefolder"]
    slower = dataclasses.replace(folders, plan=slow(folders.plan))
    monkeypatch.setitem(registry.formats(), "imagefolder", slower)
    assert prepare.prepare(*where, processes=1, progress=False)["written"] == 1
    told = capsys.readouterr().err
    assert f"looking through {where[1]} ... 0 s so far" in told
