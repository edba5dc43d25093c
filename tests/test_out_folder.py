"""The place that a command will write to: looked at, and left as it was."""

import json

import jax
import pytest
from conftest import flags_of
from one_device import models_on_one  # noqa: F401
from test_inference import model, no_compile_cache, words  # noqa: F401

import coca_jax
from coca_jax import inference
from coca_jax.cli import export, report
from coca_jax.evaluation.evaluators import results
from coca_jax.inference import export_folder
from coca_jax.interop import export_format
from coca_jax.runtime import out_folder


def test_a_folder_that_was_missing_is_missing_afterwards(tmp_path):
    out_folder.check(tmp_path / "some" / "where")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_was_there_keeps_what_it_holds(tmp_path):
    (tmp_path / "there").mkdir()
    out_folder.check(tmp_path / "there")
    assert list(tmp_path.iterdir()) == [tmp_path / "there"]
    (tmp_path / "there" / "mine.txt").write_text("words")
    out_folder.check(tmp_path / "there")
    assert [file.name for file in (tmp_path / "there").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl"])
def test_a_run_is_no_place_for_a_model(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="is the folder of a run; give another one"):
        out_folder.check(tmp_path)


def test_a_file_in_the_way_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written .*; give another folder"):
        out_folder.check(tmp_path / "file" / "model")


def test_the_name_of_a_file_is_not_written_as_a_folder(tmp_path):
    with pytest.raises(ValueError, match=r"back\.pt is written as a folder; .*: --out=.*back$"):
        out_folder.check(tmp_path / "back.pt")
    (tmp_path / "model.bin").mkdir()
    out_folder.check(tmp_path / "model.bin")
    out_folder.check(tmp_path / "version-0.2")


def test_a_model_is_not_written_among_files_of_something_else(tmp_path):
    """Over an earlier model it is, whole or left by a stop."""
    ours = dict(model={}, preprocess={}, tokenizer={})
    card = "---\nlibrary_name: coca_jax\nlicense: mit\n"
    for number, (files, told) in enumerate((
        ({"a.jpg": "", "b.jpg": ""}, "a.jpg"),
        ({"config.json": '{"port": 80}'}, "config.json"),
        ({"config.json": "{", "params.safetensors": ""}, "config.json"),
        ({"README.md": "# Mine\n"}, "README.md"),
        ({"model.safetensors": ""}, "model.safetensors"),
        ({}, ""),
        ({".gitattributes": "", "params.safetensors": "", "vocabulary.json": ""}, ""),
        ({"README.md": card, "model.safetensors.new": "", "tokenizer.json": ""}, ""),
        ({"config.json": json.dumps(ours), "notes.txt": "of its user"}, ""),
    )):  # fmt: skip
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
        if told:
            with pytest.raises(ValueError) as error:
                out_folder.check_model(folder)
            said = f"--out={folder} holds something else ({told}); give a new folder"
            assert str(error.value) == said
        else:
            out_folder.check_model(folder)
    out_folder.check_model(tmp_path / "new")


def test_a_report_is_written_over_a_report_alone(tmp_path, monkeypatch):
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, other):
        folder.mkdir()
        results.save_results(folder, {"zero_shot/data/accuracy": 0.5})
    flags_of("report", monkeypatch)
    monkeypatch.chdir(tmp_path)

    def call(*folders, out=""):
        report.flags.FLAGS.unparse_flags()
        report.flags.FLAGS(["report", f"--out={out}"])
        return report.main(["report", *map(str, folders)])["report"]

    page = b"<!doctype html>\n<title>mine</title>\n"
    for name, says in (
        ("my.py", "--out=my.py: .*my.html.$"),
        ("my", "--out=my: .*my.html.$"),
        ("mine.html", "--out=mine.html: the file exists"),
    ):
        (tmp_path / name).write_bytes(page)
        with pytest.raises(ValueError, match=says):
            call(run, out=name)
        assert (tmp_path / name).read_bytes() == page
    (tmp_path / "comparison.html").write_bytes(page)  # the name that it takes by itself
    with pytest.raises(ValueError, match="--out=comparison.html: the file exists"):
        call(run, other)
    (tmp_path / "folder.html").mkdir()
    with pytest.raises(ValueError, match="this is a folder.*--out=folder.html/report.html"):
        call(run, out="folder.html")
    (tmp_path / "empty.html").touch()
    for out in ("new/a.html", "empty.html"):
        for folders in ((run,), (run, other), (run,)):  # over what it wrote before
            assert call(*folders, out=out) == str(tmp_path / out)
    old = "<!doctype html>\n<head>\n<title>a &amp; b \u00b7 coca_jax</title>\n"
    (tmp_path / "old.html").write_text(old, "utf-8")
    call(run, out="old.html")
    assert len((tmp_path / "old.html").read_bytes()) > 1000


def exports(**given):
    """The command, in this process, behind `flags_of`."""
    export.flags.FLAGS(["export", *(f"--{name}={value}" for name, value in given.items())])
    return export.main(["export"])


def test_an_export_is_not_written_over_with_other_weights(model, tmp_path, monkeypatch):  # noqa: F811
    """Its scores would be taken for those of the new ones."""
    params = jax.tree.map(lambda x: x, model.params)
    params["text_to_joint"]["kernel"] = params["text_to_joint"]["kernel"].at[0, 0].add(1e-3)
    other = inference.CoCaModel(model.config, params, model.vocabulary)
    for name, one in (("first", model), ("second", other)):
        export_folder.write(one, str(tmp_path / name))
    out = tmp_path / "out"
    flags_of("export", monkeypatch)
    exports(checkpoint=tmp_path / "first", out=out, format="hub")
    (out / "eval.json").write_text('{"zero_shot/birds/top1": 0.8125}')
    before = {path: path.read_bytes() for path in out.iterdir()}
    for kind in ("folder", "hub"):
        with pytest.raises(FileExistsError) as error:
            exports(checkpoint=tmp_path / "second", out=out, format=kind)
        assert str(error.value) == (
            f"--out={out} holds a model with other weights (model.safetensors); give another "
            "--out, or remove that folder"
        )
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    exports(checkpoint=tmp_path / "first", out=out, format="hub")
    assert coca_jax.load(str(out)).checksum() == model.checksum()
    export_format.refuse_other(tmp_path, other.params)  # no export is there
    fewer = {name: x for name, x in model.params.items() if name != "text_to_joint"}
    with pytest.raises(FileExistsError, match="other weights"):
        export_format.refuse_other(out, fewer)
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])  # cut short: `load` says to write it again
    exports(checkpoint=tmp_path / "first", out=out, format="hub")
    assert coca_jax.load(str(out)).checksum() == model.checksum()
