"""The folder that a command will write to: looked at, and left as it was."""

import json

import pytest

from coca_jax import out_folder


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
    model = dict(model={}, preprocess={}, tokenizer={})
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
        ({"config.json": json.dumps(model), "notes.txt": "of its user"}, ""),
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
