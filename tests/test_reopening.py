"""A served index whose folder changes."""

import asyncio
import json
import pathlib
import shutil

import pytest
from test_inference import no_compile_cache, words  # noqa: F401
from test_model_checksum import changed
from test_serve import Client, model, png  # noqa: F401

from coca_jax.apps.search import index, nearest, parts
from coca_jax.apps.serve import app
from coca_jax.runtime import json_files


def embed(model, pictures, out):  # noqa: F811
    new = parts.Parts(out)
    how = dict(checkpoint="here", batch_size=4, say=lambda text: None)
    gone = index.gone([str(pictures)], new)
    index.add(model, index.groups([str(pictures)], new), new, gone=gone, **how)


def test_an_index_that_has_changed_is_served_as_it_is_now(
    model,  # noqa: F811
    tmp_path,
    monkeypatch,
    caplog,
):
    """Not while it is written to, nor where another model has made it."""
    pictures, out = tmp_path / "pictures", str(tmp_path / "index")
    (pictures / "below").mkdir(parents=True)
    for number in range(4):
        (pictures / f"below/{number}.png").write_bytes(png(number))

    def again():
        embed(model, pictures, out)

    def found():
        count = json.loads(served.get("/api/info")[2])["index"]["pictures"]
        results = served.post("/api/search", ("image", png(9)), ("k", 9))[1]["results"]
        assert len(results) == count
        return [one["image"] for one in results]

    again()
    served = Client(model, index=index.Index(out))
    try:
        (pictures / "9.png").write_bytes(png(9))
        (pictures / "below/0.png").unlink()
        again()
        assert len(found()) == 4  # it looks some seconds later
        monkeypatch.setattr(app, "RELOAD_SECONDS", 0)
        lease = pathlib.Path(out, "lease.json")
        lease.write_text("{}")
        assert sorted(found()) == ["0.png", "1.png", "2.png", "3.png"]
        lease.unlink()
        assert found()[0] == "9.png" and len(found()) == 4
        assert [served.get(f"/api/pictures/{row}")[0] for row in (0, 1, 4)] == [404, 200, 200]
        counted = 'coca_jax_requests_total{path="/api/pictures/{row}",status="%d"}'
        assert [served.metric(counted % status) for status in (200, 404)] == [2, 1]
        assert "row 0: the index has no such" in served.refused(400, "/api/search", ("like", 0))
        about, told = pathlib.Path(out, "index.json"), json_files.read_sealed(f"{out}/index.json")
        other = changed(model, model__activation="relu").checksum()
        json_files.write_sealed(about, told | dict(model=other))
        assert len(found()) == 4 and "with other weights or preprocessing" in caplog.text
        shutil.rmtree(out)
        assert len(found()) == 4 and "No such file" in caplog.text
        (pictures / "9.png").unlink()
        again()
        assert sorted(found()) == ["1.png", "2.png", "3.png"]
    finally:
        served.close()


def test_an_index_that_could_not_be_read_once_is_read_at_the_next_look(
    model,  # noqa: F811
    tmp_path,
    monkeypatch,
    caplog,
):
    """One that another model made is read once until it changes again."""
    pictures, out, opened = tmp_path / "pictures", str(tmp_path / "index"), []
    pictures.mkdir()
    (pictures / "0.png").write_bytes(png(0))
    embed(model, pictures, out)
    served = app.Reopened(index.Index(out), model)
    monkeypatch.setattr(app, "RELOAD_SECONDS", 0)

    def failing(folder):
        opened.append(folder)
        if len(opened) == 1:
            raise OSError("the network is away for a second")
        return index.Index(folder)

    def found():
        return len(asyncio.run(served.now()).names)

    monkeypatch.setattr(app, "Index", failing)
    (pictures / "1.png").write_bytes(png(1))
    embed(model, pictures, out)
    assert [found() for _ in range(3)] == [1, 2, 2] and len(opened) == 2
    assert caplog.text.count("is served as it was before it changed: the network is away") == 1
    told = json_files.read_sealed(f"{out}/index.json")
    other = changed(model, model__activation="relu").checksum()
    json_files.write_sealed(pathlib.Path(out, "index.json"), told | dict(model=other))
    assert [found(), found()] == [2, 2] and len(opened) == 3


def test_an_index_whose_bucket_is_away_is_served_as_it_was(
    model,  # noqa: F811
    tmp_path,
    monkeypatch,
    caplog,
):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/0.png").write_bytes(png(0))
    embed(model, tmp_path / "pictures", str(tmp_path / "index"))
    served = Client(model, index=index.Index(str(tmp_path / "index")))

    class Away(Exception):
        __module__ = "botocore.exceptions"  # neither OSError nor ValueError, as the library's are

    def stamp(folder):
        raise Away("Could not connect to the endpoint URL")

    monkeypatch.setattr(app, "RELOAD_SECONDS", 0)
    monkeypatch.setattr(app, "stamp", stamp)
    try:
        status, _, data = served.get("/api/info")
        assert status == 200 and json.loads(data)["index"] == dict(pictures=1)
    finally:
        served.close()
    assert f"{tmp_path / 'index'} cannot be read: Away: Could not connect" in caplog.text


def test_an_index_is_searched_between_the_drop_of_rows_and_its_new_graph(
    model,  # noqa: F811
    tmp_path,
    monkeypatch,
    caplog,
):
    pytest.importorskip("usearch", reason="needs the extra 'search'")
    monkeypatch.setattr(nearest, "EXACT_BELOW", 3)
    pictures, out = tmp_path / "pictures", str(tmp_path / "index")
    pictures.mkdir()
    for number in range(5):
        (pictures / f"{number}.png").write_bytes(png(number))
    embed(model, pictures, out)
    assert index.finish(parts.Parts(out)) == "graph"
    (pictures / "0.png").unlink()
    embed(model, pictures, out)  # and the graph is not built yet
    found = index.Index(out)
    assert isinstance(found.nearest, nearest.Exact) and len(found.names) == 4
    (first, *_) = found.search(found.query(model, images=[png(2)]), 3)
    assert first["image"].endswith("/2.png") and first["score"] > 0.999
    assert "nearest.usearch does not belong to these pictures: each of them is" in caplog.text
    assert index.finish(parts.Parts(out)) == "graph"
    assert index.stamp(out) != found.stamp  # a server opens it anew
    assert isinstance(index.Index(out).nearest, nearest.Graph)
