"""An index of pictures that change, go, get readable, or are named in other ways."""

import json
import os
import pathlib

import numpy as np
import pytest
from conftest import flags_of
from test_inference import images, model, no_compile_cache, words  # noqa: F401
from test_search import embed, encoded, tree

import coca_jax
from coca_jax.apps.search import index, nearest, parts
from coca_jax.cli import search
from coca_jax.inference import loading
from coca_jax.runtime import json_files, lease, progress, storage


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Six pictures of noise, one file that is none; the current folder is the one above."""
    (tmp_path / "s").mkdir()
    for number in range(6):
        (tmp_path / f"s/{number}.png").write_bytes(encoded(number))
    (tmp_path / "s/broken.png").write_bytes(b"no picture")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "s"


def again(model, input, out="i", **how):  # noqa: F811
    """As `search index` does it: the numbers of new, changed, gone, skipped, and of all."""
    there = parts.Parts(out)
    gone = index.gone([input], there)
    told = embed(model, input, out, gone=gone, **how)
    return tuple(told[name] for name in ("new", "changed", "gone", "skipped", "pictures"))


def rows(model, out="i"):  # noqa: F811
    """Names of an index, each checked against what its file embeds to now."""
    found = index.Index(out)
    wanted = model.encode_image(found.names)
    np.testing.assert_allclose(found.embeddings.astype(np.float32), wanted, atol=1e-3)
    return found.names


def listed(number: int) -> list[str]:
    """Names in a metadata file of the index i."""
    _, *rows = pathlib.Path(f"i/metadata/metadata_{number}.jsonl").read_text().splitlines()
    return [json.loads(row)["image_path"] for row in rows]


def test_what_could_not_be_read_is_tried_again_and_counted(model, folder):  # noqa: F811
    assert again(model, "s") == (6, 0, 0, 1, 6)
    before, said = tree("i"), []
    assert again(model, "s", say=said.append) == (0, 0, 0, 1, 6)
    assert len(said) == 1 and "broken.png" in said[0] and tree("i") == before
    (folder / "broken.png").write_bytes(encoded(50))
    assert again(model, "s") == (1, 0, 0, 0, 7)
    assert rows(model)[-1] == "s/broken.png" and not parts.Parts("i").skipped


def test_a_changed_picture_is_embedded_anew_and_one_that_is_gone_is_not_found(model, folder):  # noqa: F811
    again(model, "s")
    (folder / "2.png").write_bytes(encoded(70))
    (folder / "4.png").unlink()
    assert again(model, "s") == (0, 1, 1, 1, 5)
    assert sorted(rows(model)) == [f"s/{n}.png" for n in (0, 1, 2, 3, 5)]
    assert again(model, "s") == (0, 0, 0, 1, 5)
    (folder / "4.png").write_bytes(encoded(4))  # there again
    (folder / "0.png").write_bytes(b"no picture any more")
    assert again(model, "s") == (1, 0, 0, 2, 5)  # skipped, and not embedded anew
    assert sorted(rows(model)) == [f"s/{n}.png" for n in (1, 2, 3, 4, 5)]
    assert again(model, "s/1.png") == (0, 0, 0, 0, 5)  # the others are not asked for
    for number in range(6):
        assert len(np.load(f"i/img_emb/img_emb_{number}.npy")) == len(listed(number))


def test_an_index_is_searched_while_it_grows_beyond_its_graph(model, folder, monkeypatch):  # noqa: F811
    pytest.importorskip("usearch", reason="needs the extra 'search'")
    monkeypatch.setattr(nearest, "EXACT_BELOW", 5)
    again(model, "s")
    assert index.finish(parts.Parts("i")) == "graph"
    (folder / "new.png").write_bytes(encoded(99))
    assert again(model, "s")[0] == 1  # and the graph is not built yet: it was stopped there
    found = index.Index("i")
    assert isinstance(found.nearest, nearest.Graph)
    for name in ("new.png", "2.png"):
        (first, *_) = found.search(found.query(model, images=[f"s/{name}"]), 3)
        assert first["image"] == f"s/{name}" and first["score"] > 0.999


def test_an_index_that_gets_small_is_searched_without_its_graph(model, folder, monkeypatch):  # noqa: F811
    pytest.importorskip("usearch", reason="needs the extra 'search'")
    monkeypatch.setattr(nearest, "EXACT_BELOW", 5)
    again(model, "s")
    assert index.finish(parts.Parts("i")) == "graph"
    assert isinstance(index.Index("i").nearest, nearest.Graph)
    for number in (0, 3):
        (folder / f"{number}.png").unlink()
    assert again(model, "s") == (0, 0, 2, 1, 4)
    assert index.finish(parts.Parts("i")) == "exact"
    found = index.Index("i")
    assert isinstance(found.nearest, nearest.Exact) and len(found.names) == 4


def test_a_row_is_that_of_the_files_and_stays_its_picture_s(model, folder):  # noqa: F811
    again(model, "s")
    (folder / "2.png").write_bytes(encoded(70))
    (folder / "4.png").unlink()
    again(model, "s")
    found = index.Index("i")
    assert found.rows.tolist() == [0, 1, 3, 5, 6]
    arrays = sorted(pathlib.Path("i/img_emb").iterdir())
    names = [name for number in range(len(arrays)) for name in listed(number)]
    stored = np.concatenate([np.load(path) for path in arrays])
    for one in found.search(model.encode_image(["s/2.png"])[0], 5):
        place = found.place(one["row"])
        assert names[one["row"]] == one["image"] == found.names[place]
        np.testing.assert_array_equal(stored[one["row"]], found.embeddings[place])
    assert found.search(model.encode_image(["s/2.png"])[0], 1)[0]["row"] == 6
    for row in (2, 4, 7, -1):
        with pytest.raises(ValueError, match=f"row {row}: the index has no such picture, or it"):
            found.place(row)


def test_two_spellings_of_a_folder_are_one(model, folder, monkeypatch):  # noqa: F811
    again(model, "s")
    before = tree("i")
    for spelling in ("./s", "s/../s", str(folder), f"{folder}/"):
        assert again(model, spelling) == (0, 0, 0, 1, 6), spelling
    assert [name for name in tree("i") if name not in before] == []
    monkeypatch.chdir(folder)  # relative names begin where the index was made
    assert again(model, ".", "../i") == (0, 0, 0, 1, 6)
    (folder / "new.png").write_bytes(encoded(71))
    assert again(model, ".", "../i") == (1, 0, 0, 1, 7)
    assert index.Index("../i").names[-1] == str(folder / "new.png")


def test_the_file_of_a_row_lies_below_where_the_index_was_made(model, folder, monkeypatch):  # noqa: F811
    again(model, "s")
    found = index.Index("i")
    row = found.names.index("s/3.png")
    other = folder / "elsewhere/s/3.png"
    other.parent.mkdir(parents=True)
    other.write_bytes(encoded(3))
    monkeypatch.chdir(other.parent.parent)  # which has a file of this name too
    before = os.stat(folder / "3.png")
    wanted = str(folder / "3.png"), (before.st_size, before.st_mtime_ns)
    assert index.Index(str(folder.parent / "i")).file(row) == wanted
    (folder / "3.png").write_bytes(encoded(80))
    with pytest.raises(ValueError, match="s/3.png is gone or changed; run the same"):
        found.file(row)
    (folder / "3.png").unlink()
    with pytest.raises(ValueError, match="s/3.png is gone or changed"):
        found.file(row)
    (folder / "2.png").unlink()
    monkeypatch.chdir(folder.parent)
    again(model, "s")  # rows behind those that are dropped
    found = index.Index("i")
    for row, name in enumerate(found.names):
        assert found.file(row)[0] == str(folder.parent / name)


def captions(out="i"):
    found = index.Index(out)
    return {os.path.basename(name): text for name, text in zip(found.names, found.captions)}


def write_metadata(folder, texts):
    lines = [json.dumps(dict(file_name=name, text=text)) for name, text in texts.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("spelling", ["s", "s/", "./s", "../{}/s", "link", "{0}/s", "file://{0}/s"])
def test_captions_are_found_however_the_folder_is_spelled(model, folder, spelling):  # noqa: F811
    """Of metadata and, without them, of class folders."""
    if "../" in spelling:
        spelling = spelling.format(folder.parent.name)
    elif spelling == "link":
        os.symlink("s", "link")
    spelling = storage.plain_path(spelling.format(folder.parent))  # as the command takes it
    texts = {f"{number}.png": f"picture {number}" for number in range(6)}
    write_metadata(folder, {f"./{name}": text for name, text in texts.items()})
    embed(model, spelling, "i")
    assert captions() == texts
    (folder / "metadata.jsonl").unlink()
    (folder / "dogs").mkdir()
    (folder / "dogs/0.png").write_bytes(encoded(80))
    embed(model, spelling, "classes")
    assert captions("classes")["0.png"] == "dogs"


def test_a_caption_that_was_corrected_is_a_change(model, folder):  # noqa: F811
    texts = {f"{number}.png": f"picture {number}" for number in range(6)}
    write_metadata(folder, texts | {"5.png": ""})
    assert again(model, "s") == (6, 0, 0, 1, 6)
    write_metadata(folder, texts | {"3.png": "a red circle"})
    assert again(model, "s/3.png") == (0, 0, 0, 0, 6)  # named alone: nothing is said of it
    assert again(model, "s") == (0, 2, 0, 1, 6)
    assert captions() == texts | {"3.png": "a red circle"} and len(rows(model)) == 6
    assert again(model, "s") == (0, 0, 0, 1, 6)
    (folder / "metadata.jsonl").unlink()
    assert again(model, "s") == (0, 0, 0, 1, 6)


def test_captions_lie_in_files_beside_pictures(model, folder):  # noqa: F811
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"picture {number}\nsaid again\n")
    (folder / "0.txt").write_bytes(b"\xff no UTF-8")
    (folder / "4.json").write_text('{"caption": "of JSON"}')
    told = {f"{number}.png": f"picture {number}" for number in range(1, 4)}
    told |= {"0.png": "", "4.png": "of JSON", "5.png": ""}
    assert again(model, "./s") == (6, 0, 0, 1, 6) and captions() == told
    (folder / "2.txt").write_text("said better")
    assert again(model, "s") == (0, 1, 0, 1, 6) and captions() == told | {"2.png": "said better"}
    assert again(model, str(folder)) == (0, 0, 0, 1, 6)


def test_two_spellings_of_a_tar_are_one(model, folder):  # noqa: F811
    import tarfile

    with tarfile.open("t.tar", "w") as tar:
        tar.add(folder / "0.png", "0.png")
        tar.add(folder / "1.png", "1.png")
    assert embed(model, "t.tar", "i")["pictures"] == 2
    assert embed(model, "./t.tar", "i")["pictures"] == 2
    assert embed(model, os.path.abspath("t.tar"), "i")["new"] == 0


def test_what_was_staged_in_part_is_counted_and_found_once(model, folder):  # noqa: F811
    class Killed(Exception):
        pass

    def killed(done):
        if done:
            raise Killed

    there = parts.Parts("i")
    (group,) = index.groups(["s"], there)
    with pytest.raises(Killed):
        index.Work(lambda: model, "i", {}, "here", 4, 3)(group, killed)
    assert again(model, "s", part=8) == (6, 0, 0, 1, 6)
    assert sorted(rows(model)) == [f"s/{number}.png" for number in range(6)]


def test_parts_that_drop_what_is_no_row_are_damaged(model, folder):  # noqa: F811
    again(model, "s")
    path = pathlib.Path("i/metadata/metadata_0.jsonl")
    header, *lines = path.read_text().splitlines()
    for row in ("a", 0, -1, True):  # of the first part there is none before
        told = json_files.seal(json_files.unseal(json.loads(header), "") | dict(dropped=[row]))
        path.write_text("\n".join([json.dumps(told), *lines, ""]))
        with pytest.raises(ValueError, match="metadata_0.jsonl is damaged"):
            parts.Parts("i")


@pytest.fixture
def call(model, monkeypatch, capsys):  # noqa: F811
    """The command in this process, with a model that is there already."""
    flags_of("search", monkeypatch)
    monkeypatch.setattr(coca_jax, "load", lambda place, **how: model)

    def run(*asked, **given):
        search.flags.FLAGS.unparse_flags()
        search.flags.FLAGS(["search", *(f"--{name}={value}" for name, value in given.items())])
        return search.main(["search", *asked])

    return run


def test_two_runs_into_one_index_are_not_at_once(call, folder):
    given = dict(checkpoint="here", out="i")
    done = call("index", "s", **given)
    counts = dict(new=6, changed=0, gone=0, skipped=1, pictures=6)
    assert {key: done[key] for key in counts} == counts and "lease.json" not in os.listdir("i")
    for out in ("i", "new"):
        with lease.alone(out, use="indexes into it", flag="--out"):
            with pytest.raises(lease.Held, match="is in use: .* indexes into it .*a new --out"):
                call("index", "s", **given | dict(out=out))
    assert call("index", "s", **given)["pictures"] == 6
    assert not os.path.exists("new")


def test_a_log_file_of_a_long_index_says_how_far_it_is(call, folder, capsys, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    call("index", "s", checkpoint="here", out="i", batch_size=4)
    said = capsys.readouterr().err
    assert "7 of 7 pictures in 00:" in said and "\r" not in said


def test_a_query_says_where_the_index_looks_for_its_model(call, folder, monkeypatch):
    call("index", "s", checkpoint="c/hub", out="i")
    monkeypatch.setattr(coca_jax, "load", loading.load)
    monkeypatch.chdir("s")
    with pytest.raises(FileNotFoundError) as told:
        call("query", "red", index="../i", checkpoint="")
    assert str(told.value) == (
        f"c/hub does not exist: --index=../i, made in {folder.parent}, names that model; "
        "--checkpoint= gives the place where it is now"
    )
    with pytest.raises(FileNotFoundError, match="none does not exist; give a run"):
        call("query", "red", index="../i", checkpoint="none")


def test_the_model_of_an_index_is_found_from_another_folder(model, folder, monkeypatch):  # noqa: F811
    (folder.parent / "weights").mkdir()
    embed(model, "s", "i", checkpoint="weights")
    assert index.Index("i").checkpoint == parts.Parts("i").checkpoint == "weights"
    monkeypatch.chdir("s")
    assert index.Index("../i").checkpoint == str(folder.parent / "weights")
    os.mkdir("weights")  # what is here comes first
    assert index.Index("../i").checkpoint == "weights"


@pytest.mark.parametrize("left", [(), ("0.txt",), ("metadata.jsonl",)])
def test_of_a_folder_that_was_emptied_nothing_is_found(call, folder, capsys, left):
    if "metadata.jsonl" in left:
        write_metadata(folder, {"0.png": "a red circle"})
    given = dict(checkpoint="here", out="i")
    assert call("index", "s", **given)["pictures"] == 6
    for path in folder.glob("*.png"):
        path.unlink()
    for name in left:
        (folder / name).touch()
    (folder.parent / "t").mkdir()
    done = call("index", "s", **given)
    assert [done[key] for key in ("new", "gone", "skipped", "pictures")] == [0, 6, 0, 0]
    assert "s: no picture is left in it" in capsys.readouterr().err or "metadata.jsonl" in left
    assert call("query", "red", index="i")["found"] == 0
    for empty in ("s", "t"):  # of which the index holds nothing
        with pytest.raises(ValueError, match="the folder is empty|no image"):
            call("index", empty, **given)


def test_an_index_names_the_model_that_it_is_added_to_with(call, folder, model, monkeypatch):  # noqa: F811
    call("index", "s", checkpoint="c/hub", out="i")
    (folder / "new.png").write_bytes(encoded(71))
    asked = []
    monkeypatch.setattr(coca_jax, "load", lambda place, **how: asked.append(place) or model)
    assert call("index", "s", out="i")["new"] == 1 and asked == ["c/hub"]
    monkeypatch.setattr(coca_jax, "load", loading.load)
    said = f"c/hub does not exist: --out=i, made in {folder.parent}, names that model; --checkpoint"
    with pytest.raises(FileNotFoundError, match=said):
        call("index", "s", out="i")
    with pytest.raises(ValueError, match="--checkpoint is missing"):
        call("index", "s", out="another")


@pytest.mark.parametrize(
    "command, flag, value, of",
    [
        ("index", "k", 3, "query"),
        ("query", "threshold", 0.9, "duplicates"),
        ("duplicates", "out", "o", "index"),
        ("duplicates", "dtype", "float32", "index, query, clusters"),
    ],
)
def test_a_flag_of_another_command_is_refused(call, folder, command, flag, value, of):
    said = f"search {command}: --{flag} is a flag of {of}$"
    with pytest.raises(ValueError, match=said):
        call(command, "s", **{flag: value})


def test_a_text_that_is_the_name_of_a_folder_is_told(call, folder, capsys):
    call("index", "s", checkpoint="here", out="i")
    capsys.readouterr()
    assert call("query", "s", index="i")["texts"] == ["s"]
    assert "s: taken as a text; to look for the pictures of that folder" in capsys.readouterr().err
