"""Searching pictures: the folder of an index, its growth and interruptions, what is found."""

import io
import json
import pathlib
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from absl import flags
from conftest import flags_of
from PIL import Image
from test_inference import images, model, no_compile_cache, words  # noqa: F401

import coca_jax
from coca_jax.apps.search import index, nearest, parts
from coca_jax.cli import search
from coca_jax.inference import export_programs


def encoded(seed: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Ten pictures of noise in folders, one file that is none."""
    root = tmp_path / "pictures"
    for number in range(10):
        path = root / ("a" if number < 5 else "b") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(number))
    (root / "a/broken.png").write_bytes(b"no picture")
    return root


def tree(root) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in pathlib.Path(root).rglob("*.*")}


def embed(model, input, out, **how):  # noqa: F811
    how = dict(checkpoint="here", batch_size=4, part=4, say=lambda text: None) | how
    there = parts.Parts(str(out))
    return index.add(model, index.groups([str(input)], there, how["part"]), there, **how)


def test_an_index_holds_arrays_and_lists_that_others_read(model, folder, tmp_path):  # noqa: F811
    said: list[str] = []
    result = embed(model, folder, tmp_path / "i", say=said.append)
    counts = dict(new=10, changed=0, gone=0, already_there=0, skipped=1, pictures=10)
    assert result == counts
    assert len(said) == 1 and said[0].count("broken.png") == 1
    names, rows = [], []
    for number in range(3):  # 11 files, four a part
        rows.append(np.load(tmp_path / f"i/img_emb/img_emb_{number}.npy"))
        lines = (tmp_path / f"i/metadata/metadata_{number}.jsonl").read_text().splitlines()
        header, *listed = map(json.loads, lines)
        assert header["rows"] == len(listed)
        names += [row["image_path"] for row in listed]
    assert [len(part) for part in rows] == [4, 3, 3] and rows[0].dtype == np.float16
    assert names == [str(folder / ("a" if n < 5 else "b") / f"{n}.png") for n in range(10)]
    np.testing.assert_allclose(np.concatenate(rows), model.encode_image(names), atol=1e-3)
    found = index.Index(str(tmp_path / "i"))
    assert found.captions == ["a"] * 5 + ["b"] * 5  # class folders
    pandas = pytest.importorskip("pandas", reason="needs the extra 'parity'")
    index.finish(parts.Parts(str(tmp_path / "i")), parquet=True)  # as clip-retrieval reads it
    tables = [pandas.read_parquet(path) for path in sorted(tmp_path.glob("i/metadata/*.parquet"))]
    assert [len(table) for table in tables] == [4, 3, 3]
    table = pandas.concat(tables)
    assert (list(table.image_path), list(table.caption)) == (names, found.captions)
    assert index.Index(str(tmp_path / "i")).names == names


def test_a_second_run_embeds_new_files_alone(model, folder, tmp_path):  # noqa: F811
    embed(model, folder, tmp_path / "i")
    before = tree(tmp_path / "i")
    assert embed(model, folder, tmp_path / "i")["new"] == 0
    assert tree(tmp_path / "i") == before
    (folder / "a/new.png").write_bytes(encoded(77))
    result = embed(model, folder, tmp_path / "i")
    assert (result["new"], result["already_there"], result["skipped"]) == (1, 10, 1)
    after = tree(tmp_path / "i")
    assert {name: data for name, data in after.items() if name in before} == before


@pytest.mark.parametrize("kind", ["folder", "tars"])
def test_a_run_that_was_ended_anywhere_ends_the_same(model, folder, tmp_path, kind):  # noqa: F811
    if kind == "tars":
        for number in range(2):
            with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
                for i in range(9):
                    for name, data in ((f"{i}.png", encoded(i)), (f"{i}.txt", b"a red circle")):
                        member = tarfile.TarInfo(name)
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
    input = folder if kind == "folder" else tmp_path / "*.tar"
    embed(model, input, tmp_path / "calm")
    calm = tree(tmp_path / "calm")
    assert len(parts.Parts(str(tmp_path / "calm")).names()) == (10 if kind == "folder" else 18)

    class Killed(BaseException):
        pass

    really_write = parts.storage.write_bytes

    for stop_at in range(1, 8):  # files that were written when it ends
        done = []

        def write(path, data, done=done, stop_at=stop_at):
            if len(done) == stop_at:
                raise Killed
            done.append(path)
            really_write(path, data)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parts.storage, "write_bytes", write)
            try:
                embed(model, input, tmp_path / f"i{stop_at}")
            except Killed:
                pass
        embed(model, input, tmp_path / f"i{stop_at}")
        assert tree(tmp_path / f"i{stop_at}") == calm


def test_an_index_of_other_weights_or_a_damaged_one_is_refused(model, folder, tmp_path):  # noqa: F811
    embed(model, folder, tmp_path / "i")
    other = parts.Parts(str(tmp_path / "i"))
    with pytest.raises(ValueError, match="made by another model"):
        other.begin(other.about | dict(model="0123"))
    part = tmp_path / "i/metadata/metadata_1.jsonl"
    whole = part.read_bytes()
    for damage in (b"", whole[:-1], whole[:-1] + b" ", whole.replace(b"png", b"jpg")):
        part.write_bytes(damage)
        with pytest.raises(ValueError, match="metadata_1.jsonl is damaged"):
            parts.Parts(str(tmp_path / "i"))
    part.unlink()
    with pytest.raises(ValueError, match="metadata_1.jsonl is missing; delete metadata_1"):
        parts.Parts(str(tmp_path / "i"))
    with pytest.raises(ValueError, match="holds something that is no index"):
        parts.Parts(str(folder))
    for other in (tmp_path / "none", folder):
        with pytest.raises(FileNotFoundError, match="no index there; make it: search index"):
            index.Index(str(other))


def test_a_picture_finds_itself_and_weights_move_the_query(model, folder, tmp_path):  # noqa: F811
    embed(model, folder, tmp_path / "i")
    found = index.Index(str(tmp_path / "i"))
    name = str(folder / "b/7.png")
    first = found.search(found.query(model, images=[name]), 3)
    assert (first[0]["image"], first[0]["rank"]) == (name, 1)
    assert first[0]["score"] == pytest.approx(1, abs=2e-3)
    assert [one["score"] for one in first] == sorted([one["score"] for one in first], reverse=True)
    text, picture = model.encode_text(["red"])[0], model.encode_image([name])[0]
    mixed = 0.25 * text + 0.75 * picture
    wanted = mixed / np.linalg.norm(mixed)
    np.testing.assert_allclose(found.query(model, ["red"], [name], [1, 3]), wanted, atol=1e-5)
    with pytest.raises(ValueError, match="1 weights for 2"):
        found.query(model, ["red"], [name], [1])
    found.about["model"] = "other"
    with pytest.raises(ValueError, match="other weights"):
        found.check(model)


def test_a_negative_weight_looks_away_and_weights_that_leave_nothing_are_refused():
    x = np.eye(2, dtype=np.float32)
    wanted = np.array([0.5, -1]) / np.sqrt(1.25)
    np.testing.assert_allclose(index.mixed(x, [0.5, -1]), wanted, atol=1e-6)
    np.testing.assert_allclose(index.mixed(x, [5e307, -1e308]), wanted, atol=1e-6)
    np.testing.assert_allclose(index.mixed(x, [1, -1]), np.array([1, -1]) / 2**0.5, atol=1e-6)
    np.testing.assert_allclose(index.mixed(x), np.array([1, 1]) / 2**0.5, atol=1e-6)
    for weights, says in (
        ([1, float("nan")], "1, nan: give finite numbers"),
        ([float("inf"), 1], "inf, 1: give finite numbers"),
        ([0, 0], "0, 0 leave nothing to look for"),
    ):
        with pytest.raises(ValueError, match=says):
            index.mixed(x, weights)
    with pytest.raises(ValueError, match="1, -1 leave nothing to look for; change one"):
        index.mixed(np.ones((2, 2), np.float32) / np.float32(2**0.5), [1, -1])


def clustered(count: int, width: int) -> np.ndarray:
    """Unit vectors in groups, as embeddings of pictures lie, not spread evenly."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(50, width))
    x = centres[rng.integers(0, 50, count)] + 0.7 * rng.normal(size=(count, width))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)


def test_exact_search_is_the_sorted_products(tmp_path):
    x = clustered(40_000, 16)
    queries = x[:5].astype(np.float32)
    scores, rows = nearest.Exact(x)(queries, 7)
    similar = queries @ x.astype(np.float32).T
    np.testing.assert_array_equal(rows, np.argsort(-similar, axis=1, kind="stable")[:, :7])
    np.testing.assert_allclose(scores, np.take_along_axis(similar, rows, 1), atol=1e-6)
    assert nearest.Exact(x[:3])(queries, 7)[1].shape == (5, 3)


@pytest.mark.parametrize("kept", [0, 1 << 31])  # bytes of embeddings in float32
@pytest.mark.parametrize("most", [1, 1000])  # of a component: with 1 most pictures have equals
def test_exact_search_sorts_no_more_than_it_gives_and_keeps_the_order_of_equals(
    most, kept, monkeypatch
):
    monkeypatch.setattr(nearest, "_ROWS", 300)
    monkeypatch.setattr(nearest, "_SCORES", 2000)  # of two queries
    monkeypatch.setattr(nearest, "_FLOAT32_BYTES", kept)
    rng = np.random.default_rng(0)  # whole numbers, of which products are exact
    x, queries = (rng.integers(-most, most + 1, (n, 4)).astype(np.float32) for n in (1000, 5))
    similar = queries @ x.T
    want = np.argsort(-similar, axis=1, kind="stable")[:, :7]
    argsort, numbers = np.argsort, []
    monkeypatch.setattr(np, "argsort", lambda a, **to: numbers.append(a.size) or argsort(a, **to))
    scores, rows = nearest.Exact(x.astype(np.float16))(queries, 7)
    np.testing.assert_array_equal(rows, want)
    np.testing.assert_array_equal(scores, np.take_along_axis(similar, want, 1))
    assert sum(numbers) == 5 * 7 or most == 1


def test_the_graph_finds_what_exact_search_finds(tmp_path):
    pytest.importorskip("usearch", reason="needs the extra 'search'")
    x = clustered(6000, 32)
    nearest.build(x, str(tmp_path))
    graph = nearest.open_nearest(x, str(tmp_path))
    assert isinstance(graph, nearest.Graph)
    queries = clustered(6200, 32)[6000:].astype(np.float32)
    _, exact = nearest.Exact(x)(queries, 10)
    _, near = graph(queries, 10)
    recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(exact, near)])
    assert recall >= 0.99
    for others in (x[:-1], np.roll(x, 1, axis=0)):
        with pytest.raises(ValueError, match="does not belong"):
            nearest.Graph(others, str(tmp_path))
    whole = (tmp_path / nearest.FILE).read_bytes()
    for size in (0, 80, len(whole) // 2):
        (tmp_path / nearest.FILE).write_bytes(whole[:size])
        with pytest.raises(ValueError, match="nearest.usearch is damaged .*delete it"):
            nearest.open_nearest(x, str(tmp_path))


def test_pictures_behind_the_last_of_the_graph_are_compared_one_by_one(tmp_path):
    pytest.importorskip("usearch", reason="needs the extra 'search'")
    x = clustered(3000, 32)
    graphs, exact = [], nearest.Exact(x)
    for number in range(3):  # threads add to one in an order of chance: of 80, one had 0.989
        folder = tmp_path / str(number)
        folder.mkdir()
        nearest.build(x[:2000], str(folder))
        graphs.append(nearest.open_nearest(x, str(folder)))
    queries = clustered(3200, 32)[3000:].astype(np.float32)
    for asked, k in ((queries, 10), (queries[:1], 1), (queries[:3], 2500)):
        wanted, shares = exact(asked, k)[1], []
        for graph in graphs:
            near = graph(asked, k)[1]
            assert near.shape == (len(asked), k) and all(len({*row}) == k for row in near.tolist())
            assert all({*b[b >= 2000]} <= {*a} for a, b in zip(near, wanted))  # every one of them
            shares.append(np.mean([len({*a} & {*b}) / k for a, b in zip(near, wanted)]))
        assert np.median(shares) >= 0.99


def test_where_the_walk_ends_early_every_picture_is_compared(tmp_path):
    pytest.importorskip("usearch", reason="needs the extra 'search'")
    x = clustered(1500, 16)
    x[::2] = x[0]  # equal pictures, from whose places no way leads on
    nearest.build(x, str(tmp_path))
    graph, queries = nearest.open_nearest(x, str(tmp_path)), x[:20].astype(np.float32)
    assert min(graph._graph.search(nearest._coarse(queries), 1400).counts) < 1400
    for asked, k in ((queries, 350), (queries[:1], 375)):
        scores, rows = graph(asked, k)
        assert all(len(set(row)) == k for row in rows.tolist()) and rows.shape == (len(asked), k)
        np.testing.assert_allclose(scores, nearest.Exact(x)(asked, k)[0], atol=1e-6)


def test_where_many_are_asked_for_none_is_missed(tmp_path):
    """1500 pictures that are nearly alike lie on islands of the graph, of which a walk for 600 of
    them found 261, one for 300 some 40, and others in place of the rest."""
    pytest.importorskip("usearch", reason="needs the extra 'search'")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(100, 32))[rng.integers(0, 100, 8000)] + 0.6 * rng.normal(size=(8000, 32))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x[3000:4500] = x[3000] + 0.002 * rng.normal(size=(1500, 32))
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    nearest.build(x, str(tmp_path))
    graph, queries = nearest.open_nearest(x, str(tmp_path)), x[3000:3002].astype(np.float32)
    for count, k in ((1, 600), (2, 600), (1, 300), (2, 300)):
        scores, rows = graph(queries[:count], k)
        assert scores.min() > 0.99 and 3000 <= rows.min() <= rows.max() < 4500
        assert all(len({*row}) == k for row in rows.tolist())


def test_a_graph_grows_by_what_is_new(tmp_path, monkeypatch):
    usearch = pytest.importorskip("usearch.index", reason="needs the extra 'search'")
    added: list[int] = []
    really_add = usearch.Index.add

    def add(self, keys, vectors, **how):
        added.extend(keys.tolist())
        return really_add(self, keys, vectors, **how)

    monkeypatch.setattr(usearch.Index, "add", add)
    x = clustered(3000, 32)
    nearest.build(x[:2000], str(tmp_path))
    nearest.build(x, str(tmp_path))
    nearest.build(x, str(tmp_path))
    assert added == list(range(3000))
    _, near = nearest.open_nearest(x, str(tmp_path))(x[::100].astype(np.float32), 1)
    assert np.mean(near[:, 0] == np.arange(0, 3000, 100)) >= 0.9  # equal ones may stand before
    nearest.build(np.roll(x, 1, axis=0), str(tmp_path))  # other rows: a new graph
    assert len(added) == 6000


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "coca_jax", "search", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_each_part_of_the_command(model, folder, tmp_path, monkeypatch, capsys):  # noqa: F811
    """In this process, with a model that is there already."""
    flags_of("search", monkeypatch)
    monkeypatch.setattr(coca_jax, "load", lambda place, **how: model)
    (folder / "b/twin.png").write_bytes((folder / "a/0.png").read_bytes())
    out = str(tmp_path / "i")

    def call(*asked, **given):
        search.flags.FLAGS.unparse_flags()
        search.flags.FLAGS(["search", *(f"--{name}={value}" for name, value in given.items())])
        result = search.main(["search", *asked])
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()], result

    _, done = call("index", str(folder), checkpoint="here", out=out, batch_size=4)
    assert (done["new"], done["skipped"], done["pictures"]) == (11, 1, 11)
    assert done["search"] == "exact" and done["out"] == out
    picture = str(folder / "a/0.png")
    found, done = call("query", picture, "red", index=out, k=3, weights="1,0")
    twins = [picture, str(folder / "b/twin.png")]
    assert sorted(one["image"] for one in found[:2]) == twins and found[0]["score"] > 0.999
    assert (done["texts"], done["images"], done["found"]) == (["red"], [picture], 3)
    found, done = call("duplicates", index=out, threshold=0.999)
    assert any(set(twins) <= set(group["images"]) for group in found) and done["pictures"] == 11
    assert done["duplicates"] == sum(len(group["images"]) - 1 for group in found)
    found, done = call("clusters", index=out, clusters=2)
    assert sum(one["size"] for one in found) == 11 and done["clusters"] == 2
    for seed in (-1, 2**32):
        with pytest.raises(flags.IllegalFlagValueError, match=rf"--seed={seed}.*\[0, 4294967295"):
            call("clusters", index=out, seed=seed)
    call("clusters", index=out, clusters=2, seed=2**32 - 1)
    call("clusters", index=out, clusters=2, seed=0)
    _, done = call("index", str(folder), checkpoint="here", out=str(tmp_path / "j"), shard="1/2")
    assert (done["waiting"], done["shards"]) == (1, 1)  # the first of two does it
    call("index", str(folder), checkpoint="here", out=str(tmp_path / "j"), shard="0/2")
    with pytest.raises(FileNotFoundError, match="no index there; make it: join its shards"):
        call("query", "red", index=str(tmp_path / "j"))
    for asked, given, says in (
        (("query", "red"), {}, "--index is missing"),
        (("query",), dict(index=out), "give what to look for"),
        (("query", ""), dict(index=out), "one of the texts is empty; give words"),
        (("query", "red", " "), dict(index=out), "one of the texts is empty; give words"),
        (("query", "red"), dict(index=out, weights="a"), "--weights=a: give numbers"),
        (("query", "red"), dict(index=out, weights="1,2"), "2 weights for 1 texts"),
        (("index",), dict(checkpoint="here", out=out), "give what to index"),
        (("find",), {}, "'find' is none of them"),
        ((), {}, "none is given"),
    ):
        with pytest.raises(ValueError, match=says):
            call(*asked, **dict(index="", weights="", out="") | given)


@pytest.mark.slow  # three starts of the command; docs/search.md is walked in every run of the suite
def test_the_command(model, folder, tmp_path):  # noqa: F811
    place = tmp_path / "export"
    export_programs.export(model, str(place))
    out = str(tmp_path / "i")
    done = run("index", str(folder), f"--checkpoint={place}", f"--out={out}")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["new"] == 10
    done = run("query", "red", str(folder / "a/0.png"), f"--index={out}", "--k=2")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line.get("rank") for line in lines] == [1, 2, None]
    assert lines[-1]["texts"] == ["red"] and lines[-1]["pictures"] == 10
    done = run("query", "none.png", f"--index={out}")
    assert done.returncode == 2 and "none.png: no such picture" in done.stderr


def test_contact_sheets_scores_of_duplicates_and_names_of_clusters(
    model,  # noqa: F811
    folder,
    tmp_path,
    monkeypatch,
    capsys,
):
    for number, name in enumerate(("a/copy <b>.png", "a/copy2.png")):
        (folder / name).write_bytes(encoded(3 * number))  # of a/0.png and a/3.png
    embed(model, folder, tmp_path / "i")
    monkeypatch.setattr(coca_jax, "load", lambda *_, **__: model)
    sheet = tmp_path / "sheet.html"

    def call(*arguments):
        with pytest.MonkeyPatch.context() as patch:
            flags_of("search", patch)
            given = ["search", *arguments, f"--index={tmp_path / 'i'}", f"--html={sheet}"]
            search.main(search.flags.FLAGS(given))
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        return lines, sheet.read_text()

    groups, page = call("duplicates", "--threshold=0.999")
    assert [list(map(pathlib.Path, one["images"])) for one in groups] == [
        [folder / "a/0.png", folder / "a/copy <b>.png"],
        [folder / "a/3.png", folder / "a/copy2.png"],
    ]
    assert [one["scores"] for one in groups] == [[1.0, 1.0]] * 2
    assert page.count("<img src=") == 4 and "copy &lt;b&gt;" in page and "1.0000" in page
    assert "http" not in page.replace("https://", "http") and "<script" not in page
    groups, page = call("clusters", "--clusters=2", "--labels=red, a blue square")
    assert {one["label"] for one in groups} == {"red", "a blue square"}
    assert page.count("<img src=") == 12 and page.count("<h2>") == 2
    groups, page = call("clusters", "--clusters=2")
    assert {one["label"] for one in groups} == {"a", "b"}  # the captions: class folders
    (folder / "a/0.png").unlink()
    _, page = call("query", "red", "--k=12")
    assert page.count("<img src=") == 11 and page.count("not shown") == 1
