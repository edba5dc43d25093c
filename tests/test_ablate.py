"""Ablations: runs of a table, killed and taken up again, what they say, and bad tables."""

import dataclasses
import functools
import json
import math
import pathlib
import shutil
import subprocess
import types

import jax
import pytest
from PIL import Image

from coca_jax.apps import fit
from coca_jax.apps.ablating import outcome, running, table
from coca_jax.cli import ablate
from coca_jax.data import filters
from coca_jax.evaluation import report_ablation
from coca_jax.evaluation.evaluators.base import Metric
from coca_jax.parallel import sharding
from coca_jax.runtime import json_files, lease, metric_log, out_folder, signals
from coca_jax.training import recipes
from coca_jax.training import trainer as training

TABLE = """
config = "tiny"
seeds = [0, 3]
[overrides]
steps = 2
batch_size = 8
checkpoint.every_steps = 1
model.image.depth = 1
model.text.unimodal_depth = 1
model.text.multimodal_depth = 1
[variants.both]
[variants.again]
checkpoint.keep = 1
"""


def quietly(line):
    del line


def written(folder, text):
    path = folder / "table.toml"
    path.write_text(text)
    return str(path)


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Steps for one device compile in a third of the time."""
    whole = sharding.make_mesh
    with pytest.MonkeyPatch.context() as patch:
        mesh = functools.partial(whole, devices=jax.devices()[:1])
        patch.setattr(sharding, "make_mesh", mesh)
        yield


@pytest.fixture(scope="module")
def ablated(tmp_path_factory):
    """Stopped in its second run, then taken up again: (table, folder, what was there between)."""
    folder = tmp_path_factory.mktemp("ablated")
    found = table.read(written(folder, TABLE), {"log.every_steps": 1})
    out, asked = folder / "out", []

    def reached(self, step):
        asked.append(step)
        return len(asked) == 3  # the first step of the second run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signals.Stop, "reached", reached)
        with pytest.raises(signals.Preempted, match="step 1 is saved"):
            running.ablate(found, str(out), 0, quietly)
    between = (out / "both/seed0/metrics.jsonl").stat().st_mtime_ns
    assert not (out / "again/seed0" / outcome.DONE).exists()
    return found, out, between, running.ablate(found, str(out), 0, quietly)


@pytest.mark.slow
def test_a_killed_ablation_goes_on_and_does_nothing_twice(ablated):
    _, out, between, result = ablated
    assert result == dict(out=str(out), results=str(out / "results.json"), runs=4, failed={})
    assert (out / "both/seed0/metrics.jsonl").stat().st_mtime_ns == between
    # The second variant trains as the first one does; its first run was stopped after a step.
    whole, resumed = (metric_log.read_metrics(out / name / "seed0") for name in ("both", "again"))
    assert [row["loss"] for row in resumed] == [row["loss"] for row in whole]
    assert [row["step"] for row in resumed] == [1, 2]
    scores = json.loads((out / "results.json").read_text())["variants"]["again"]["metrics"]
    assert scores["train/batches/loss"]["difference"] == dict(mean=0.0, low=0.0, high=0.0)
    assert scores["train/batches/loss"]["values"]["0"] == pytest.approx(whole[-1]["loss"])


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(table, folder) of runs whose scores are written down here; one is not done."""
    folder = tmp_path_factory.mktemp("done")
    found = table.read(written(folder, TABLE), {})
    scores = {("both", 0): 0.2, ("both", 3): 0.4, ("again", 0): 0.3, ("again", 3): 0.7}
    for (name, seed), value in scores.items():
        place = folder / name / f"seed{seed}"
        place.mkdir(parents=True)
        named = {"retrieval/x/image_to_text_r1": value, "retrieval/x/image_to_text_r1_low": 0.1}
        named["train/batches/loss"] = 2.0
        contents = dict(steps=2, minutes=1.5, scores=named)
        json_files.write_sealed(place / outcome.DONE, contents)
    outcome.write(found, folder, 0, {})
    return found, folder


def test_results_hold_each_seed_their_mean_and_an_interval(done):
    found = json.loads((done[1] / "results.json").read_text())
    assert found["seeds"] == [0, 3] and list(found["variants"]) == ["both", "again"]
    again = found["variants"]["again"]
    assert again["overrides"]["checkpoint.keep"] == 1 and again["config"] == "tiny"
    assert again["runs"]["3"] | dict(scores=0) == dict(steps=2, minutes=1.5, scores=0)
    assert set(again["metrics"]) == {"retrieval/x/image_to_text_r1", "train/batches/loss"}
    recall = again["metrics"]["retrieval/x/image_to_text_r1"]
    assert recall["values"] == {"0": 0.3, "3": 0.7} and recall["mean"] == pytest.approx(0.5)
    # Student's t of one degree of freedom times the error of a mean of two.
    assert recall["high"] - recall["mean"] == pytest.approx(12.7062 * 0.2, rel=1e-4)
    apart = recall["difference"]
    assert apart["mean"] == pytest.approx(0.2) and apart["high"] == pytest.approx(0.2 + 1.27062)
    first = found["variants"]["both"]["metrics"]["retrieval/x/image_to_text_r1"]
    assert first["difference"] is None


def test_a_difference_from_a_value_that_is_not_finite_is_none():
    """NaN is no JSON."""
    first, other = (
        {seed: dict(scores={"x/y/z": value}) for seed, value in enumerate(values)}
        for values in ((math.nan, 0.4, math.inf), (0.5, 0.6, 0.7))
    )
    found = outcome.summaries(other, first)
    assert found["x/y/z"]["difference"] == dict(mean=pytest.approx(0.2), low=None, high=None)
    json.dumps(outcome.summaries(first, other) | found, allow_nan=False)


def test_the_table_and_the_page_show_every_variant(done):
    found, folder = done
    lines = (folder / "results.md").read_text().splitlines()
    assert lines[0] == "| variant | runs | steps | minutes | retrieval/x/image_to_text_r1 |"
    assert lines[2] == "| both | 2 | 2 | 1.5 | 30.0% (0.0 to 100.0) |"
    narrow = dict(mean=0.728, low=0.3781, high=0.771)  # what results.json has is not cut
    assert report_ablation.limits(Metric("Top 1"), narrow) == pytest.approx((37.81, 77.1))
    page = (folder / "report.html").read_text()
    assert page.count('<figure class="card spread">') == 1
    assert page.count('<circle class="p s1"') == 2  # a dot a seed
    some = dataclasses.replace(found, metrics=("train/batches/loss", "retrieval/y/r1"))
    outcome.write(some, folder, 0, {"again, seed 3": "it diverged"})
    end = "| again | 2 | 2 | 1.5 | 2 (2 to 2) | - |\n\n- failed: again, seed 3: it diverged\n"
    assert (folder / "results.md").read_text().endswith(end)
    assert "it diverged" in (folder / "report.html").read_text()


@pytest.mark.long
def test_the_command_prints_the_table_and_ends_with_1_where_a_run_failed(done, commands, tmp_path):
    """On runs that are done already, and then with a variant whose weights are not there."""
    out = shutil.copytree(done[1], tmp_path / "out")
    places = [out / "table.toml", f"--out={out}"]
    told = commands.run(["ablate", *map(str, places)], tmp_path)
    assert told.returncode == 0, told.stderr
    *lines, last = told.stdout.splitlines()
    assert "| both | 2 | 2 | 1.5 | 30.0% (0.0 to 100.0) |" in lines
    assert json.loads(last) | dict(out="") == dict(
        out="", results=str(out / "results.json"), runs=4, failed={}
    )
    missing = '[variants.missing]\ninit_from = "none"\n'
    written(out, TABLE + missing)
    told = commands.run(["ablate", *map(str, places)], tmp_path)
    assert told.returncode == 1
    failed = "missing, seed 0, missing, seed 3"
    end = f"error: these runs failed ({out}/results.json says why): {failed}"
    assert told.stderr.splitlines()[-1] == end and "Traceback" not in told.stderr
    assert "| both | 2 | 2 | 1.5 | 30.0% (0.0 to 100.0) |" in told.stdout
    why = json.loads((out / "results.json").read_text())["failed"]["missing, seed 0"]
    assert why.startswith("no checkpoint under none")


def test_a_second_ablation_in_the_folder_is_refused_and_the_first_goes_on(done, tmp_path):
    """Such a second one once threw away the run in which the first timed its steps."""
    found, out = done[0], tmp_path / "out"
    shutil.copytree(done[1], out)
    (out / ".pace").mkdir()
    with lease.held(str(out), "--out"):
        with pytest.raises(lease.Held, match="out is in use: process .*; wait .* a new --out$"):
            running.ablate(found, str(out), 0, quietly)
        assert not (out / out_folder.PLAN).exists() and (out / ".pace").is_dir()
    assert running.ablate(found, str(out), 0, quietly)["runs"] == 4
    assert not (out / lease.FILE).exists()


@pytest.mark.slow
def test_equal_minutes_are_steps_by_a_pace_that_is_measured_once(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "PACE", 4)
    text = TABLE.replace("[0, 3]", "[0]").split("[variants.again]")[0]
    found = table.read(written(tmp_path, text), {"log.every_steps": 1})
    out = tmp_path / "out"
    running.ablate(found, str(out), 0.002, quietly)
    (plan,) = json.loads((out / "plan.json").read_text())["variants"].values()
    rows = metric_log.read_metrics(out / "both/seed0")
    assert rows[-1]["step"] == plan["steps"] >= 1
    run = json.loads((out / "results.json").read_text())["variants"]["both"]["runs"]["0"]
    assert run["minutes"] == pytest.approx(sum(row["processor_time"] for row in rows) / 60)
    monkeypatch.setattr(training, "train", None)  # nothing is left to do
    running.ablate(found, str(out), 0.002, quietly)


@pytest.mark.long
def test_runs_are_of_equal_minutes_failures_are_told_and_nothing_is_done_twice(
    tmp_path, monkeypatch
):
    """With a stand-in for training: a step takes 0.5 s, of the second variant 1 s."""
    ran, said = [], []

    def train(config, workdir):
        name = "pace" if workdir.endswith(".pace") else workdir.removeprefix(f"{out}/")
        ran.append((name, config.steps))
        if (name, config.seed) == ("again/seed3", 3) and len(ran) < 11:
            raise ValueError("the loss\nis not finite")
        took = 0.5 if config.checkpoint.keep > 1 else 1.0
        rows = [dict(step=n + 1, loss=2.0, processor_time=took) for n in range(config.steps)]
        place = pathlib.Path(workdir)
        place.mkdir(parents=True)
        (place / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return dict(steps=config.steps, **{"retrieval/x/image_to_text_r1": 0.25})

    monkeypatch.setattr(training, "train", train)
    found, out = table.read(written(tmp_path, TABLE), {}), tmp_path / "out"
    unknown = dataclasses.replace(found, metrics=("retrieval/x/image_to_text_r10", "a/b/c"))
    told = running.ablate(unknown, str(out), 0.5, said.append)
    assert told["runs"] == 3 and told["failed"] == {"again, seed 3": "the loss is not finite"}
    paces = [("pace", running.PACE)] * 4
    assert ran == [
        *paces,
        *(("both/seed0", 60), ("again/seed0", 30), ("both/seed3", 60), ("again/seed3", 30)),
    ]
    assert "both: 0.5 s a step, so 60 steps" in said and not (out / ".pace").exists()
    assert "run 4 of 4: again, seed 3" in said
    ran += [None] * 3
    told = running.ablate(found, str(out), 0.5, said.append)
    assert told == dict(out=str(out), results=str(out / "results.json"), runs=4, failed={})
    assert ran[11:] == [("again/seed3", 30)]
    done = json_files.read_sealed(out / "again/seed3" / outcome.DONE)
    assert (done["steps"], done["minutes"]) == (30, 0.5)
    assert done.get("commit", "") == outcome.commit()
    assert done["scores"]["retrieval/x/image_to_text_r1"] == 0.25
    name = next(n for n, line in enumerate(said) if "so far has 'a/b/c'; there are ret" in line)
    assert said.index("run 1 of 4: both, seed 0") < name < said.index("run 2 of 4: again, seed 0")
    assert sum("has 'retrieval/x/image_to_text_r10'; there are ret" in line for line in said) == 1
    long = found.variants[0].values | {"optimizer.warmup_steps": 40, "log.profile_steps": (30, 40)}
    slow = dataclasses.replace(found.variants[0], name="slow", values=long | {"epochs": 2.0})
    del ran[:]
    slow = dataclasses.replace(found, variants=(slow,), seeds=(0,))
    assert running.ablate(slow, str(out), 0.5, said.append)["failed"] == {}
    assert ran == [("pace", running.PACE), ("slow/seed0", 60)]
    endless = table.read(written(tmp_path, TABLE.replace("steps = 2", "steps = 0")), {})
    with pytest.raises(ValueError, match="variant both: give steps or epochs, or --minutes"):
        running.ablate(endless, str(tmp_path / "other"), 0, quietly)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("config = ", "is no TOML file"),
        ("config = 'tiny'", "no variants"),
        ("confg = 'tiny'\n[variants.a]", "no key 'confg'; did you mean config?"),
        ("[variants.a]", "variant a: no recipe"),
        ("config = 'tinny'\n[variants.a]", "no such recipe.*did you mean tiny"),
        ("config = 'tiny'\nseeds = [0, 0]\n[variants.a]", r"seeds=\[0, 0\]"),
        ("config = 'tiny'\nseeds = [0, -1]\n[variants.a]", "-1 is none; give .* to 4,294,967,295"),
        ("config = 'tiny'\nseeds = [4294967296]\n[variants.a]", "4294967296 is none; give"),
        ("config = 'tiny'\nseeds = ['x']\n[variants.a]", r"seeds=\['x'\]"),
        ("config = 'tiny'\nmetrics = 'loss'\n[variants.a]", "metrics='loss'"),
        ("config = 'tiny'\n[variants.a]\nseed = 3", "variant a: its seeds are those"),
        (
            "config = 'tiny'\n[variants.a]\nlos.weight = 3",
            "variant a: config.los: no key 'los'; did you mean config.loss",
        ),
        (
            "config = 'tiny'\n[variants.a]\nsteps.x = 3",
            "config.steps={'x': 3}: give a whole number",
        ),
        ("config = 'tiny'\n[variants.a]\nbatch_sise = 3", "did you mean config.batch_size"),
        ("config = 'tiny'\n[variants.a]\nbatch_size = 'x'", "variant a: config.batch_size='x'"),
        ("config = 'tiny'\n[variants]\na = 3", "variants.a=3"),
        ("config = 'tiny'\n[variants.'../a']", "variant '../a'"),
    ],
)
def test_a_bad_table_is_a_line(text, words, tmp_path):
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=words) as error:
        table.read(path, {})
    assert str(error.value).startswith(path) and "\n" not in str(error.value)


def test_the_example_is_a_table():
    found = table.read("examples/ablations.toml", {"steps": 7})
    assert [variant.name for variant in found.variants][:2] == ["both", "contrastive_only"]
    config = found.variants[3].config(dict(seed=2))
    assert (config.model.pooler.num_queries, config.steps, config.seed) == (1, 7, 2)
    assert config.batch_size == recipes.typed(recipes.load("demo")).batch_size


def test_the_folder_of_a_run_is_no_place_for_an_ablation(tmp_path, monkeypatch):
    path = written(tmp_path, "config = 'tiny'\n[variants.a]")
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    given = types.SimpleNamespace(out=str(tmp_path / "run"), minutes=0.0)
    monkeypatch.setattr(ablate, "flags", types.SimpleNamespace(FLAGS=given))
    monkeypatch.setattr(recipes, "changes", dict)
    with pytest.raises(ValueError, match="run is the folder of a run; give another one"):
        ablate.main(["ablate", path])


def test_the_folder_of_an_ablation_is_no_workdir(tmp_path):
    found = table.read(written(tmp_path, TABLE), {})
    running.Plan(tmp_path / "abl" / out_folder.PLAN, 0).check(found.variants)
    workdir, line = str(tmp_path / "abl"), "abl is the folder of an ablation, whose runs .*seedN"
    with pytest.raises(ValueError, match=line):
        training.train(found.variants[0].config(), workdir)
    with pytest.raises(ValueError, match=line):
        fit.Kept(workdir, fit.Request(folder="pictures"))
    assert [path.name for path in (tmp_path / "abl").iterdir()] == [out_folder.PLAN]


def test_data_that_are_not_there_are_told_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = table.read(written(tmp_path, TABLE.replace('"tiny"', '"emoji"')), {})
    with pytest.raises(OSError, match="both: .*data/emoji: no such folder.*of train, ablat"):
        running.ablate(found, "out", 0, quietly)
    assert not (tmp_path / "out").exists()
    for name in ("both/seed0", "both/seed3", "again/seed0", "again/seed3"):  # done before they went
        (tmp_path / "out" / name).mkdir(parents=True)
        contents = dict(steps=2, minutes=1.5, scores={"train/batches/loss": 2.0})
        json_files.write_sealed(tmp_path / "out" / name / outcome.DONE, contents)
    assert running.ablate(found, "out", 0, quietly)["runs"] == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ('data.prompts = "fotos"', "prompts is 'fotos'; use one of"),
        ("mesh.fsdp = 3", "fsdp=3 tensor=1 does not fit . devices"),
        ("model.image_size = 50", "model.patch_size=8 does not divide model.image_size=50"),
        ("optimizer.image_learning_rate = 0", "locks the image encoder and needs init_from"),
        (
            'eval.tasks = [{kind = "knn", name = "x", data = {builtin = "scenes"}, limit = -1}]',
            "knn of x: limit=-1: give",
        ),
    ],
)
def test_what_a_later_variant_cannot_have_is_told_before_the_first_trains(
    values, message, tmp_path
):
    found = table.read(written(tmp_path, f"{TABLE}[variants.wrong]\n{values}\n"), {})
    with pytest.raises(ValueError, match=f"variant wrong: .*{message}"):
        running.ablate(found, str(tmp_path / "out"), 0, quietly)
    assert not (tmp_path / "out").exists()


def test_every_variant_has_the_data_that_are_named(tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    for number in range(40):
        picture = Image.new("RGB", (24, 24), (6 * number, 90, 90))
        picture.save(tmp_path / "pictures" / f"{number}.png")
        (tmp_path / "pictures" / f"{number}.txt").write_text(f"a shade of number {number}")
    found = table.read(written(tmp_path, TABLE), {})
    mine = running.with_data(found, [str(tmp_path / "pictures")], str(tmp_path / "out"), {})
    assert capsys.readouterr().err.count("are held out") == 1  # told once, not for each variant
    for variant in mine.variants:
        config = variant.config()
        (source,), tasks = config.data.sources, config.eval.tasks
        assert source.path == str(tmp_path / "out/data/pictures") and source.split == "train"
        assert {task["kind"] for task in tasks} == {"retrieval", "captioning"}
        assert all(task["data"]["split"] == "test" for task in tasks)
        assert filters.open_source(source).read([0])[0].texts[0].startswith("a shade of number")
    assert mine.variants[1].values["checkpoint.keep"] == 1
    assert running.with_data(found, [], "out", {}) is found
    # Evaluations that the table gives, none of them perhaps, are kept.
    found = table.read(written(tmp_path, TABLE + "eval.tasks = []\n"), {})
    mine = running.with_data(found, [str(tmp_path / "pictures")], str(tmp_path / "out"), {})
    assert [len(variant.config().eval.tasks) for variant in mine.variants] == [2, 0]


def test_the_commit_is_the_package_s_own(tmp_path, monkeypatch):
    root = pathlib.Path(outcome.coca_jax.__file__).parent
    place = tmp_path / "venv/coca_jax/__init__.py"
    place.parent.mkdir(parents=True)
    shutil.copy(root / "__init__.py", place)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / ".gitignore").write_text("venv\n")
    subprocess.run([*git, "add", ".gitignore"], check=True)
    subprocess.run([*git, "commit", "-qm", "host"], check=True)
    monkeypatch.setattr(outcome.coca_jax, "__file__", str(place))
    assert outcome.commit() == ""
    subprocess.run([*git, "add", "-f", str(place)], check=True)
    assert len(outcome.commit()) == 12
