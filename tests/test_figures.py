"""Figures of README and docs: every one is that of docs/results.json, and can be made again."""

import dataclasses
import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import changes  # noqa: E402
import figure_rows  # noqa: E402
import machine  # noqa: E402
import marks  # noqa: E402
import measuring  # noqa: E402

# By another name: docs/site has a `figures` too.
_SPEC = importlib.util.spec_from_file_location("benchmark_figures", ROOT / "benchmarks/figures.py")
assert _SPEC and _SPEC.loader
figures = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(figures)

ROWS = figures.read()
GIVEN = measuring.Given(ROOT, ROOT / "runs")
# Tables whose numbers say what something is, not what came of it, by how their heads begin.
TOLD = (
    "| kind |",
    "| task",
    "| key |",
    "| you ",
    "| `--",
    "| set |",
    "| call |",
    "| option |",
    "| weights |",
    "| file |",
    "| flag |",
    "| fault |",
    "| figure |",
    "| where |",
    "| status |",
    "| address |",
    "| limit |",
    "| paper",
    "| value |",
    "| | Google Cloud",
    "| | station",
    "| in 0.1",
    "| | in 0.1",
    "| | |\n|---|---|\n| [quick",
)


def test_pages_have_the_numbers_of_the_file(capsys):
    assert not figures.fill(check=True), capsys.readouterr().out


def test_what_captions_take_without_kernels_is_that_of_their_rows():
    names = ("batch_1", "batch_16", "beams_6")
    rows = [ROWS[f"caption_kernels/{name}"]["values"] for name in names]
    times = [row["xla"] / row["kernels"] for row in rows]
    said = f"{min(times):.1f} to {max(times):.1f} times as "
    for file in ("docs/inference.md", "coca_jax/ops/cpu/decode_kernels.py"):
        assert said in (ROOT / file).read_text(), file


def tables(text: str) -> list[list[str]]:
    """The tables of a page, line by line."""
    return [block.splitlines() for block in re.findall(r"(?:^\|[^\n]*\n)+", text, re.M)]


@pytest.mark.parametrize("page", figures.PAGES, ids=lambda page: page.name)
def test_every_row_of_figures_names_where_they_come_from(page):
    if page.name == "config.md":
        return
    for head, line, *rows in tables(page.read_text()):
        if "\n".join([head, line, *rows[:1]]).startswith(TOLD):
            continue
        for row in rows:
            if marks.NUMBER.search(row.split("|", 2)[2]):
                assert marks.MARK.search(row), (
                    f"{page.name}: no mark in {row}: see benchmarks/README.md; a table that tells "
                    "no result stands in TOLD"
                )


def test_every_entry_stands_in_a_page_and_says_how_it_came_about():
    shown = set().union(*(marks.named(page.read_text()) for page in figures.PAGES))
    assert set(ROWS) == shown
    for name, row in ROWS.items():
        assert {"values", "how", "commit", "date", "machine", "command"} <= set(row), name
        assert row["how"] in ("measured", "estimated") and re.fullmatch(
            r"2\d{3}-\d\d-\d\d", row["date"]
        )
        if row["commit"] is None:
            assert re.search(r"measured earlier, written down in [0-9a-f]{7}$", row["note"]), name
        values = row["values"]
        if {"value", "low", "high"} <= set(values):
            assert values["low"] <= values["value"] <= values["high"], name


def test_every_row_can_be_measured_again():
    measured = [name for one in figure_rows.MEASUREMENTS for name in one.rows]
    assert len(measured) == len(set(measured)) and set(measured) == set(ROWS)


@pytest.mark.parametrize(
    "new, like, text",
    [
        (98.449, "98.9", "98.4"),
        (0.791, ".66", ".79"),
        (1.21e-6, "5.4e-7", "1.2e-6"),
        (65536.4, "1,911", "65,536"),
        (4321, "999", "4,321"),
        (4321, "1145", "4321"),
        (-0.42, "+1.1", "-0.4"),
        (2.04, "+1.1", "+2.0"),
        (12, "12.5", "12.0"),
    ],
)
def test_a_number_is_written_as_the_one_before_it(new, like, text):
    assert marks.shown(new, like) == text


def test_marks_put_values_behind_them():
    rows = {
        "a": dict(values=dict(value=1.26, low=1, high=2)),
        "b/c": dict(values=dict(s0=0.5, s1=0.7)),
    }
    text = (
        "| R@1 of 500 <!-- = a b/c:min,_,max --> | 0.0% (0 to 9.9) | .1, 8 v4 | 3.3.0 -2 x 0.0 |\n"
    )
    text += "5 took <!-- = b/c:mean --> 0.1 s on\n2 cores"
    with pytest.raises(ValueError, match="has 6 values, and 7 numbers stand behind it"):
        marks.filled(text, rows)
    assert marks.filled(text.replace(" -2 x", ""), rows) == (
        "| R@1 of 500 <!-- = a b/c:min,_,max --> | 1.3% (1 to 2.0) | .5, 8 v4 | 3.3.0 0.7 |\n"
        "5 took <!-- = b/c:mean --> 0.6 s on\n2 cores"
    )
    with pytest.raises(ValueError, match="has no row 'd': measure it or mend the mark"):
        marks.filled("<!-- = d --> 1", rows)
    with pytest.raises(ValueError, match="row 'a' has no value 'most', only value, low, high"):
        marks.filled("<!-- = a:most --> 1", rows)


@pytest.fixture
def three(monkeypatch, tmp_path):
    """A file of its own, and three measurements of which the second may fail."""
    calls = []

    def take(name: str, value: float):
        def run(given):
            calls.append(name)
            if value < 0:
                raise RuntimeError("no such data")
            return {name: {"high": value + 1, "value": value}}

        return measuring.Measurement((name,), run, value, f"take {name}", more=dict(seeds=[3]))

    old = dict(values=dict(value=2.0, high=1), unit="%", commit=None, note="earlier")
    (tmp_path / "results.json").write_text(json.dumps(dict(a=old, z=old)))
    monkeypatch.setattr(figures, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(figures, "commit", lambda: "abc1234")
    return calls, take


def test_what_is_measured_stays_and_is_not_measured_again(three, capsys):
    calls, take = three
    assert figures.measure([take("a", 1), take("b", -1), take("c", 5)], GIVEN, False) == ["b"]
    said = capsys.readouterr()
    assert "a:value 2 -> 1 (-50.0%)" in said.out and "no such data" in said.err
    assert figures.measure([take("a", 1), take("b", 7), take("c", 5)], GIVEN, False) == []
    assert calls == ["a", "b", "c", "b"]
    rows = figures.read()
    assert list(rows) == ["a", "z", "c", "b"] and rows["z"]["note"] == "earlier"
    assert rows["a"]["values"] == {"value": 1.0, "high": 2} and "note" not in rows["a"]
    assert list(rows["a"]["values"]) == ["value", "high"]  # pages go by the order
    assert rows["a"] | {"unit": "%", "seeds": [3], "commit": "abc1234"} == rows["a"]
    assert re.search(r"core.*, load \d+\.\d; coca_jax \d", rows["a"]["machine"])
    before = dict(values=dict(value=2.0, high=1), commit=None, date=None, note="earlier")
    assert rows["a"]["before"] == before
    assert "before" not in rows["b"]
    figures.measure([take("a", 1.5)], GIVEN, True)
    assert calls[-1] == "a"  # on the same commit: what was before is that of another one
    assert figures.read()["a"]["before"]["values"]["value"] == 2.0


def test_a_value_that_is_new_or_gone_does_not_stop_the_others(three):
    _, take = three
    one = dataclasses.replace(take("a", 1), run=lambda given: {"a": dict(other=3.0, value=2.0)})
    assert figures.measure([one], GIVEN, False) == []
    assert figures.read()["a"]["values"] == dict(value=2.0, other=3.0)


def test_what_was_written_by_hand_stays_on_the_same_commit(three, capsys, monkeypatch):
    _, take = three
    figures.measure([take("a", 1)], GIVEN, False)
    rows = figures.read()
    figures.keep(rows | {"a": rows["a"] | dict(reason="a smaller encoder", note="by hand")})
    assert figures.measure([take("a", 1.5)], GIVEN, True) == []
    row = figures.read()["a"]
    assert row["values"]["value"] == 1.5
    assert (row["reason"], row["note"]) == ("a smaller encoder", "by hand")
    assert "a: see whether its note and reason still holds" in capsys.readouterr().out
    monkeypatch.setattr(figures, "commit", lambda: "fffffff")
    assert figures.measure([take("a", 1.6)], GIVEN, True) == []
    row = figures.read()["a"]
    assert "note" not in row and "reason" not in row and row["before"]["note"] == "by hand"


def test_a_row_that_does_not_come_does_not_stop_the_others(three, capsys):
    calls, take = three
    lacking = dataclasses.replace(take("a", 1), rows=("a", "b"))
    before = figures.read()["a"]
    assert figures.measure([lacking, take("c", 5)], GIVEN, False) == ["a", "b"]
    assert calls == ["a", "c"] and "it measured a, and not b" in capsys.readouterr().err
    assert figures.read()["a"] == before and figures.read()["c"]["values"]["value"] == 5


@pytest.fixture
def checkout(three, monkeypatch, tmp_path):
    """(calls, take, git): the program is a git checkout of one recipe, program/configs/x.py."""
    place = tmp_path / "program"
    (place / "configs").mkdir(parents=True)
    (place / "configs/x.py").write_text("a = 1\n")

    def git(*words):
        words = ("-c", "user.name=x", "-c", "user.email=x@example.com", *words)
        subprocess.run(["git", *words], cwd=place, check=True, capture_output=True)

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    monkeypatch.setattr(machine, "ROOT", place)
    monkeypatch.setattr(machine, "PROGRAM", ("configs",))
    monkeypatch.setattr(figures, "commit", machine.commit)
    return *three, git


def test_files_that_differ_from_the_commit_have_a_name_of_their_own(checkout, tmp_path):
    calls, take, git = checkout
    runs = []

    def run(given):
        runs.append(given.runs.name)
        return {"a": {"value": 1.0}}

    one = dataclasses.replace(take("a", 1), run=run)
    recipe = tmp_path / "program/configs/x.py"
    for count, text in enumerate(("a = 1\n", "a = 2\n", "a = 3\n"), 1):
        recipe.write_text(text)
        for _ in range(2):  # the second has nothing to do
            assert figures.measure([one], GIVEN, False) == []
        assert figures.read()["a"]["commit"] == runs[-1] and len(runs) == count
    recipe.with_name("new.py").write_text("b = 1\n")
    first = figures.commit()
    recipe.with_name("new.py").write_text("b = 2\n")
    assert len({*runs, first, figures.commit()}) == 5
    assert runs[0].isalnum() and all(
        re.fullmatch(rf"{runs[0]}\+[0-9a-f]{{8}}", r) for r in runs[1:]
    )


def test_what_was_measured_while_the_program_changed_is_not_kept(checkout, tmp_path, capsys):
    calls, take, git = checkout
    before, began = figures.read()["a"], figures.commit()

    def run(given):
        (tmp_path / "program/configs/x.py").write_text("a = 2\n")
        git("commit", "-qam", "two")
        return {"a": {"value": 1.0}}

    one = dataclasses.replace(take("a", 1), run=run)
    assert figures.measure([one, take("c", 5)], GIVEN, False) == ["a"]
    assert figures.read()["a"] == before
    said = capsys.readouterr().err
    assert f"the program was {began} when it began and is {figures.commit()} now" in said
    assert figures.read()["c"]["commit"] == figures.commit() != began


def test_what_would_not_be_done_in_time_is_left_for_the_next_call(three, capsys):
    calls, take = three
    assert figures.measure([take("a", 7), take("c", 5)], GIVEN, False, minutes=6) == ["a"]
    assert calls == ["c"] and "a: left for the next call" in capsys.readouterr().err


@pytest.mark.parametrize(
    "before, after, sign, mark",
    [
        (dict(value=90.0, low=88, high=92), 88.5, 1, ""),
        (dict(value=90.0, low=88, high=92), 87.5, 1, "worse"),
        (dict(value=90.0, low=88, high=92), 95.0, -1, "worse"),
        (dict(value=2.0), 2.05, -1, ""),
        (dict(value=2.0), 2.1, -1, "worse"),
        (dict(value=2.0), 1.0, -1, ""),
        (dict(value=-0.1), 0.1, -1, "worse"),
        (dict(value=2.0), 4.0, 0, ""),
    ],
)
def test_worse_is_beyond_the_interval_or_the_slack_on_the_wrong_side(before, after, sign, mark):
    ways = {1: dict(higher=("value",)), -1: dict(lower=("r:value",)), 0: {}}[sign]
    one = measuring.Measurement(("r",), None, 1, "", **ways)
    rows = {"r": dict(values=dict(value=after), before=dict(values=before)), "s": dict(values={})}
    [line] = changes.compared(rows, lambda name: one)
    assert line[0] == "r:value" and line[-1] == mark
    rows["r"]["reason"] = "the encoder is larger"
    [line] = changes.compared(rows, lambda name: one)
    assert line[-1] == f"worse: {rows['r']['reason']}" * bool(mark)


def test_seeds_are_compared_by_their_mean_and_range():
    one = measuring.Measurement(("r",), None, 1, "", higher=("*",))
    before = dict(seed_0=4.0, seed_1=6.0, low=3.0, high=7.0)
    for after, mark in ((4.5, ""), (3.5, "worse")):
        row = dict(values=dict(seed_0=after, seed_1=after), before=dict(values=before))
        [line] = changes.compared(dict(r=row), lambda name: one)
        assert line == ("r:mean", "5", f"{after:g}", f"{after / 5 - 1:+.1%}", mark)


def test_the_table_of_changes_counts_what_has_no_reason(three, monkeypatch, capsys):
    calls, take = three
    one = dataclasses.replace(take("a", 1), higher=("value",))
    figures.measure([one], GIVEN, False)
    monkeypatch.setattr(figures, "of_row", lambda name: one)
    monkeypatch.setattr(sys, "argv", ["figures.py", "changes"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        figures.main()
    assert ended.value.code == 1
    said = capsys.readouterr().out
    assert "| a:value | 2 | 1 | -50.0% | worse |" in said
    assert "1 values measured again, 1 worse, 1 of them without a reason" in said


def test_the_clock_s_rows_wait_for_a_quiet_machine(three, monkeypatch, capsys):
    calls, take = three
    clock = dataclasses.replace(take("a", 1), clock=True)
    monkeypatch.setattr(figures, "busy", lambda: 1.2)
    assert figures.measure([clock, take("c", 5)], GIVEN, False) == ["a"] and calls == ["c"]
    assert "a: left out, 1.2 cores are busy; --busy measures" in capsys.readouterr().err
    assert figures.measure([clock], GIVEN, False, beside=True) == [] and calls == ["c", "a"]
    monkeypatch.setattr(figures, "busy", lambda: 0.1)
    assert figures.measure([clock], GIVEN, True) == []
    monkeypatch.setattr(figures, "MEASUREMENTS", (take("c", 1), clock))
    monkeypatch.setattr(sys, "argv", ["figures.py", "measure", "--clock", "--again"])
    with pytest.raises(SystemExit):
        figures.main()
    assert calls == ["c", "a", "a", "a"]


def test_rows_are_chosen_by_their_beginnings(three, monkeypatch):
    calls, take = three
    monkeypatch.setattr(figures, "MEASUREMENTS", (take("a", 1), take("ab", 9), take("c", 1)))
    for flags, wanted in (["--only=a"], ["a", "ab"]), (["--quick"], ["c"]):
        monkeypatch.setattr(sys, "argv", ["figures.py", "measure", *flags])
        with pytest.raises(SystemExit) as ended:
            figures.main()
        assert ended.value.code == 0 and calls == wanted
        calls.clear()
    monkeypatch.setattr(sys, "argv", ["figures.py", "measure", "--only=d"])
    with pytest.raises(SystemExit, match="nothing measures such a row; see `list`"):
        figures.main()
