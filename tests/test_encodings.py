"""Lists that spreadsheets wrote in another encoding than UTF-8: a line says so, with the remedy."""

import re

import pytest
from prepare_cases import encode, import_data, reasons_of

from coca_jax.data import prepare
from coca_jax.data.sources.items import Options


def table(folder, names, text="Hund {}", encoding="cp1252", name="list.csv"):
    folder.mkdir()
    for i, one in enumerate(names):
        (folder / one).write_bytes(encode(i))
    rows = "".join(f"{one},{text.format(i)}\r\n" for i, one in enumerate(names))
    (folder / name).write_bytes(f"file_name,text\r\n{rows}".encode(encoding))
    return folder / name


def remedy(path, line):
    return f"{path}: line {line} is not UTF-8; save it in UTF-8 (iconv -f CP1252 -t UTF-8"


@pytest.mark.parametrize("name", ["list.csv", "metadata.csv"])
def test_a_table_whose_texts_are_not_utf8_is_named_with_its_first_such_line(tmp_path, capsys, name):
    path = table(tmp_path / "a", [f"{i}.jpg" for i in range(4)], name=name)
    path.write_bytes(path.read_bytes().replace(b"Hund 2", "Hündchen".encode("cp1252")))
    format, input = ("csv", path) if name == "list.csv" else ("imagefolder", path.parent)
    assert import_data(format, input, tmp_path / "out")["written"] == 3
    assert reasons_of(tmp_path / "out") == {"2.jpg": "bad_utf8"}
    assert capsys.readouterr().err.count(remedy(path, 4)) == 1
    path.write_bytes(path.read_bytes().decode("cp1252").encode())
    assert import_data(format, input, tmp_path / "good")["written"] == 4
    assert "UTF-8" not in capsys.readouterr().err


def test_names_of_pictures_that_are_not_utf8_are_told_where_none_is_found(tmp_path):
    path = table(tmp_path / "a", [f"über {i}.jpg" for i in range(30)])
    with pytest.raises(ValueError, match=r"'missing_image': 30.*" + re.escape(remedy(path, 2))):
        import_data("csv", path, tmp_path / "out")
    with pytest.raises(ValueError, match=r"'missing_image': 30.*" + re.escape(remedy(path, 2))):
        where = ("csv", str(path), str(tmp_path / "held"), 0.5)
        prepare.prepare_with_holdout(*where, options=Options(), processes=1, progress=False)


def test_lines_of_json_that_are_not_utf8_are_named(tmp_path, capsys):
    lines = ['{"file_name": "0.jpg", "text": "Hund"}', '{"file_name": "0.jpg", "text": "Hündin"}']
    (tmp_path / "0.jpg").write_bytes(encode(0))
    (tmp_path / "list.jsonl").write_bytes("\n".join(lines).encode("cp1252"))
    assert import_data("jsonl", tmp_path / "list.jsonl", tmp_path / "out")["written"] == 1
    assert remedy(tmp_path / "list.jsonl", 2) in capsys.readouterr().err
