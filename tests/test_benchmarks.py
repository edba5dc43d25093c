"""The public benchmark: each row trains for some steps and is scored; the table is made of them."""

import argparse
import importlib.util
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(ROOT))

import settings  # noqa: E402
import table  # noqa: E402

# By another name: tests/fuzz has a `run` too.
_SPEC = importlib.util.spec_from_file_location("benchmark_run", ROOT / "run.py")
assert _SPEC and _SPEC.loader
run = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(run)


def test_the_table_is_that_of_the_results():
    done = subprocess.run([sys.executable, str(ROOT / "table.py"), "--check"], capture_output=True)
    assert done.returncode == 0, done.stderr


def test_a_table_shows_mean_and_range_of_seeds_and_leaves_trials_out():
    line = dict(row="coca_jax", data="fashion_mnist", minutes=10.0, pairs=1000, machine="one")
    line["cpu_minutes"] = 9.96
    lines = [
        line | dict(seed=seed, scores={"zeroshot/fashion_mnist/top1": value})
        for seed, value in enumerate((0.90, 0.92, 0.91))
    ]
    lines.append(line | dict(seed=0, minutes=0.0, scores={"zeroshot/fashion_mnist/top1": 0.1}))
    made = table.table(lines)
    assert "| coca_jax | 10 | 10.0 | 3 | 1,000 | 91.0 (90.0 to 92.0) | one |" in made
    assert made.count("| coca_jax ") == 1 and made.count("No run yet.") == 2


def test_a_line_replaces_that_of_the_same_run(tmp_path):
    line = dict(row="a", data="scenes", seed=0, minutes=1.0, machine="m", pairs=1)
    for one in (line, line | dict(seed=1), line | dict(pairs=2)):
        run.add(tmp_path / "results.json", one)
    found = json.loads((tmp_path / "results.json").read_text())
    assert [(one["seed"], one["pairs"]) for one in found] == [(1, 1), (0, 2)]


def small(monkeypatch, data="scenes"):
    """The recipe with few records to score."""
    whole = settings.config_of

    def cut(*arguments):
        config = whole(*arguments)
        tasks = tuple(dict(task, limit=24) for task in config.eval.tasks)
        return config.change({"eval.tasks": tasks, "batch_size": 8})

    for module in list(sys.modules.values()):
        if getattr(module, "config_of", None) is whole:
            monkeypatch.setattr(module, "config_of", cut)


@pytest.mark.torch
@pytest.mark.parametrize(
    "row",
    [
        "open_clip_clip",
        "torch_reference",
        pytest.param("open_clip_coca", marks=pytest.mark.slow),
    ],
)
def test_a_row_in_pytorch_learns_and_is_scored(row, tmp_path, monkeypatch):
    pytest.importorskip("open_clip", reason="needs the extra 'parity'")
    import torch_row

    small(monkeypatch)
    monkeypatch.setitem(
        settings.DATA, "scenes", settings.Data("demo", 1.0, (), width=32, heads=2, batch=8)
    )
    made = torch_row.Run(row, "scenes", str(tmp_path), 3, 0)
    before = {name: x.clone() for name, x in made.model.state_dict().items()}
    assert made.train(str(tmp_path / "run")) == 3 * 8
    made.batches.close()
    after = made.model.state_dict()
    moved = [name for name in after if not (after[name] == before[name]).all()]
    assert len(moved) > 0.9 * len(after) and all(x.isfinite().all() for x in after.values())
    again = torch_row.Run(row, "scenes", str(tmp_path), 3, 0)
    scores = again.score(str(tmp_path / "run"))
    again.batches.close()
    assert scores["retrieval/scenes_heldout/num_images"] == 24
    assert 0 <= scores["zeroshot/scenes_heldout/top1"] <= 1
    captions = settings.ROWS[row].captions
    assert ("captioning/scenes_test/exact_match" in scores) == captions
    if captions:
        assert np.isfinite(scores["captioning/scenes_test/perplexity"])


def test_steps_follow_from_two_short_runs(monkeypatch, tmp_path):
    """Start 30 s, a step 0.5 s."""
    monkeypatch.setattr(run, "call", lambda act, args, seed, steps, place: ({}, 30 + 0.5 * steps))
    assert run.fitting(argparse.Namespace(minutes=2.0, seed=[0]), str(tmp_path)) == 180
    with pytest.raises(SystemExit, match="is less than 8 steps take"):
        run.fitting(argparse.Namespace(minutes=0.5, seed=[0]), str(tmp_path))


def test_drawings_are_found_under_the_names_of_their_packages():
    import emoji

    one = dict(unified="2764-FE0F", non_qualified="2764")
    assert emoji.places(one, "a/{lower}.png") == ["a/2764-fe0f.png", "a/2764.png", "a/2764.png"]
    blue = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 2"><rect width="2" height="2" '
    pytest.importorskip("resvg_py", reason="needs resvg-py")
    picture = emoji.opened((blue + 'fill="#00f"/></svg>').encode(), True)
    assert picture.size == (72, 72) and picture.getpixel((36, 36)) == (0, 0, 255, 255)
