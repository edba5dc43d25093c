"""Bars of long work on a terminal and in a log file."""

import io

import pytest

from coca_jax import bars
from coca_jax.evaluators import in_batches


class Terminal(io.StringIO):
    def isatty(self):
        return True


def count(monkeypatch, file, every, **how):
    monkeypatch.setattr("sys.stderr", file)
    monkeypatch.setattr(bars, "LINE_EVERY", every)
    with bars.Bar(how.pop("total", 3000), how.pop("unit", "pictures"), "looking", **how) as bar:
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
    with pytest.raises(OSError), bars.Bar(9, "texts") as bar:
        monkeypatch.setattr(bars, "LINE_EVERY", 0.0)
        bar.update(4)
        monkeypatch.setattr(bars, "LINE_EVERY", 30.0)
        bar.update(3)
        raise OSError
    assert file.getvalue().splitlines() == ["4 of 9 texts in 00:00", "7 of 9 texts in 00:00"]


def test_a_terminal_has_a_bar(monkeypatch):
    said = count(monkeypatch, Terminal(), 0.0)
    assert "\rlooking:" in said and "1500/3000" in said and said.count("\n") == 1
    assert count(monkeypatch, Terminal(), 0.0, shown=False) == ""


def test_an_evaluation_writes_no_bar_into_a_log_file(monkeypatch):
    monkeypatch.setattr("sys.stderr", file := io.StringIO())
    assert [len(batch) for batch in in_batches(range(5), 2, show="zeroshot")] == [2, 2, 1]
    assert file.getvalue() == ""
