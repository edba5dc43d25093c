"""The public benchmark: each row trains for some steps and is scored; the table is made of them."""

import argparse
import importlib.util
import json
import pathlib
import sys

import numpy as np
import pytest
from PIL import Image

from coca_jax.cli import prepare

ROOT = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.append(str(ROOT))

import emoji  # noqa: E402
import settings  # noqa: E402
import table  # noqa: E402

# By another name: tests/fuzz has a `run` too.
_SPEC = importlib.util.spec_from_file_location("benchmark_run", ROOT / "run.py")
assert _SPEC and _SPEC.loader
run = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(run)


def test_a_table_shows_mean_and_range_of_seeds_and_leaves_trials_out():
    line = dict(row="coca_jax", data="fashion_mnist", minutes=10.0, pairs=1000, machine="one")
    line["cpu_minutes"] = 9.96
    lines = [
        line | dict(seed=seed, scores={"zero_shot/fashion_mnist/top1": value})
        for seed, value in enumerate((0.90, 0.92, 0.91))
    ]
    lines.append(line | dict(seed=0, minutes=0.0, scores={"zero_shot/fashion_mnist/top1": 0.1}))
    made = table.table(lines)
    assert "| coca_jax | 10 | 10.0 | 3 | 1,000 | 91.0 (90.0 to 92.0) | one |" in made
    assert made.count("| coca_jax ") == 1 and made.count("No run yet.") == 2
    for number, line in enumerate(lines):
        line["commit"] = "abc1234" if number < 2 else "def5678"
    assert "| coca_jax | 10 | 10.0 | 3 of 2 commits | 1,000 |" in table.table(lines)


def test_a_line_replaces_that_of_the_same_run(tmp_path):
    line = dict(row="a", data="scenes", seed=0, minutes=1.0, machine="m", pairs=1)
    for one in (line, line | dict(seed=1), line | dict(pairs=2)):
        run.add(tmp_path / "results.json", one)
    found = json.loads((tmp_path / "results.json").read_text())
    assert [(one["seed"], one["pairs"]) for one in found] == [(1, 1), (0, 2)]


def test_a_line_has_the_commit_that_it_was_trained_on(monkeypatch):
    told = dict(pairs=8, scores={"zero_shot/fashion_mnist/top1": 0.5})
    args = argparse.Namespace(row="coca_jax", data="fashion_mnist", steps=0, minutes=1.0)
    monkeypatch.setattr(run, "call", lambda *given: (told, 60.0))
    monkeypatch.setattr(run, "commit", lambda: "abc1234")
    assert run.run(args, 0, 20, "none")["commit"] == "abc1234"
    now = iter(("abc1234", "def5678", "def5678"))
    monkeypatch.setattr(run, "commit", lambda: next(now))
    with pytest.raises(SystemExit, match="was abc1234 when seed 0 began and is def5678 now"):
        run.run(args, 0, 20, "none")


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


def has_learned(made, before):
    """Nearly all parameters have moved, and all are finite."""
    after = made.model.state_dict()
    moved = [name for name in after if not (after[name] == before[name]).all()]
    return len(moved) > 0.9 * len(after) and all(x.isfinite().all() for x in after.values())


@pytest.mark.torch
@pytest.mark.parametrize(
    "row", ["open_clip_clip", pytest.param("open_clip_coca", marks=pytest.mark.slow)]
)
@pytest.mark.long
def test_a_row_in_pytorch_learns_and_is_scored(row, tmp_path, monkeypatch):
    """The third row is that of the next test."""
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
    assert has_learned(made, before)
    again = torch_row.Run(row, "scenes", str(tmp_path), 3, 0)
    scores = again.score(str(tmp_path / "run"))
    again.batches.close()
    assert scores["retrieval/scenes_heldout/num_images"] == 24
    assert 0 <= scores["zero_shot/scenes_heldout/top1"] <= 1
    captions = settings.ROWS[row].captions
    assert ("captioning/scenes_test/exact_match" in scores) == captions
    if captions:
        assert np.isfinite(scores["captioning/scenes_test/perplexity"])


def few_emoji(folder):
    """Twelve names drawn by four vendors each, prepared as data/emoji is."""
    (folder / "raw").mkdir()
    lines = []
    for number in range(48):
        color, which = divmod(number, 4)
        picture = Image.new("RGBA", (72, 72), (20 * color, 255 - 20 * color, 60 * which, 255))
        picture.save(folder / f"raw/{number}.png")
        about = dict(vendor=list(emoji.VENDORS)[which], concept=str(color), label=["colors"])
        text = f"colour {color} of {12 - color}"
        lines.append(dict(file_name=f"{number}.png", text=text, **about))
    (folder / "raw/metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    prepare.prepare("imagefolder", str(folder / "raw"), str(folder / "emoji"), progress=False)


@pytest.mark.torch
def test_the_reference_learns_names_of_drawings(tmp_path, monkeypatch):
    """By its light ConvNet, Muon, and CLIP's ids that occur; of a vendor that it has not seen all
    drawings are scored, among all names."""
    pytest.importorskip("open_clip", reason="needs the extra 'parity'")
    import torch
    import torch_row

    few_emoji(tmp_path)
    small(monkeypatch)
    small_data = settings.Data("emoji", 1.0, (), width=32, heads=2, batch=8)
    monkeypatch.setitem(settings.DATA, "emoji", small_data)
    made = torch_row.Run("torch_reference", "emoji", str(tmp_path), 12, 0)
    sizes = [(m.in_channels, m.out_channels, m.stride[0]) for m in made.model.visual.conv1[::3]]
    assert sizes == [
        (3, 32, 2),
        (32, 64, 2),
        (64, 64, 1),
        (64, 128, 2),
        (128, 128, 1),
        (128, 32, 1),
    ]
    rules = torch_row.optimizers(made.model, made.row)
    assert [type(rule) for rule in rules] == [torch.optim.AdamW, torch.optim.Muon]
    assert {group["lr"] for rule in rules for group in rule.param_groups} == {1.5e-3}
    assert (
        made.words.size == 2 + 10 + 2 + 2
    )  # two words, ten digits, padding and others, two symbols
    batch = torch_row.DirectStream(made.batches)
    assert {str(t) for t in next(batch)["is_label"]} == {"False"}
    before = {name: x.clone() for name, x in made.model.state_dict().items()}
    assert made.train(str(tmp_path / "run")) == 12 * 8
    made.batches.close()
    assert has_learned(made, before)
    again = torch_row.Run("torch_reference", "emoji", str(tmp_path), 12, 0)
    scores = again.score(str(tmp_path / "run"))
    again.batches.close()
    assert scores["retrieval/emoji_openmoji/num_images"] == 12
    assert 0 <= scores["captioning/emoji_openmoji/exact_match"] <= 1
    assert np.isfinite(scores["captioning/emoji_openmoji/perplexity"])


def test_steps_follow_from_two_short_runs(monkeypatch, tmp_path):
    """Start 30 s, a step 0.5 s."""
    monkeypatch.setattr(run, "call", lambda act, args, seed, steps, place: ({}, 30 + 0.5 * steps))
    assert run.fitting(argparse.Namespace(minutes=2.0, seed=[0]), str(tmp_path)) == 180
    with pytest.raises(SystemExit, match="is less than 8 steps take"):
        run.fitting(argparse.Namespace(minutes=0.5, seed=[0]), str(tmp_path))


def test_a_later_seed_takes_the_steps_of_the_others(monkeypatch, tmp_path):
    out = tmp_path / "results.json"
    given = argparse.Namespace(row="a", data="scenes", minutes=2.0, seed=[1], out=str(out))
    assert run.of_other_seeds(given) == 0  # no file yet
    monkeypatch.setattr(run, "machine", lambda: "here")
    line = dict(row="a", data="scenes", seed=0, minutes=2.0, machine="here", steps=180)
    others = (dict(row="b"), dict(data="emoji"), dict(minutes=3.0), dict(machine="there"))
    for other in (*others, dict(seed=1)):  # the last is of the seed that comes again
        run.add(out, line | dict(steps=7) | other)
    assert run.of_other_seeds(given) == 0
    run.add(out, line)
    assert run.of_other_seeds(given) == 180
    run.add(out, line | dict(seed=2, steps=181))
    assert run.of_other_seeds(given) == 0


def test_drawings_are_found_under_the_names_of_their_packages():
    one = dict(unified="2764-FE0F", non_qualified="2764")
    assert emoji.places(one, "a/{lower}.png") == ["a/2764-fe0f.png", "a/2764.png", "a/2764.png"]
    blue = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 2"><rect width="2" height="2" '
    pytest.importorskip("resvg_py", reason="needs resvg-py")
    picture = emoji.opened((blue + 'fill="#00f"/></svg>').encode(), True)
    assert picture.size == (72, 72) and picture.getpixel((36, 36)) == (0, 0, 255, 255)
