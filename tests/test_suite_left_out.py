"""What a suite and a comparison say of data sets that they leave out."""

import os
import sys

import numpy as np
import pytest
from conftest import flags_of
from test_suite_parts import Colours, png, tar_set

from coca_jax import inference
from coca_jax.apps.suites import tables
from coca_jax.cli import evaluate


def test_a_set_without_the_number_of_its_tars_is_told(tmp_path, monkeypatch, capsys):
    """As where a download was cut short: a suite by name left it out without a word, and a list of
    sets read it with the classes '0' and '1'."""
    example = dict(png=png("red"), cls=b"0")
    tar_set(tmp_path / "sets/whole", example, classnames="red\nblue")
    cut = tar_set(tmp_path / "sets/wds/cut", example, classnames="red\nblue")
    os.remove(f"{cut}/test/nshards.txt")
    found, left = tables.tasks("clip_benchmark", str(tmp_path / "sets"))
    assert [task.key for task in found] == ["whole"] and left == ["wds/cut"]
    (tmp_path / "mine.txt").write_text("cut\n")
    with pytest.raises(ValueError, match="wds/cut/test/nshards.txt is missing, the number of tars"):
        tables.tasks(str(tmp_path / "mine.txt"), str(tmp_path / "sets/wds"))
    monkeypatch.setattr(inference, "load", lambda *_, **__: Colours())
    flags_of("evaluate", monkeypatch)
    flags = ["--suite=clip_benchmark", "--checkpoint=runs/a", f"--root={tmp_path}/sets"]
    evaluate.flags.FLAGS(["evaluate", *flags, f"--out={tmp_path}/out"])
    evaluate.main(["evaluate"])
    assert "without test/nshards.txt, left out: wds/cut" in capsys.readouterr().err
    with pytest.raises(ValueError, match="clip_benchmark: no val/nshards.txt in any"):
        tables.tasks("clip_benchmark", str(tmp_path / "sets"), "val")


def test_a_probe_without_torch_is_a_line_before_any_work(tmp_path, monkeypatch):
    """It came after the pictures of both splits were encoded."""
    tar_set(tmp_path / "sets/whole", dict(png=png("red"), cls=b"0"), classnames="red\nblue")
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(inference, "load", None)
    flags_of("evaluate", monkeypatch)
    flags = ["--suite=clip_benchmark", "--suite_probe", f"--root={tmp_path}/sets"]
    evaluate.flags.FLAGS(["evaluate", *flags, "--checkpoint=runs/a", f"--out={tmp_path}/out"])
    with pytest.raises(ValueError, match="torch.*pip install"):
        evaluate.main(["evaluate"])
    assert not (tmp_path / "out").exists()


def test_a_comparison_tells_what_it_leaves_out(tmp_path, capsys):
    """Sets that one folder alone has; two folders without a common one have nothing to show."""
    for out, names in (("one", "abc"), ("two", "bd"), ("three", "e")):
        (tmp_path / out / "suite").mkdir(parents=True)
        for name in names:
            right = np.array([True, False, True])
            np.savez(tmp_path / out / f"suite/{name}.npz", target=np.ones(3, int), guess=right * 1)
            (tmp_path / out / f"suite/{name}.json").write_text('{"metric": "acc1"}')
    one, two, three = (str(tmp_path / out) for out in ("one", "two", "three"))
    (row,) = evaluate.compare([one, two])["rows"]
    assert row["data"] == "b" and row["difference"] == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        f"{one} and {two}: a, c only in {one}: not compared",
        f"{one} and {two}: d only in {two}: not compared",
    ]
    with pytest.raises(ValueError, match="no data set in common: a, b, c in the one, e in the"):
        evaluate.compare([one, three])
