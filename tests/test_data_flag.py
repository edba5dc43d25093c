"""The flag --data, and those beside it that name fields of its data."""

import json
import os
import re
import types

import jax
import pytest
from conftest import flags_of
from test_own_data import by_class, captioned, picture, recipe

from coca_jax.checkpoints import config_file
from coca_jax.cli import data_flags, train
from coca_jax.config import typed
from coca_jax.data import filters, prepare, quarantine, source_index
from coca_jax.data.sources.items import Options
from coca_jax.runtime import out_folder, storage
from coca_jax.training import data_flag, setup


@pytest.mark.parametrize(
    "text, path, kind, weight",
    [
        ("data/mine", "data/mine", "", 1.0),
        ("data/mine:label", "data/mine", "label", 1.0),
        ("data/mine:caption:0.5", "data/mine", "caption", 0.5),
        ("s3://bucket/a:b:question:2", "s3://bucket/a:b", "question", 2.0),
        ("s3://bucket/a", "s3://bucket/a", "", 1.0),
        ("tfds:mnist:label", "tfds:mnist", "label", 1.0),
        ("C:/pictures:3", "C:/pictures:3", "", 1.0),
        ("label:label", "label", "label", 1.0),
    ],
)
def test_a_flag_is_read_from_the_right(text, path, kind, weight):
    assert data_flag.parse(text) == data_flag.Named(path, kind, weight)


def test_flags_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="'labels' is none of caption, label, question"):
        data_flag.parse(f"{tmp_path}:labels")
    for weight in ("0", "inf"):
        with pytest.raises(ValueError, match="weight is a share of the batch, above 0 and finite"):
            data_flag.parse(f"x:label:{weight}")
    with pytest.raises(ValueError, match="names no path"):
        data_flag.parse(":label")


def test_places_with_commas_between_them_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "c,d"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="=a,b:label: a .* one place; write --data=a --data=b:la"):
        data_flag.parse("a,b:label")
    urls = [f"file://{tmp_path}/a:label:2", f"file://{tmp_path}/b"]
    with pytest.raises(ValueError, match=f"write --data={urls[0]} --data={urls[1]}$"):
        data_flag.parse(",".join(urls))
    (tmp_path / "c").mkdir()
    (tmp_path / "d").mkdir()
    assert data_flag.parse("c,d:label").path == "c,d"
    assert data_flag.parse("a,x").path == "a,x"  # not there, and told so where it is opened


def test_more_data_than_rows_are_refused_before_any_is_indexed(tmp_path):
    flags = [str(captioned(tmp_path / name, 2)) for name in ("a", "b")]
    why = "2 data sets for a batch of 1 rows, .* give --config.batch_size=2 or more"
    with pytest.raises(ValueError, match=why):
        data_flag.apply(typed(recipe(batch_size=1)), flags, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_few_of_several_data_of_which_none_is_held_out_train_whole(tmp_path, capsys):
    """The run ended at the first of them, behind those that were indexed before it."""
    many = captioned(tmp_path / "many", 60)
    kept = [n for n in range(200) if not quarantine.is_held_out(picture(n), data_flag.HOLDOUT)]
    few = captioned(tmp_path / "few", 1, kept[0])
    given, run = [str(few), str(many)], str(tmp_path / "run")
    for _ in range(2):  # as when the run goes on
        config = data_flag.apply(typed(recipe()), given, run)
        counts = [len(filters.open_source(entry)) for entry in config.data.sources]
        assert counts[0] == 1 and counts[0] + counts[1] < 61
        assert {task["name"] for task in config.eval.tasks} == {"many_test"}
        said = capsys.readouterr().err
        assert "'train' train as captions (1 have one); nothing of it is held out for" in said
    # A kill in the midst of the two splits leaves what a whole one takes the place of.
    work = prepare.unfinished(f"{tmp_path}/again/data/few", "train")
    plan = json.dumps(dict(request=dict(input="x"), state="", groups=[]))
    storage.write_bytes(f"{work}/plan.json", plan.encode())
    data_flag.apply(typed(recipe()), given, str(tmp_path / "again"))
    assert "few: a share of 0.1 of its 1 pictures is none: all train" in (capsys.readouterr().err)
    with pytest.raises(ValueError, match="leaves none of 1 for the split 'test'"):
        data_flag.apply(typed(recipe()), given[:1], str(tmp_path / "alone"))


def test_data_that_lose_more_than_half_of_their_rows_are_refused(tmp_path):
    """59 of 60 images were missing and the run went on with one. The list stays, and the same
    command works once the images are there."""
    folder, run = captioned(tmp_path / "half", 60), tmp_path / "run"
    moved = [name for name in sorted(os.listdir(folder)) if not name.startswith("meta")][:59]
    (tmp_path / "away").mkdir()
    for name in moved:
        os.rename(folder / name, tmp_path / "away" / name)
    listed = f"{run}/data/half-quarantine.jsonl"
    why = f"half: 59 of 60 rows cannot be used .59 missing_image., more than half.* {listed}"
    with pytest.raises(ValueError, match=why):
        data_flag.apply(typed(recipe()), [str(folder)], str(run))
    with open(listed) as file:
        found = [json.loads(line) for line in file]
    assert len(found) == 59 and {one["reason"] for one in found} == {"missing_image"}
    assert not (run / "data/half").exists()
    entry = {"data.sources": (dict(path=str(folder)),)}  # as a recipe names them
    with pytest.raises(ValueError, match="59 of 60 rows cannot be used"):
        source_index.of_sources(typed(recipe()).change(entry), str(tmp_path / "other"))
    for name in moved[30:]:  # half of them is not more than half
        os.rename(tmp_path / "away" / name, folder / name)
    data_flag.apply(typed(recipe()), [str(folder)], str(run))
    assert (run / "data/half").exists()


def words(folder, count):
    """An imagefolder whose captions have an unusual name."""
    captioned(folder, count, words=lambda i: f"words {i}")
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if k != "text"} for line in lines]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(folder)


def texts(entry):
    return {
        record.texts
        for split in ("train", "test")
        for record in filters.open_source(entry.to_dict() | dict(split=split))
    }


def test_flags_beside_it_name_the_fields(tmp_path, capsys):
    folder, workdir = words(tmp_path / "mine", 30), str(tmp_path / "run")
    with pytest.raises(ValueError, match="none of 30 .* name one with --text_field or --label_fi"):
        data_flag.apply(typed(recipe()), [folder], workdir)
    fields = dict(text_field="words", label_field="", image_field="")
    config = data_flag.apply(typed(recipe()), [folder], workdir, fields=fields)
    (entry,) = config.data.sources
    assert (entry.path, entry.kind, entry.text_field) == (f"{workdir}/data/mine", "caption", "")
    assert texts(entry) == {(f"words {i}",) for i in range(30)}
    # The same again; and what is prepared already, of a field that its records still have.
    again = data_flag.apply(typed(recipe()), [folder], workdir, fields=fields)
    assert again.data.sources == config.data.sources
    other = captioned(tmp_path / "other", 30, words=lambda i: f"words {i}")
    out = str(tmp_path / "prepared")
    keywords = dict(progress=False, processes=1)
    prepare.prepare_with_holdout("imagefolder", str(other), out, 0.3, **keywords)
    capsys.readouterr()
    config = data_flag.apply(typed(recipe()), [out], workdir, fields=fields)
    (entry,), (task, *_) = config.data.sources, config.eval.tasks
    assert entry.text_field == task["data"]["text_field"] == "words"
    assert texts(entry) == {(f"words {i}",) for i in range(30)}
    assert "of split 'train' train as captions; " in capsys.readouterr().err
    with pytest.raises(ValueError, match="--image_field=left: the images in .* of another field"):
        data_flag.apply(typed(recipe()), [out], workdir, fields=dict(image_field="left"))


def test_a_field_that_one_of_several_data_has_is_told_how_to_name_it(tmp_path):
    both = [words(tmp_path / "mine", 30), str(captioned(tmp_path / "other", 30))]
    rows = (tmp_path / "other/metadata.jsonl").read_text().replace('"words"', '"more"')
    (tmp_path / "other/metadata.jsonl").write_text(rows)
    says = (
        "other: no field 'words'; it has .*; --text_field=words goes for every --data: for those "
        "that have the field alone .* `coca-jax prepare --text_field=words --input=... --out=DIR`"
    )
    with pytest.raises(ValueError, match=says):
        data_flag.apply(
            typed(recipe()), both, str(tmp_path / "run"), fields=dict(text_field="words")
        )
    out, one = str(tmp_path / "prepared"), Options(text_field="words")
    keywords = dict(progress=False, processes=1, options=one)
    prepare.prepare_with_holdout("imagefolder", both[0], out, 0.3, **keywords)
    config = data_flag.apply(typed(recipe()), [out, both[1]], str(tmp_path / "run"))
    assert [entry.kind for entry in config.data.sources] == ["caption", "caption"]


def test_weights_that_a_batch_cannot_have_and_kinds_that_nothing_has_are_told(tmp_path, capsys):
    named = [str(captioned(tmp_path / name, 30)) for name in ("a", "b")]
    config = typed(recipe(batch_size=8))
    found = data_flag.apply(config, [f"{named[0]}:caption:1000", named[1]], str(tmp_path / "run"))
    assert [entry.weight for entry in found.data.sources] == [7.0, 1.0]
    line = "--data: the weights 1000:1 are 7:1 rows of a batch of 8, as each has one at least; a la"
    assert line in capsys.readouterr().err
    data_flag.apply(config, [f"{named[0]}:caption:2", named[1]], str(tmp_path / "run"))
    assert "rows of a batch" not in capsys.readouterr().err  # 5:3 is near enough
    with pytest.raises(ValueError, match="a:label: none of its 2. examples has a label; leave out"):
        data_flag.apply(config, [f"{named[0]}:label"], str(tmp_path / "run"))


def test_train_has_them(monkeypatch):
    assert {"data", "text_field", "label_field", "image_field"} <= flags_of("train", monkeypatch)
    data_flags.flags.FLAGS(["train", "--text_field=words"])
    assert data_flags.given() == {"--text_field": "words"}  # what processes compare
    fields = data_flags.fields()
    assert fields == dict(text_field="words", label_field="", image_field="")
    with pytest.raises(ValueError, match="--text_field=words is of --data; give --data=PATH"):
        data_flag.of_command(typed(recipe()), [], "w", check=setup.check_devices, fields=fields)


RUNS = {"steps": 4, "epochs": 0, "optimizer.warmup_steps": 0}


def test_a_new_run_s_workdir_is_no_folder_of_pictures(tmp_path):
    (tmp_path / "Cat.JPG").write_bytes(b"")
    says = rf"^--workdir={tmp_path} holds pictures \(Cat.JPG\); give .*, and --data={tmp_path} to"
    with pytest.raises(ValueError, match=says):
        train.refuse_data(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")  # a run has begun there
    train.refuse_data(str(tmp_path))
    train.refuse_data(str(tmp_path / "new"))


def test_a_new_run_s_workdir_is_not_the_folder_of_its_data(tmp_path):
    (tmp_path / "pics").mkdir()
    config = typed(recipe()).change(RUNS)
    config = config.change({"data.sources": (dict(path=str(tmp_path / "pics")),)})
    with pytest.raises(ValueError, match="pics is the folder of the data, among which"):
        setup.check(config, str(tmp_path / "pics"))
    (tmp_path / "pics/config.json").write_text("{}")  # of a run, which goes on
    out_folder.check_apart(tmp_path / "pics", str(tmp_path / "pics"))


def test_what_needs_no_data_is_refused_before_they_are_indexed(tmp_path):
    folder, workdir = words(tmp_path / "mine", 5), str(tmp_path / "run")
    many, batch = 2 * jax.device_count(), 2 * jax.device_count() + 1
    for changes, says in (
        ({"mesh.fsdp": many}, f"fsdp={many}"),
        ({"batch_size": batch}, f"batch_size={batch} is not a multiple of"),
        ({"optimizer.image_learning_rate": 0.0}, "image_learning_rate=0 locks"),
    ):
        config = typed(recipe()).change(RUNS | changes)
        with pytest.raises(ValueError, match=says):
            data_flag.of_command(config, [folder], workdir, check=setup.check_devices)
    assert not (tmp_path / "run").exists()


def test_data_that_were_moved_are_told_by_their_places_and_go_on_by_a_link(tmp_path):
    workdir, old, new = str(tmp_path / "run"), tmp_path / "old", tmp_path / "new"
    old.mkdir()
    begun = typed(recipe()).change({"data.sources": (dict(path=str(old), weight=2.0),)})
    words = types.SimpleNamespace(checksum="")
    config_file.write(config_file.contents(begun, workdir, words), workdir)
    old.rename(new)
    there = begun.change({"data.sources": (dict(path=str(new)),)})
    with pytest.raises(ValueError) as found:
        config_file.check_before_data(there, workdir)
    assert f"(data.sources[0].path: '{old}' there, '{new}' here); use" in str(found.value)
    assert f"if {old} was moved, a link there to where it is now lets the" in str(found.value)
    old.symlink_to(new)
    config_file.check_before_data(begun, workdir)
    with pytest.raises(ValueError, match="or the same config$"):
        config_file.check_before_data(there, workdir)


def test_labels_of_one_class_alone_do_not_train_and_beside_captions_are_not_scored(
    tmp_path, capsys
):
    """`images/` within a folder was its one class: the run trained to its end, and each start
    ended at its scores."""
    one = by_class(tmp_path / "one", 40, ("images",))
    says = f"--data={one}: all labels are 'images': with one class there is nothing to tell apart"
    with pytest.raises(ValueError, match=re.escape(says)):
        data_flag.apply(typed(recipe()), [str(one)], str(tmp_path / "run"))
    other = captioned(tmp_path / "other", 40, label=lambda i: "photo")
    found = data_flag.apply(typed(recipe()), [str(other)], str(tmp_path / "captions"))
    assert [entry.kind for entry in found.data.sources] == ["caption"]
    capsys.readouterr()
    found = data_flag.apply(typed(recipe()), [str(one), str(other)], str(tmp_path / "both"))
    assert [entry.kind for entry in found.data.sources] == ["label", "caption"]
    assert {task["name"] for task in found.eval.tasks} == {"other_test"}
    assert "are held out, and not scored, as all labels are 'images'" in capsys.readouterr().err
    two = by_class(tmp_path / "two", 40, ("cat", "dog"))
    found = data_flag.apply(typed(recipe()), [str(one), str(two)], str(tmp_path / "classes"))
    assert [task["name"] for task in found.eval.tasks] == ["two_test"]
