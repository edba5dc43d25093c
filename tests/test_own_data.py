"""Data named by --data: what a flag says, what a folder is, what is held out, what is evaluated."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from absl import flags
from conftest import flags_of
from PIL import Image

from coca_jax.cli import prepare
from coca_jax.config import typed
from coca_jax.data import evaluation_data, filters, leakage, supervision
from coca_jax.data import prepare as splits
from coca_jax.data.mixture import Mixture
from coca_jax.data.sources import files, formats, registry
from coca_jax.data.sources.items import Options
from coca_jax.evaluation.evaluators import base as declarations
from coca_jax.recipes import base
from coca_jax.training import data_flag


def picture(seed):
    rng = np.random.default_rng(seed)
    out = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def captioned(folder, count, first=0, **fields):
    """An imagefolder of `count` pictures with a caption each."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(first, first + count):
        (folder / f"{i:03d}.png").write_bytes(picture(i))
        row = dict(file_name=f"{i:03d}.png", text=f"picture {i}")
        lines.append(json.dumps(row | {k: v(i) for k, v in fields.items()}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def by_class(folder, count, names=("cat", "train")):
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            (folder / name / f"{i}.png").write_bytes(picture(1000 * number + i))
    return folder


def tar(path, count):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for i in reversed(range(count)):
            for suffix, data in (("png", picture(i)), ("txt", b"picture %d" % i)):
                info = tarfile.TarInfo(f"{i}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return path.parent


def test_the_flag_s_help_names_every_kind(monkeypatch):
    flags_of("train", monkeypatch)
    named = flags.FLAGS["data"].help.split("being ")[1].split(".")[0]
    assert named.replace(" or ", ", ").split(", ") == list(supervision.KINDS)


def test_data_that_cannot_be_reached_or_hold_no_pictures_say_so(tmp_path):
    with pytest.raises(OSError, match="https://nowhere.invalid/a.tar cannot be reached: "):
        formats.guess("https://nowhere.invalid/a.tar")
    table = pa.table({"URL": ["https://nowhere.invalid/1.jpg"], "TEXT": ["one"]})
    pq.write_table(table, tmp_path / "laion.parquet")
    with pytest.raises(ValueError, match="URLs .*'URL'.*img2dataset .*--caption_col=TEXT"):
        splits.prepare("parquet", str(tmp_path), str(tmp_path / "p"), processes=1, progress=False)
    line = r"--out=\S+/absent` \(a recipe's first lines show how\), or name data of your own"
    with pytest.raises(FileNotFoundError, match=line):
        filters.open_source(str(tmp_path / "absent"))


def test_a_folder_tells_its_format_and_splits(tmp_path):
    def told(path):
        return formats.guess(str(path)), splits.splits_of(formats.guess(str(path)), str(path))

    captioned(tmp_path / "a" / "train", 1)
    captioned(tmp_path / "a" / "val", 1)
    assert told(tmp_path / "a") == ("imagefolder", ["train", "val"])
    # 'train' among other classes is a class, and all of them are read.
    by_class(tmp_path / "b", 2)
    assert told(tmp_path / "b") == ("imagefolder", [])
    result = prepare.prepare("imagefolder", str(tmp_path / "b"), str(tmp_path / "pb"))
    assert (result["written"], result["classes"]) == (4, 2)
    # Metadata above folders of such names: one split, and the captions are found.
    by_class(tmp_path / "c", 2, ("train", "test"))
    rows = [dict(file_name=f"{n}/{i}.png", text=n) for n in ("train", "test") for i in range(2)]
    (tmp_path / "c/metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert told(tmp_path / "c") == ("imagefolder", [])
    result = prepare.prepare("imagefolder", str(tmp_path / "c"), str(tmp_path / "pc"))
    assert result["with_text"] == 4
    tar(tmp_path / "d/mine-train-0.tar", 1)
    tar(tmp_path / "d/mine-dev-0.tar", 1)
    (tmp_path / "d/mine-train-0.parquet").write_bytes(b"as img2dataset leaves it")
    assert told(tmp_path / "d") == ("webdataset", ["train", "validation"])
    assert told(tmp_path / "d/mine-dev-0.tar") == ("webdataset", [])
    # A table of something else does not hide the folders of images beside it.
    by_class(tmp_path / "e", 1)
    (tmp_path / "e/sizes.csv").write_text("width,height\n1,2\n")
    assert told(tmp_path / "e") == ("imagefolder", [])
    (tmp_path / "e/list.csv").write_text("filepath,title\ncat/0.png,a cat\n")
    assert told(tmp_path / "e") == ("csv", [])


def test_a_folder_of_nothing_says_what_it_has(tmp_path):
    with pytest.raises(ValueError, match="the folder is empty"):
        formats.guess(str(tmp_path))
    (tmp_path / "a.doc").write_text("x")
    with pytest.raises(ValueError, match=r"no images in it, only 1 other files \(a.doc; "):
        formats.guess(str(tmp_path))
    with pytest.raises(ValueError, match="is one file, and no list or archive"):
        formats.guess(str(tmp_path / "a.doc"))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        formats.guess(str(tmp_path / "absent"))
    assert formats.guess(str(tmp_path / "*.jpg")) == "sidecars"  # which have no text, or one each


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_list_of_urls_is_told_how_to_download_them(tmp_path, kind):
    columns = dict(url=["http://a.example/1.jpg", "https://a.example/2"], alt_text=["x", "y"])
    file = tmp_path / f"d/list.{kind}"
    file.parent.mkdir()
    rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
    if kind == "parquet":
        pq.write_table(pa.table(columns), file)
    elif kind == "csv":
        file.write_text("\n".join([",".join(columns), *(",".join(row.values()) for row in rows)]))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="are URLs") as told:
        data_flag.prepared(str(tmp_path / "d"), str(tmp_path / "out"))
    command = f"img2dataset --url_list={file} --input_format={kind} --url_col=url"
    assert f"pip install img2dataset; {command} --caption_col=alt_text --output" in str(told.value)
    assert not (tmp_path / "out").exists()
    # Those who allow an address have its images read.
    module = registry.find(formats.guess(str(tmp_path / "d")))
    options = Options(image_field="url", allow_paths=("https://a.example", "http://a.example"))
    assert module.plan(str(tmp_path / "d"), "", options)


def test_folders_as_windows_and_spreadsheets_leave_them(tmp_path):
    beside, listed = tmp_path / "beside", tmp_path / "listed"
    for folder in (beside, listed):
        folder.mkdir()
        for i in range(3):
            (folder / f"{i}.PNG").write_bytes(picture(i))
            (folder / f"{i}.TXT").write_text(f"straße {i}", encoding="utf-16")
    (listed / "list.csv").write_text(
        "filepath;text\n" + "".join(f"{i}.PNG;red, {i}\n" for i in "012")
    )
    for folder, format, texts in (
        (beside, "sidecars", {f"straße {i}" for i in range(3)}),
        (listed, "csv", {f"red, {i}" for i in range(3)}),
    ):
        assert formats.guess(str(folder)) == format
        splits.prepare(format, str(folder), str(tmp_path / format), processes=1, progress=False)
        read = filters.open_source(str(tmp_path / format))
        assert {record.texts[0] for record in read} == texts
    with pytest.raises(ValueError, match="--out=.* is --input; give a folder of its own"):
        splits.prepare("csv", str(listed), f"{listed}/.")
    with pytest.raises(ValueError, match="--split=a/b: .* give one without '/'"):
        splits.prepare("csv", str(listed), str(tmp_path / "new"), split="a/b")
    (listed / "list.csv").write_text("picture,words\n" + "".join(f"{i},red\n" for i in "012"))
    with pytest.raises(ValueError, match="give --image_field=NAME, one of picture, words"):
        splits.prepare("csv", str(listed), str(tmp_path / "new"), processes=1, progress=False)


def test_a_list_above_its_pictures_is_read_whatever_its_columns_are_called(tmp_path):
    def brought(**options):
        keywords = dict(options=Options(**options), processes=1, progress=False)
        return splits.prepare_with_holdout(
            "csv", str(tmp_path), str(tmp_path / "p"), 0.3, **keywords
        )

    (tmp_path / "Bilder/2024").mkdir(parents=True)
    rows = ["Nr;Bilddatei;Beschreibung"]
    for i in range(12):
        (tmp_path / f"Bilder/2024/Bild {i}.PNG").write_bytes(picture(i))
        rows.append(f"{i};Bilder/2024/Bild {i}.PNG;rot {i}")
    (tmp_path / "Export.csv").write_text("\ufeff" + "\r\n".join(rows), newline="")
    assert formats.guess(str(tmp_path)) == "csv"  # not one class called 'Bilder, 2024'
    # The cause is named, not the share of the holdout; and nothing is left.
    with pytest.raises(ValueError, match="fields are Beschreibung, Nr: name one with --text_field"):
        brought()
    kept, held = brought(text_field="Beschreibung")
    assert kept["with_text"] + held["with_text"] == 12
    (tmp_path / "Export.csv").write_text("\r\n".join(rows), encoding="utf-16", newline="")
    assert formats.guess(str(tmp_path)) == "csv"
    with pytest.raises(ValueError, match="Export.csv is text in UTF-16; save it in UTF-8"):
        splits.prepare("csv", str(tmp_path), str(tmp_path / "q"), processes=1, progress=False)


def test_lists_of_names_are_text(tmp_path):
    names = tmp_path / "names"
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        names.write_text("Kätzchen\r\nHund\n", encoding=encoding, newline="")
        assert files.read_lines(str(names)) == ["Kätzchen", "Hund"]
    names.write_bytes(b"PK\x05\x06" + bytes(18))
    with pytest.raises(ValueError, match="names: no text, it has zero bytes"):
        files.read_lines(str(names))
    names.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="names: not UTF-8 text"):
        files.read_lines(str(names))


def test_a_holdout_is_a_function_of_the_pictures(tmp_path):
    """The same pictures are held out whatever the format and order, twins on the same side, bad
    ones listed once."""
    folder = captioned(tmp_path / "a", 80)
    for i in range(40):  # the same bytes under other names
        (folder / f"twin{i}.png").write_bytes(picture(i))
    with open(folder / "metadata.jsonl", "a") as file:
        for i in range(40):
            file.write(json.dumps(dict(file_name=f"twin{i}.png", text=f"picture {i}")) + "\n")
        file.write(json.dumps(dict(file_name="missing.png", text="none")) + "\n")
    keywords = dict(progress=False, processes=1)
    out = str(tmp_path / "out")
    rest, held = splits.prepare_with_holdout("imagefolder", str(folder), out, 0.25, **keywords)
    assert rest["written"] + held["written"] == 120 and 15 <= held["written"] <= 45
    assert rest["quarantined"] == {"missing_image": 1} and held["quarantined"] == {}
    assert rest["read"] == held["read"] == 121
    texts = {
        split: [r.texts[0] for r in filters.open_source(out, split)] for split in ("train", "test")
    }
    assert not set(texts["train"]) & set(texts["test"])
    tar(tmp_path / "w/a.tar", 80)
    other = str(tmp_path / "other")
    splits.prepare_with_holdout("webdataset", str(tmp_path / "w"), other, 0.25, **keywords)
    assert {r.texts[0] for r in filters.open_source(other, "test")} == set(texts["test"])
    # The same command again finds it done; another share is another request.
    assert splits.prepare_with_holdout("imagefolder", str(folder), out, 0.25, **keywords)[1] == held
    with pytest.raises(ValueError, match="made with other options"):
        splits.prepare_with_holdout("imagefolder", str(folder), out, 0.5, **keywords)
    few = captioned(tmp_path / "few", 3)
    with pytest.raises(ValueError, match="holdout of 1e-06 leaves none of 3 images for the split"):
        splits.prepare_with_holdout("imagefolder", str(few), str(tmp_path / "f"), 1e-6, **keywords)
    assert not (tmp_path / "f").exists() or not list((tmp_path / "f").iterdir())


def recipe(**changes):
    config = base.get_config()
    config.batch_size = 16
    config.data.sources = (dict(path="data/of_the_recipe"),)
    config.eval.tasks = (dict(kind="retrieval", name="x", data=dict(path="data/of_the_recipe")),)
    config.update(changes)
    return config


def test_named_folders_replace_those_of_the_recipe(tmp_path, capsys):
    captioned(tmp_path / "mine", 60, label=lambda i: f"class {i % 3}")
    by_class(tmp_path / "classes", 30)
    workdir = str(tmp_path / "run")
    flags = [str(tmp_path / "mine"), f"{tmp_path / 'classes'}:label:0.5"]
    config = data_flag.apply(typed(recipe()), flags, workdir)
    mine, classes = f"{workdir}/data/mine", f"{workdir}/data/classes"
    assert [s.to_dict() for s in config.data.sources] == [
        dict(path=mine, split="train", kind="caption", weight=11.0),
        dict(path=classes, split="train", kind="label", weight=5.0),
    ]
    assert Mixture(config).shares == [11, 5]
    assert [(t["kind"], t["data"]["path"], t["data"]["split"]) for t in config.eval.tasks] == [
        ("retrieval", mine, "test"),
        ("captioning", mine, "test"),
        ("zero_shot", classes, "test"),
    ]
    said = capsys.readouterr().err
    assert f"{tmp_path / 'mine'} is read in place, as imagefolder: making an index" in said
    assert f"--data={tmp_path / 'mine'}:label trains on its labels" in said
    # Again, as a run that goes on does: nothing is imported and all is the same.
    again = data_flag.apply(typed(recipe()), flags, workdir)
    assert again.data.sources == config.data.sources and again.eval.tasks == config.eval.tasks
    assert "in place" not in capsys.readouterr().err
    kept = data_flag.apply(typed(recipe()), flags, workdir, keep_tasks=True)
    assert kept.data.sources == config.data.sources
    assert kept.eval.tasks == typed(recipe()).eval.tasks
    # The probe of a guard stays, which tells what the model could do before.
    probe = dict(kind="retrieval", name="past", data=dict(path=str(tmp_path / "classes")))
    guarded = recipe()
    guarded.eval.tasks += (probe, dict(probe, kind="captioning"))
    assert data_flag.apply(typed(guarded), flags, workdir).eval.tasks == config.eval.tasks
    guarded.eval.guard = "stop"
    tasks = data_flag.apply(typed(guarded), flags, workdir).eval.tasks
    assert tasks == (probe, *config.eval.tasks)
    probe["data"]["path"] = "data/past"
    guarded.eval.tasks = (*recipe().eval.tasks, probe)
    assert data_flag.apply(typed(guarded), flags, workdir).eval.tasks == config.eval.tasks
    line = "eval.guard: the recipe's probe retrieval/past is left out, as data/past is not there"
    assert line in capsys.readouterr().err
    # Another folder of the same name does not pass for the first one.
    captioned(tmp_path / "other" / "mine", 60)
    with pytest.raises(ValueError, match="use another --workdir, or give data of another name"):
        data_flag.apply(typed(recipe()), [str(tmp_path / "other" / "mine")], workdir)


def test_evaluations_suit_the_losses_and_the_head(tmp_path):
    place = dict(path="x", split="test")

    def kinds(kind, **changes):
        config = recipe(**changes)
        return [t["kind"] for t in data_flag.evaluations(config, dict(place, kind=kind), "x")]

    only = dict(loss=dict(contrastive_weight=0.0))
    assert kinds("caption") == ["retrieval", "captioning"]
    assert kinds("caption", **only) == ["captioning"]
    assert kinds("label") == ["zero_shot"] and kinds("label", **only) == ["generative"]
    assert kinds("question") == ["answers"]
    assert kinds("label", head=dict(kind="classification")) == ["classification"]


def test_splits_that_are_there_are_used(tmp_path, capsys):
    captioned(tmp_path / "a" / "train", 4)
    captioned(tmp_path / "a" / "validation", 2, 50)
    path = data_flag.prepared(str(tmp_path / "a"), str(tmp_path / "out" / "a"))
    assert data_flag.choose_splits(path) == ("train", "test")
    assert [r.texts[0] for r in filters.open_source(path, "test")] == ["picture 50", "picture 51"]
    captioned(tmp_path / "b", 6, split=lambda i: "test" if i < 2 else "train")
    path = data_flag.prepared(str(tmp_path / "b"), str(tmp_path / "out" / "b"))
    assert [len(filters.open_source(path, split)) for split in ("train", "test")] == [4, 2]
    # A prepared folder stays as it is; where nothing is held out, that is said.
    captioned(tmp_path / "c", 5)
    prepare.prepare("imagefolder", str(tmp_path / "c"), str(tmp_path / "p"), progress=False)
    config = data_flag.apply(typed(recipe()), [str(tmp_path / "p")], str(tmp_path / "run"))
    assert config.eval.tasks == () and config.data.sources[0].split == "train"
    assert "nothing of it is held out for the scores" in capsys.readouterr().err
    # Evaluations that the recipe has on these very data stay.
    task = dict(kind="knn", name="mine", data=dict(path=str(tmp_path / "out" / "a"), split="test"))
    config = typed(recipe(eval=dict(tasks=(task,))))
    config = data_flag.apply(config, [str(tmp_path / "out" / "a")], str(tmp_path / "run"))
    assert [t["kind"] for t in config.eval.tasks] == ["knn"]


def test_the_split_of_an_evaluation_where_none_is_named(tmp_path):
    captioned(tmp_path / "raw", 6)
    out = str(tmp_path / "p")
    prepare.prepare("imagefolder", str(tmp_path / "raw"), out, progress=False)
    assert evaluation_data.choose_split(dict(path=out)) == "train"
    assert evaluation_data.choose_split(dict(path=str(tmp_path / "raw"))) == "test"
    prepare.prepare("imagefolder", str(tmp_path / "raw"), out, split="web", progress=False)
    with pytest.raises(ValueError, match="give --split, one of train, web"):
        evaluation_data.choose_split(dict(path=out))
    prepare.prepare("imagefolder", str(tmp_path / "raw"), out, split="val", progress=False)
    assert evaluation_data.choose_split(dict(path=out)) == "val"
    with pytest.raises(ValueError, match="have no split 'test'; they have train, val, web"):
        declarations.check([dict(kind="retrieval", name="x", data=dict(path=out))])
    config = recipe(data=dict(sources=(dict(path=out, split="train"),)))
    assert leakage.trained_on(typed(config).data.sources, dict(path=f"{out}/../p", split="train"))
    assert not leakage.trained_on(typed(config).data.sources, dict(path=out, split="val"))


def test_tasks_need_captions_or_labels(tmp_path):
    captioned(tmp_path / "texts", 4)
    by_class(tmp_path / "labels", 2)
    texts, labels = (dict(path=str(tmp_path / name)) for name in ("texts", "labels"))
    usual = ("zero_shot", "retrieval", "captioning")
    assert declarations.suited(usual, texts) == ["retrieval", "captioning"]
    assert declarations.suited(usual, labels) == ["zero_shot"]
    with pytest.raises(
        ValueError, match=r"texts \[test\]: no example has a label; give --label_field"
    ):
        evaluation_data.Records(texts, need="label")
    with pytest.raises(ValueError, match="no example has a caption; give --text_field"):
        evaluation_data.Records(labels, need="caption")
    # A run says so before it trains.
    task = dict(kind="zero_shot", name="x", data=texts)
    with pytest.raises(
        ValueError, match=r"zero_shot of x: no .*texts \[test\] has a label.*\(label_f"
    ):
        declarations.check([task])
    declarations.check([dict(task, kind="retrieval"), dict(task, data=dict(labels, kind="label"))])
    # Where some have what is needed, the others are left out and counted.
    mixed = captioned(tmp_path / "mixed", 4, label=lambda i: "even" if i % 2 == 0 else None)
    prepare.prepare("imagefolder", str(mixed), str(tmp_path / "p"), progress=False)
    for path in (str(mixed), str(tmp_path / "p")):
        entry = dict(path=path, split="train")
        found = evaluation_data.Records(entry, need="label")
        assert (len(found), found.left_out) == (2, 2)
        assert len(evaluation_data.Records(entry, need="caption")) == 4
