"""A fit from a folder to a caption, its resuming, its recipe, and the mistakes people make."""

import io
import json
import os
import pathlib
import re
import shlex
import shutil

import conversion_cases
import jax
import numpy as np
import pytest
from conftest import flags_of, tiny_config
from PIL import Image, ImageDraw

import coca_jax
from coca_jax.apps import fit as measure
from coca_jax.apps import fit as recipe
from coca_jax.apps import fit as run
from coca_jax.apps import fit_choice
from coca_jax.apps.fit import Kept, Request
from coca_jax.cli import fit
from coca_jax.config import typed
from coca_jax.data import filters, prepare, source_index
from coca_jax.data.sources.items import Item
from coca_jax.inference import export_programs
from coca_jax.interop import export_format
from coca_jax.runtime import lease, out_folder, signals
from coca_jax.training import recipes, train_step, warm_start

COLOURS = {"red": (220, 30, 30), "green": (20, 160, 40), "blue": (30, 40, 200)}
SHAPES = ("circle", "square")


def drawing(seed):
    """A shape on a ground of its own, and what it is: encoded bytes, colour, shape."""
    rng = np.random.default_rng(seed)
    colour, shape = list(COLOURS)[seed % 3], SHAPES[seed // 3 % 2]
    image = Image.new("RGB", (28, 28), tuple(int(x) for x in rng.integers(200, 256, 3)))
    x, y = rng.integers(2, 10, 2).tolist()
    draw = getattr(ImageDraw.Draw(image), "ellipse" if shape == "circle" else "rectangle")
    draw((x, y, x + 15, y + 15), fill=COLOURS[colour])
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue(), colour, shape


def drawn_folder(folder, count, **fields):
    folder.mkdir(parents=True)
    lines = []
    for i in range(count):
        data, colour, shape = drawing(i)
        (folder / f"{i:02d}.png").write_bytes(data)
        row = dict(file_name=f"{i:02d}.png", text=f"a {colour} {shape}", label=colour)
        lines.append(json.dumps({k: fields.get(k, v) for k, v in row.items()}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def few_steps(config):
    """What a user would give as --config.steps=6 --config.batch_size=16 ..."""
    sources = tuple(s.to_dict() | dict(weight=1.0) for s in config.data.sources)
    every = dict(every_steps=3)
    return config.change(
        {
            **dict(steps=6, batch_size=16, text_lengths=(), text_parts=1, log=every),
            **{"optimizer.warmup_steps": 1, "data.sources": sources, "checkpoint": every},
            "model.dtype": "bfloat16",
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = drawn_folder(tmp_path_factory.mktemp("data") / "shapes", 60)
    (path / "cut.png").write_bytes(drawing(0)[0][:60])
    with open(path / "metadata.jsonl", "a") as file:
        file.write(json.dumps(dict(file_name="cut.png", text="a broken one", label="red")) + "\n")
    return path


@pytest.fixture(scope="module")
def fitted(folder, tmp_path_factory):
    """A fit that was stopped after three steps and went on: its workdir, summary and lines, and how
    often a step was traced."""
    workdir, said, traced = str(tmp_path_factory.mktemp("run") / "fit"), [], []
    plain = train_step.value_and_gradients
    request = Request(folder=str(folder), minutes=0.2)
    one = jax.devices()[:1]  # as a user's machine has; programs for eight take longer to compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: one)
        patch.setattr(jax, "local_devices", lambda *_: one)
        patch.setattr(train_step, "value_and_gradients", lambda *of: traced.append(1) or plain(*of))
        time, timed = measure.measure, []
        patch.setattr(measure, "measure", lambda *of, **how: timed.append(how) or time(*of, **how))
        with patch.context() as stopped:
            stopped.setattr(signals.Stop, "reached", lambda self, step: step == 3)
            with pytest.raises(signals.Preempted, match="step 3 is saved"):
                run.fit(request, workdir, change=few_steps, say=said.append)
        first = pathlib.Path(workdir, "recipe.py").read_text()
        said.append("again")
        summary = run.fit(request, workdir, change=lambda config: 1 / 0, say=said.append)
        assert pathlib.Path(workdir, "recipe.py").read_text() == first
        assert timed == [dict(least_seconds=pytest.approx(0.6))]  # once, a twentieth of the time
    return workdir, summary, said, len(traced)


@pytest.fixture
def done(fitted):
    return fitted[:3]


def test_steps_are_timed_for_at_most_four_seconds():
    assert measure.seconds_for(1) == 3 and measure.seconds_for(10) == 4


@pytest.mark.long
def test_a_step_is_traced_once(fitted):
    """By the steps that are timed, which are as of a longer run, and by the run."""
    assert fitted[3] == 1


@pytest.mark.long
def test_a_failed_export_hides_no_scores_and_leaves_the_earlier_one(done, folder, monkeypatch):
    workdir, summary, first = done
    before = sorted(pathlib.Path(workdir, "export").rglob("*"))

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(export_programs, "check", full)
    kept, said = Kept(workdir, Request(folder=str(folder), minutes=0.2)), []
    assert run.finish(workdir, kept, summary, said.append)["export"] is None
    text = "\n".join(said)
    retry = f"retry with `coca-jax export --checkpoint={workdir} --out={workdir}/export`"
    assert f"no space left on device. The run itself is complete; {retry}" in text
    scores = first[next(i for i, line in enumerate(first) if line.startswith("writing the")) + 1 :]
    wanted = [line.replace(f"   export: {workdir}/export", "") for line in scores]
    assert said[-len(wanted) :] == wanted and len(wanted) > 5
    assert sorted(pathlib.Path(workdir, "export").rglob("*")) == before


@pytest.mark.long
def test_a_fit_leaves_a_model_that_captions(done, folder):
    workdir, summary, said = done
    assert set(os.listdir(workdir)) >= {
        *("recipe.py", "report.html", "export", "data", "fit.json", "checkpoints", "eval.json"),
        *("config.json", "metrics.jsonl", "vocabulary.model"),
    }
    assert summary["steps"] == 6 and summary["export"] == f"{workdir}/export"
    scores = json.loads(pathlib.Path(workdir, "eval.json").read_text())
    for name in ("retrieval", "captioning", "zero_shot"):
        assert scores[f"{name}/shapes_test/num_examples"] == 8
    one, picture = jax.devices()[:1], [str(folder / "00.png")]
    places = (workdir, f"{workdir}/export")
    models = [coca_jax.load(place, devices=one, narrow=False) for place in places]
    assert models[0].config.model.dtype == "bfloat16"
    jax.tree.map(np.testing.assert_array_equal, *(model.params for model in models))
    captions, again = (model.caption(picture, max_new_tokens=4) for model in models)
    assert captions == again and len(captions) == 1


@pytest.mark.long
def test_what_is_said(done, folder):
    workdir, _, said = done
    text = "\n".join(said)
    assert "61 pictures" not in text and "60 pictures, 28 x 28 px, drawings or screens" in text
    assert "left out: 1 damaged_image" in text or "left out: 1 unreadable_image" in text
    assert "held out for the scores: 8; to train on: 52" in text
    assert "Few images: 52." in text
    (advice,) = [line for line in said if "--init_from=" in line]
    assert shlex.split(advice)[:2] == ["coca-jax", "fit"] and "coca_ViT-B-32:laion2b" in advice
    choice = said[said.index("the choice:") + 1 : said.index("again")]
    assert len([line for line in choice if line.startswith("  ")]) >= 6
    # few_steps is what the user wants: the reasons are of it, and what it is in place of.
    (line,) = [line for line in choice if line.startswith("  steps: ")]
    steps, passes = re.fullmatch(
        r"  steps: ([\d,]+) of .* s as measured, (.*) passes .*", line
    ).groups()
    assert float(passes) == pytest.approx(int(steps.replace(",", "")) * 16 / 52, rel=0.01)
    assert any(line.startswith("  as you wish: steps 6 in place of ") for line in choice)
    assert any(line.startswith("  as you wish: checkpoint.every_steps 3 in ") for line in choice)
    after = said[said.index("again") + 1 :]
    assert after[0] == f"{workdir}/recipe.py holds the choice that was made before"
    assert any("95% interval" in line and "majority" in line for line in after)
    assert any(line.startswith("Retrieval, shapes_test") for line in after)
    (verdict,) = [line for line in after if line.startswith("The model is ")]
    assert "pretrained weights" in verdict and "52 images are few" in verdict
    assert f"  coca-jax caption --checkpoint={workdir} PICTURE_OR_FOLDER" in after


@pytest.mark.long
def test_held_out_pictures_are_apart(done):
    place = f"{done[0]}/data/shapes"
    train, test = (
        {record.image for record in filters.open_source(dict(path=place, split=split))}
        for split in ("train", "test")
    )
    assert len(train) + len(test) == 60 and not train & test


@pytest.mark.long
def test_the_recipe_is_the_run(done):
    """recipe.py gives the config that trained, and begins from the base alone."""
    workdir = done[0]
    config = typed(recipes.load(f"{workdir}/recipe.py"))
    trained = json.loads(pathlib.Path(workdir, "config.json").read_text())
    chosen = json.loads(json.dumps(config.to_dict(), default=list))
    assert chosen == {key: trained[key] for key in chosen}
    again = pathlib.Path(workdir, "again.py")
    again.write_text(recipe.source(config, 'A "title" \\ of """quotes"""', ["why"]))
    assert typed(recipes.load(str(again))) == config
    again.unlink()


@pytest.mark.long
def test_more_minutes_or_steps_continue_a_fit(done, folder, tmp_path):
    workdir, said = str(tmp_path / "fit"), []
    shutil.copytree(done[0], workdir)
    before = json.loads(pathlib.Path(workdir, "fit.json").read_text())["speed"]
    before |= dict(step=0.9, compile=1e-3)  # 13 steps in 0.2 minutes
    state = Kept(workdir, Request(folder=str(folder), minutes=0.2))
    state.put("speed", before)
    request = Request(folder=str(folder), minutes=0.4)
    for _ in range(2):  # the second time nothing is left to train
        run.fit(request, workdir, change=lambda config: config, dry_run=True, say=said.append)
    assert (
        said.count("trained longer: 26 steps in place of 6, as --minutes=0.4 after 0.2 allows") == 1
    )
    text = pathlib.Path(workdir, "recipe.py").read_text()
    assert f"coca-jax fit {folder} --minutes=0.4`" in text and "config.steps = 26\n" in text
    request = Request(folder=str(folder), minutes=0.4, overrides=("steps=30",))
    few = lambda config: config.change({"steps": 30})  # noqa: E731
    run.fit(request, workdir, change=few, dry_run=True, say=said.append)
    assert typed(recipes.load(f"{workdir}/recipe.py")).steps == 30
    with pytest.raises(ValueError, match="overrides"):
        Kept(workdir, Request(folder=str(folder), minutes=0.4, overrides=("batch_size=8",)))


@pytest.mark.long
def test_a_workdir_belongs_to_one_fit(done, folder, tmp_path):
    workdir = done[0]
    with pytest.raises(ValueError, match="holds a fit of .*shapes, and this one is of /elsewhere"):
        Kept(workdir, Request(folder="/elsewhere"))
    with pytest.raises(ValueError, match=r"asked otherwise \(minutes 0.2 there, 0.1 here\)"):
        Kept(workdir, Request(folder=str(folder), minutes=0.1))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a run that fit did not begin"):
        Kept(str(tmp_path), Request(folder=str(folder)))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        Kept(str(tmp_path / "file" / "run"), Request(folder=str(folder)))


def test_a_mistake_claims_no_workdir(folder, tmp_path):
    """Without captions the fields are named; with the right flag the same workdir goes on."""
    workdir = str(tmp_path / "run")
    other = tmp_path / "described"
    other.mkdir()
    rows = []
    for i in range(30):
        data, colour, shape = drawing(i)
        (other / f"{i}.png").write_bytes(data)
        rows.append(json.dumps(dict(file_name=f"{i}.png", remark=f"a {colour} {shape}")))
    (other / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    with pytest.raises(ValueError, match="its other fields are remark. Name the field"):
        run.fit(Request(folder=str(other)), workdir, say=str)
    assert not os.path.exists(workdir)
    request = Request(folder=str(other), fields={"text_field": "remark"})
    kept = Kept(workdir, request)
    facts, place, _, _ = run.bring_in(request, workdir, kept, str)
    assert (facts.train + facts.test, facts.captions + facts.test_captions) == (30, 30)
    # And what is asked for otherwise, before there is a recipe, is imported anew.
    theirs = pathlib.Path(workdir, "data/thesis.csv")
    theirs.write_text("years of work")
    again = Kept(workdir, Request(folder=str(other), kind="label"))
    assert os.path.exists(place)  # of whoever fits there now: only who holds the workdir may
    again.drop_imported()
    assert not os.path.exists(place) and theirs.read_text() == "years of work"


def test_a_workdir_is_not_the_folder_of_the_data(tmp_path, monkeypatch):
    folder = drawn_folder(tmp_path / "pics", 24)
    before = sorted(os.listdir(folder))
    os.symlink(folder, tmp_path / "link")
    for workdir in (folder, tmp_path / "link"):
        with pytest.raises(ValueError, match=f"--workdir={workdir} is the folder of the data, amo"):
            run.fit(Request(folder=str(folder)), str(workdir), dry_run=True, say=str)
    assert sorted(os.listdir(folder)) == before
    out_folder.check_apart(folder / "runs/mine", str(folder))
    out_folder.check_apart(folder, str(folder / "metadata.jsonl"))


def test_the_recipe_says_the_command_with_its_kind(tmp_path, monkeypatch):
    folder = drawn_folder(tmp_path / "pics", 24)
    monkeypatch.setattr(run, "decide", lambda *_: (typed(recipes.load("tiny")), ("why",)))
    found = run.fit(Request(folder=str(folder), kind="label"), f"{tmp_path}/run", dry_run=True)
    line = f'"""pics_test: the choice of `coca-jax fit {folder}:label --minutes=30`.\n'
    assert pathlib.Path(found["recipe"]).read_text().startswith(line)


def test_data_that_another_command_brought_in_otherwise_name_the_workdir(tmp_path):
    folder = drawn_folder(tmp_path / "pics", 40)
    workdir = str(tmp_path / "run")
    config = typed(recipes.load("tiny")).change({"data.sources": (dict(path=str(folder)),)})
    source_index.of_sources(config, workdir)  # all of it, as a source of a recipe
    line = f"--workdir={workdir}: {workdir}/data/pics already holds a split 'train' made with other"
    with pytest.raises(ValueError, match=f"^{line} options; give another --workdir, or remove "):
        run.fit(Request(folder=str(folder)), workdir, dry_run=True, say=str)
    with pytest.raises(
        ValueError, match="^--workdir=w: d is an .* other options.*--workdir, or re"
    ):
        with prepare.within("--workdir", "w"):
            raise prepare.Otherwise("d", "d is an unfinished import with other options", "give -")


def test_pictures_in_the_workdir_stay(tmp_path, monkeypatch):
    """`fit data/pics --workdir=.`, twice, with other flags."""
    folder = drawn_folder(tmp_path / "data/pics", 24)
    before = sorted(os.listdir(folder))
    monkeypatch.chdir(tmp_path)
    for minutes in (1.0, 2.0):
        with pytest.raises(ValueError, match="--workdir=.: data are brought into its .*pics.* is "):
            run.fit(Request(folder="data/pics", minutes=minutes), ".", dry_run=True, say=str)
    assert sorted(os.listdir(folder)) == before
    (tmp_path / "run/data/pics").mkdir(parents=True)
    (tmp_path / "run/data/pics/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="which holds other files; give another --workdir"):
        run.fit(Request(folder=str(folder)), str(tmp_path / "run"), dry_run=True, say=str)
    assert (tmp_path / "run/data/pics/notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "rows, message",
    [
        (dict(text=None, label="cat"), "all labels are 'cat': with one class"),
        (dict(text=None, label=None), "0 of 24 pictures have a caption and 0 a label"),
        (dict(text="a photo", label=None), "all 24 captions are the same"),
    ],
)
def test_folders_that_cannot_train(tmp_path, rows, message):
    drawn_folder(tmp_path / "data", 24, **rows)
    with pytest.raises(ValueError, match=message):
        run.fit(Request(folder=str(tmp_path / "data")), str(tmp_path / "run"), say=str)


def test_images_outside_the_folder_are_read_where_that_is_allowed(tmp_path):
    """A list with absolute paths: the message names the flag, and with it they are read."""
    pictures, lists = drawn_folder(tmp_path / "pics", 24), tmp_path / "lists"
    lists.mkdir()
    rows = [json.loads(line) for line in open(pictures / "metadata.jsonl")]
    rows = [json.dumps(row | dict(file_name=str(pictures / row["file_name"]))) for row in rows]
    (lists / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    workdir = str(tmp_path / "run")
    with pytest.raises(ValueError, match="24 outside_input; the first: .*pics.*--allow_paths=FOLD"):
        run.fit(Request(folder=str(lists)), workdir, say=str)
    assert not os.path.exists(workdir)
    request = Request(folder=str(lists), allow_paths=(str(pictures),))
    facts, place, names, _ = run.bring_in(request, workdir, Kept(workdir, request), str)
    assert (facts.train, facts.test) == (16, 8)
    record = next(iter(filters.open_source(dict(path=place, split="train"))))
    assert record.image in [drawing(i)[0] for i in range(24)]


def test_any_coca_model_can_be_started_from(tmp_path, monkeypatch):
    """A file as open_clip publishes it, converted into the workdir: the recipe has its image size,
    preprocessing and vocabulary."""
    source = conversion_cases.write_source(tmp_path / "weights", conversion_cases.small_weights())
    folder, workdir = drawn_folder(tmp_path / "pics", 24), str(tmp_path / "run")
    request = Request(folder=str(folder), init_from=str(source), minutes=0.01)
    found = run.fit(request, workdir, dry_run=True, say=str)
    config = typed(recipes.load(found["recipe"]))
    assert config.init_from == f"{workdir}/pretrained"
    assert config.model.image_size == 32 and config.data.resize == "crop"
    assert config.data.vocabulary == f"{workdir}/pretrained/vocabulary.bpe.gz"
    theirs, ours = coca_jax.load(str(source)), coca_jax.load(config.init_from)
    np.testing.assert_array_equal(theirs.encode_text(["a cat"]), ours.encode_text(["a cat"]))
    warm_start.check_model(config)  # its weights fit the model


@pytest.mark.parametrize(
    "init_from, message",
    [
        ("coca_ViT-B-32:laion400m", "coca_ViT-B-32.*laion2b_s13b_b90k"),
        ("coca_ViT-B-32", "coca_ViT-B-32.*laion2b_s13b_b90k"),
        ("nowhere", "nowhere: does not exist. Give a run, an export, .*hf-hub:OWNER/NAME"),
        ("towers", "towers: .* no decoder. Such models can be loaded to encode, .* not fine-tuned"),
    ],
)
def test_weights_that_cannot_be_tuned_are_refused_before_the_data_are_read(
    tmp_path, monkeypatch, init_from, message
):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("words.model").write_bytes(b"words")
    towers = typed(tiny_config(family="clip")).model.to_dict()
    export_format.write_export("towers", {"a": np.zeros(2)}, dict(model=towers), "words.model")
    with pytest.raises(ValueError if init_from != "nowhere" else FileNotFoundError, match=message):
        run.fit(Request(folder="pics", init_from=init_from), "run", say=str)
    assert not os.path.exists("run")


def test_prepared_data_are_split_again(tmp_path):
    """Data that `prepare` wrote as one split are copied with a held-out one; with two, used."""
    drawn_folder(tmp_path / "raw", 40)
    prepare.prepare("imagefolder", str(tmp_path / "raw"), str(tmp_path / "p"), progress=False)
    request = Request(folder=str(tmp_path / "p"))
    workdir = str(tmp_path / "run")
    facts, place, names, _ = run.bring_in(request, workdir, Kept(workdir, request), str)
    assert place == f"{workdir}/data/p" and (facts.train, facts.test) == (32, 8)
    again = Request(folder=place)
    other = str(tmp_path / "other")
    facts, where, names, _ = run.bring_in(again, other, Kept(other, again), str)
    assert where == place and names == ("train", "test") and (facts.train, facts.test) == (32, 8)


def test_pictures_without_a_text_that_trains_are_told_and_not_counted(tmp_path):
    """Six of forty have a caption and no label: too few for captions to train beside labels."""
    folder, said = drawn_folder(tmp_path / "data", 40), []
    rows = [json.loads(line) for line in open(folder / "metadata.jsonl")]
    for i, row in enumerate(rows):
        row.pop("label" if i % 7 == 3 else "text")
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    request, workdir = Request(folder=str(folder)), str(tmp_path / "run")
    facts, place, *_ = run.bring_in(request, workdir, Kept(workdir, request), said.append)
    train = list(filters.open_source(dict(path=place, split="train")))
    labelled = sum(bool(record.labels) for record in train)
    captioned = len(train) - labelled
    assert facts.train == labelled and captioned > 0 and len(train) == 32
    assert said[-3:] == [
        "captions do not train: at most a quarter as many pictures have one as have a label",
        f"{captioned} pictures have no label, and do not train",
        f"held out for the scores: 8; to train on: {labelled}",
    ]


def test_looking_counts_what_is_there():
    items = [Item(str(i), drawing(i)[0], [f"number {i}"], ["a", "b"]) for i in range(10)]
    items += [Item("twin", drawing(0)[0], ["Привет мир"]), Item("html", b"<html>", ["x"])]
    items += [Item("none", problem="missing_image"), Item("bare", drawing(99)[0])]
    scan = fit_choice.Scan(items)
    facts = scan.facts
    assert (facts.train, facts.captions, facts.labels, facts.repeated) == (11, 11, 10, 1)
    assert dict(facts.left_out) == {
        "unreadable_image": 1,
        "missing_image": 1,
        "missing_text": 1,
    }
    assert (facts.width, facts.height, facts.drawn) == (28, 28, True)
    assert set(facts.classes) == {"a", "b"}
    assert facts.words == (2, 2, 2) and len(scan.places) == 11
    rng = np.random.default_rng(0)
    noise = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(noise, "PNG")
    assert not fit_choice.drawn([noise.getvalue()] * 3)
    # A photograph of an object on a white ground is none; a flat drawing on the same ground is.
    for front, drawn in ((rng.integers(60, 200, (40, 40, 3)), False), (90, True)):
        pixels = np.full((64, 64, 3), 255, np.uint8)
        pixels[10:50, 10:50] = front
        on_white = io.BytesIO()
        Image.fromarray(pixels).save(on_white, "PNG")
        assert fit_choice.drawn([on_white.getvalue()] * 3) == drawn


def test_the_command_says_mistakes_in_a_line(commands, tmp_path):
    (tmp_path / "empty").mkdir()
    workdir = f"--workdir={tmp_path / 'run'}"
    for arguments, message in (
        ([str(tmp_path / "empty"), workdir], "the folder is empty; give images, tars, parquet"),
        ([str(tmp_path / "nowhere"), workdir], "nowhere: no such file or folder"),
    ):
        done = commands.run(["fit", *arguments], tmp_path)
        lines = done.stderr.strip().splitlines()
        assert done.returncode == 2 and lines[-1].startswith("error: ") and message in lines[-1]
        assert lines[0].startswith("fitting ") and len(lines) <= 3
    assert not os.path.exists(tmp_path / "run" / "fit.json")


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give one FOLDER of pictures and --workdir=DIR"),
        (
            ["x", "z", "--workdir=y"],
            "fit takes one FOLDER, and 2 were given. Train on several",
        ),
        (["x", "--workdir=y", "--minutes=0"], "--minutes=0: give the minutes of training, above 0"),
        (["x", "--workdir=y", "--config=tiny"], "--config=tiny: fit chooses the recipe"),
        (["x", "--workdir=s3://b/y"], "fit works in a local folder"),
        (["x", "--workdir=y", "--config.batch_sise=8"], "no key 'batch_sise'; did you mean"),
    ],
)
def test_flags_that_cannot_be(commands, arguments, message, tmp_path):
    done = commands.run(["fit", *arguments], tmp_path)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1], done.stderr


def test_a_kind_that_fit_does_not_take_gets_the_kinds_that_it_does(tmp_path, monkeypatch):
    """Of a kind that nothing takes it said those of --data, which was not given."""
    for name in ("define_overrides", "changes"):  # which read the command line of the tests
        monkeypatch.setattr(recipes, name, lambda *_: {})
    flags_of("fit", monkeypatch)
    fit.flags.FLAGS(["fit"])
    for wrong in (":labels", ":question", ":caption:0.5", ":caption:0"):
        with pytest.raises(ValueError) as error:
            fit.request_of_flags(f"{tmp_path}{wrong}")
        takes = "fit takes FOLDER, FOLDER:caption or FOLDER:label"
        assert str(error.value) == f"{tmp_path}{wrong}: {takes}"
    assert fit.request_of_flags(f"{tmp_path}:label").kind == "label"
    assert fit.request_of_flags(str(tmp_path)).folder == str(tmp_path)


def test_a_workdir_in_which_somebody_trains_is_refused_before_anything_is_written(tmp_path):
    folder = drawn_folder(tmp_path / "pictures", 4)
    (tmp_path / "run").mkdir()
    with lease.held(str(tmp_path / "run")):  # that run has not come to its config.json yet
        with pytest.raises(lease.Held, match="run is in use: process"):
            run.fit(Request(str(folder)), str(tmp_path / "run"))
        assert os.listdir(tmp_path / "run") == ["lease.json"]
