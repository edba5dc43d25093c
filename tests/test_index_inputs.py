"""What `search index` makes of its inputs: an index among them, links, texts, paths elsewhere."""

import gc
import pathlib
import shutil
import time
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_index_changes import again, call, captions, folder  # noqa: F401
from test_inference import images, model, no_compile_cache, words  # noqa: F401
from test_search import tree

from coca_jax.apps.search import index, nearest, parts
from coca_jax.data.sources import files, formats
from coca_jax.runtime import storage
from coca_jax.runtime.workers import Engine


def test_an_index_in_the_indexed_folder_is_no_part_of_it(model, folder):  # noqa: F811
    assert again(model, "s", "s/i") == (6, 0, 0, 1, 6)
    assert formats.guess("s") == "imagefolder" and formats.beside("s") == []
    assert again(model, "s", "s/i") == (0, 0, 0, 1, 6)
    how = dict(checkpoint="here", batch_size=4, part=4)
    there = parts.Parts("s/j")
    index.stage(lambda: model, index.groups(["s"], there), there, Engine(share="0/1"), **how)
    assert formats.guess("s") == "imagefolder"  # a job's share, which is not joined yet
    pq.write_table(pa.table(dict(image=[b""], text=["x"])), "s/data.parquet")
    assert files.find("s", ("*.parquet",)) == [str(folder / "data.parquet")]


def test_an_index_asks_once_what_others_have_staged(model, folder, monkeypatch):  # noqa: F811
    """A bucket takes tens of milliseconds to say so of each of ten thousand groups."""
    how = dict(checkpoint="here", batch_size=4, part=2)
    there = parts.Parts("i")
    found = index.groups(["s"], there, 2)
    assert len(found) == 4  # of 7 files
    index.stage(lambda: model, found, there, Engine(share="1/4"), **how)
    asked, exists = [], files.exists

    def counted(path):
        asked.append("staged" in path)
        return exists(path)

    monkeypatch.setattr(files, "exists", counted)
    kept = storage.remove
    monkeypatch.setattr(storage, "remove", lambda path: asked.append(True) or kept(path))
    done = index.add(model, found, there, **how)
    assert done["pictures"] == 6 and sum(asked) == 2  # of the one that is, and to remove it
    assert index.staged_names("i") == set() and index.staged_names("none") == set()


def test_an_opened_index_holds_its_texts_once(tmp_path):
    """A server's tables of ten million names and captions were a gigabyte beside the lists."""
    there = parts.Parts(str(tmp_path / "i"))
    there.begin(dict(version=1, model="0", checkpoint="x", width=2, dtype="float32"))
    rows = [parts.Row(f"{number}.png", f"{number} " * 250) for number in range(1000)]
    there.write("", np.zeros((1000, 2), np.float32), rows, {}, True)
    del there
    gc.collect()
    before = pa.total_allocated_bytes()
    found = index.Index(str(tmp_path / "i"))
    gc.collect()
    assert len(found.captions[999]) == 1000
    end = time.monotonic() + 30  # a reading thread of Arrow may hold them some milliseconds more
    while pa.total_allocated_bytes() - before > 100_000 and time.monotonic() < end:
        time.sleep(0.01)
    assert pa.total_allocated_bytes() - before < 100_000  # the captions are a million


def test_files_of_an_index_are_gone_through_once_for_all_that_was_dropped(tmp_path, monkeypatch):
    """A part that drops some is of each run that found changes: of ten million files a thousand
    such runs made the next one begin minutes later."""
    there = parts.Parts(str(tmp_path / "i"))
    there.begin(dict(version=1, model="0", checkpoint="x", width=2, dtype="float32"))

    def write(*numbers):
        rows = [parts.Row(f"/s/{n}.png", "", (1, n)) for n in numbers]
        there.write("", np.zeros((len(rows), 2)), rows, {}, True)

    write(*range(6))
    for number in range(4):
        write(number)  # has changed
        there.drop([])
    there.drop([4])  # is gone
    forgotten, forget = [], parts._forget
    monkeypatch.setattr(parts, "_forget", lambda *of: forgotten.append(of[1]) or forget(*of))
    again = parts.Parts(str(tmp_path / "i"))
    rows = {name: known.row for name, known in again.files.items()}
    assert rows == {"/s/5.png": 5} | {f"/s/{n}.png": 6 + n for n in range(4)}
    assert forgotten == [{0, 1, 2, 3, 4}] and again.files == there.files


def test_a_text_beside_one_picture_of_many_is_its_caption(model, folder):  # noqa: F811
    (folder / "1.txt").write_text("a red kite\nanother line\n")
    (folder / "2.txt").write_text("not this one")
    (folder / "metadata.csv").write_text("file_name,text\n2.png,a green kite\n")
    assert again(model, "s") == (6, 0, 0, 1, 6)
    told = {f"{n}.png": "" for n in range(6)} | {"1.png": "a red kite", "2.png": "a green kite"}
    assert captions() == told
    (folder / "metadata.csv").unlink()
    assert again(model, "s") == (0, 1, 0, 1, 6) and captions()["2.png"] == "not this one"
    (folder / "below").mkdir()
    (folder / "3.png").rename(folder / "below/3.png")
    (folder / "4.png").rename(folder / "below/4.png")
    (folder / "below/4.txt").write_text("a blue kite")
    again(model, "s")
    assert (captions()["3.png"], captions()["4.png"]) == ("below", "a blue kite")
    for name in ("1.txt", "2.txt"):  # most pictures have none again
        (folder / name).unlink()
    again(model, "s")
    (folder / "below/3.json").write_text('{"label": 7}')  # does not rename a class folder
    assert again(model, "s")[1] == 0 and captions()["3.png"] == "below"


@pytest.mark.parametrize("harm", ["cut", "gone", "no metadata"])
def test_what_is_said_of_a_damaged_index_mends_it(model, folder, call, harm):  # noqa: F811
    again(model, "s")
    whole, (array, table) = tree("i"), ("i/img_emb/img_emb_0.npy", "i/metadata/metadata_0.jsonl")
    harmed = pathlib.Path(table if harm == "no metadata" else array)
    harmed.write_bytes(harmed.read_bytes()[:-1])
    if harm != "cut":
        harmed.unlink()
    said = f"{harmed} is {'damaged' if harm == 'cut' else 'missing'}.*; delete metadata_0.jsonl"
    for command, given in (("index", dict(out="i")), ("duplicates", dict(index="i"))):
        with pytest.raises(ValueError, match=said):
            call(command, *["s"] * (command == "index"), **given)
    for path in pathlib.Path("i/metadata").glob("metadata_*.jsonl"):
        path.unlink()
    assert again(model, "s") == (6, 0, 0, 1, 6) and tree("i") == whole
    shutil.rmtree("i/metadata")
    with pytest.raises(FileNotFoundError, match="--index=i: no index there; make it: search index"):
        call("duplicates", index="i")
    assert again(model, "s") == (6, 0, 0, 1, 6) and tree("i") == whole


def test_an_index_that_came_to_nothing_is_begun_again(model, folder):  # noqa: F811
    """Its first run was killed, or found the disk full, before index.json was there."""
    again(model, "s")
    whole = tree("i")
    for left in ("metadata/", "index.json.0123456789ab.new", "lease.json.0123456789ab.new"):
        shutil.rmtree("i")
        pathlib.Path("i", left).parent.mkdir()
        if left == "metadata/":
            pathlib.Path("i", left).mkdir()
        else:
            pathlib.Path("i", left).touch()
        assert again(model, "s") == (6, 0, 0, 1, 6)
        pathlib.Path("i", left).unlink() if left.endswith(".new") else None
        assert tree("i") == whole
    pathlib.Path("i/index.json").unlink()
    with pytest.raises(ValueError, match="^i holds something that is no index; give a new folder$"):
        parts.Parts("i")


def test_a_large_index_in_a_bucket_is_searched_without_a_graph(
    model,  # noqa: F811
    folder,  # noqa: F811
    call,  # noqa: F811
    s3,
    monkeypatch,
    capsys,
):
    """The graph is read from a local folder: what is embedded is not refused in the end."""
    monkeypatch.setattr(nearest, "EXACT_BELOW", 5)
    for new in (6, 0):
        done = call("index", "s", checkpoint="here", out=f"{s3}/large")
        assert (done["new"], done["pictures"], done["search"]) == (new, 6, "exact")
    told = f"--out={s3}/large is in a bucket and gets no graph: each picture is compared"
    assert capsys.readouterr().err.count(told) == 1
    found = index.Index(f"{s3}/large")
    assert isinstance(found.nearest, nearest.Exact)
    assert found.search(found.query(model, images=["s/3.png"]), 1)[0]["image"] == "s/3.png"


def test_an_index_that_drops_more_than_half_a_million_pictures_is_read(tmp_path):
    """Their numbers are more JSON than one part is trusted with."""
    there = parts.Parts(str(tmp_path / "i"))
    there.begin(dict(model="0", checkpoint="c", width=1))
    rows = [parts.Row("a.jpg", "")] * 600_000
    there.write("many.tar", np.ones((600_000, 1), np.float32), rows, {}, True)
    there.drop(range(10, 600_000))
    found = parts.Parts(str(tmp_path / "i"))
    assert len(list((tmp_path / "i/metadata").iterdir())) == 1 + 2
    assert found.rows().tolist() == list(range(10)) and found.embeddings().shape == (10, 1)


def test_the_embeddings_of_an_index_are_read_into_their_place(tmp_path):
    """Of a large one, those of all parts and the whole beside them were twice its memory."""
    there = parts.Parts(str(tmp_path / "i"))
    there.begin(dict(model="0", checkpoint="c", width=8))
    wanted = np.random.default_rng(0).normal(size=(20, 1000, 8)).astype(np.float16)
    for number, some in enumerate(wanted):
        there.write(f"{number}.tar", some, [parts.Row("a.jpg", "")] * 1000, {}, True)
    gone = [0, 999, 1000, *range(7000, 8000), 19_999]
    for dropped in ([], gone):
        there.drop(dropped)
        tracemalloc.start()
        found = there.embeddings()
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        np.testing.assert_array_equal(found, np.delete(wanted.reshape(-1, 8), dropped, axis=0))
        assert most < 1.4 * found.nbytes
