"""Data read in place: the batches of a copy, over changes, processes, buckets and kills."""

import dataclasses
import os
import shutil
import types

import fsspec
import numpy as np
import pytest
from data_cases import data_config, equal, take
from in_place_cases import make, picture, write_tar

from coca_jax.apps.search import embed
from coca_jax.checkpoints import config_file
from coca_jax.config import typed
from coca_jax.data import evaluation_data, filters, source_index
from coca_jax.data import prepare as shards
from coca_jax.data.batches import open_stream
from coca_jax.data.mixture import Mixture
from coca_jax.data.prepare import prepare, prepare_with_holdout
from coca_jax.data.sources import array_record, files, remote
from coca_jax.data.sources.items import Options
from coca_jax.data.sources.references import UNKNOWN, Reference
from coca_jax.training import data_flag, run_vocabulary, setup, trainer


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Three tars of 14 pictures with captions."""
    root = tmp_path_factory.mktemp("tars")
    for number in range(3):
        write_tar(root / f"{number:03d}.tar", number * 14, 14)
    return root


@pytest.fixture(scope="module")
def made(tars, tmp_path_factory):
    """A copy and an index of them, with splits train and test."""
    out = tmp_path_factory.mktemp("made")
    for name in ("copy", "index"):
        options = Options(in_place=name == "index")
        where = ("webdataset", str(tars), str(out / name))
        prepare_with_holdout(*where, 0.2, options=options, processes=1, progress=False)
    return out


def test_an_index_has_the_records_of_a_copy(made):
    for split in ("train", "test"):
        copy, index = (filters.open_source(str(made / name), split) for name in ("copy", "index"))
        assert len(copy) > 4 and list(copy) == list(index)
        wanted = [3, 0, 3]
        assert index.read(wanted) == copy.read(wanted)
        texts = index.read_texts(wanted)
        assert [r.texts for r in texts] == [r.texts for r in copy.read(wanted)]
        assert not any(r.image for r in texts)
    assert not (made / "index" / "features.json").exists()  # TFDS would show references as images


def test_a_step_s_examples_are_listed_without_their_pictures(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    write_tar(root / "0.tar", 0, 8)
    out = str(tmp_path / "out")
    prepare("webdataset", str(root), out, options=Options(in_place=True), processes=1)
    mixture = Mixture(typed(data_config(dict(path=out))))
    rows = mixture.step_examples(0)
    assert len({row["key"] for row in rows}) == 8 and all(row["text"] for row in rows)
    (root / "0.tar").unlink()
    assert mixture.step_examples(0) == rows
    (shard,) = (tmp_path / "out").glob("*.array_record")
    data = bytearray(shard.read_bytes())
    at = data.index(rows[2]["key"].encode())
    data[at] ^= 1
    shard.write_bytes(data)
    found = Mixture(typed(data_config(dict(path=out)))).step_examples(0)
    assert (found[2]["key"], found[2]["text"][:14]) == ("", "cannot be read")
    assert found[:2] + found[3:] == rows[:2] + rows[3:]


def test_drawn_texts_have_the_keys_of_their_pictures():
    source = filters.open_source(dict(builtin="scenes"))
    wanted = [one.key for one in source.read([5, 0])]
    assert all(wanted) and [one.key for one in source.read_texts([5, 0])] == wanted


def test_relative_names_and_links(tars, tmp_path, monkeypatch):
    monkeypatch.chdir(tars)
    (tmp_path / "link").symlink_to(tars)
    urls = f"file://{tars}/000.tar", f"file:{tars}/000.tar"
    for number, path in enumerate(("000.tar", ".", f"{tmp_path}/link", *urls)):
        out = str(tmp_path / str(number))
        make("webdataset", path, out, in_place=True)
        monkeypatch.chdir(tmp_path)
        assert filters.open_source(out).read([5])[0].image == picture(5)
        records = array_record.open_split(out, "train")
        assert records.read([0])[0].image == picture(0)
        monkeypatch.chdir(tars)


def test_search_indexes_the_pictures_of_all_splits(made, tars):
    found = [
        one
        for group in embed.groups(str(made / "index"), lambda name: "new")
        for one in group.read()
    ]
    there = [one for group in embed.groups(str(tars), lambda name: "new") for one in group.read()]
    assert len(found) == 42 and {one.image for one in found} == {one.image for one in there}
    assert len({one.name for one in found}) == 42


def test_batches_are_those_of_a_copy_for_any_number_of_processes_and_after_a_resume(made, tmp_path):
    config = typed(data_config(dict(path=str(made / "copy"))))
    vocabulary = run_vocabulary.load_or_train(config, str(tmp_path))
    whole = take(open_stream(config, vocabulary), 12)  # into the third pass
    config = typed(data_config(dict(path=str(made / "index"))))
    assert all(map(equal, whole, take(open_stream(config, vocabulary), 12)))
    assert all(map(equal, whole[7:], take(open_stream(config, vocabulary, start_step=7), 5)))
    for count in (2, 4):
        parts = [
            take(open_stream(config, vocabulary, process_index=p, process_count=count), 2)
            for p in range(count)
        ]
        for step in range(2):
            joined = {
                key: np.concatenate([part[step][key] for part in parts])
                for key in ("image", "index", "tokens", "source")
            }
            assert equal(joined, whole[step])


def test_what_was_changed_since_is_named_and_another_stands_in(tars, tmp_path):
    data = shutil.copytree(tars, tmp_path / "data")
    make("webdataset", data, data / "index", in_place=True)
    shutil.move(data, tmp_path / "moved")  # an index in the folder of its data moves with them
    data = tmp_path / "moved"
    source = filters.open_source(str(data / "index"))
    record = source.read([0])[0]
    assert record.image == picture(0)
    tar = data / "000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole.replace(record.image[-40:-20], bytes(20)))
    with pytest.raises(ValueError, match="000.tar: the bytes from 512 on are not those that were"):
        filters.open_source(str(data / "index")).read([0])
    config = typed(data_config(dict(path=str(data / "index")), max_bad_fraction=0.5, batch=42))
    vocabulary = run_vocabulary.load_or_train(config, str(tmp_path))
    batch = next(open_stream(config, vocabulary))
    assert 0 not in batch["index"] and len(set(batch["index"])) == 41
    tar.write_bytes(whole + bytes(512))
    with pytest.raises(ValueError, match="index the data again"):
        filters.open_source(str(data / "index")).read([1])


RUNS = {"model.patch_size": 8, "steps": 2, "epochs": 0, "optimizer.warmup_steps": 0}


def test_nothing_is_indexed_into_a_run_of_other_data_or_another_config(tars, tmp_path):
    workdir, words = str(tmp_path / "run"), types.SimpleNamespace(checksum="")
    config = typed(data_config(dict(path=f"{tars}/000.tar"))).change(RUNS)
    begun = data_flag.apply(config, [f"{tars}/000.tar"], workdir)
    config_file.write(config_file.contents(begun, workdir, words), workdir)
    write_tar(tmp_path / "mine.tar", 0, 4)
    other = f"{tmp_path}/mine.tar"
    for named in ([other], [f"{tars}/000.tar", other], ["scenes"]):
        with pytest.raises(ValueError, match="run holds a run of another config .data.sources"):
            data_flag.apply(config, named, workdir)
    with pytest.raises(ValueError, match="seed: 0 there, 1 here"):
        data_flag.apply(config.change({"seed": 1}), [f"{tars}/000.tar"], workdir)
    with pytest.raises(ValueError, match="run holds a run of another config .data.sources"):
        trainer.train(config.change({"data.sources": (dict(path=other),)}), workdir)
    assert os.listdir(tmp_path / "run/data") == ["000"]
    assert data_flag.apply(config, [f"{tars}/000.tar"], workdir) == begun
    setup.check(config, workdir)  # as the key says it, before it is an index


def test_what_needs_no_data_is_refused_before_they_are_indexed(tars, tmp_path):
    sources = [dict(path=f"{tars}/000.tar", weight=weight) for weight in (3.0, 2.0)]
    config = typed(data_config(*sources, batch=40)).change(RUNS | {"batch_size": 16})
    with pytest.raises(ValueError, match=r"weights \[3.0, 2.0\] .* shares \[9.6, 6.4\], not whole"):
        trainer.train(config, f"file://{tmp_path}/run")
    assert not (tmp_path / "run").exists()


def test_data_that_a_flag_names_are_read_in_place(tmp_path, capsys):
    write_tar(tmp_path / "data/mine.tar", 0, 40)
    named, workdir = [str(tmp_path / "data/mine.tar")], str(tmp_path / "run")
    config = data_flag.apply(typed(data_config(dict(path="x"))), named, workdir)
    path = config.data.sources[0].path
    told = array_record.read_manifest(path)["splits"]
    assert told["train"]["count"] + told["test"]["count"] == 40 and told["test"]["count"] > 0
    assert told["train"]["root"] == told["test"]["root"] == str(tmp_path / "data")
    assert f"read in place, as webdataset: making an index of it in {path}" in (
        capsys.readouterr().err
    )
    assert data_flag.apply(config, named, workdir).data.sources == config.data.sources
    assert "index" not in capsys.readouterr().err  # which is there


def test_shards_by_braces(tars, tmp_path):
    assert files.find(f"{tars}/{{000..001}}.tar", ()) == [f"{tars}/000.tar", f"{tars}/001.tar"]
    assert files.find(f"{tars}/00{{0,2}}.tar", ()) == [f"{tars}/000.tar", f"{tars}/002.tar"]
    with pytest.raises(FileNotFoundError, match="2 of 5 files are missing, the first .*003.tar"):
        files.find(f"{tars}/{{000..004}}.tar", ())
    with pytest.raises(ValueError, match="more than a million"):
        files.find(f"{tars}/{{0..9999999}}.tar", ())
    pattern = f"{tars}/{{000..001}}.tar"
    assert source_index.folder_names([pattern, f"{tars}/t-{{0,1}}.tar"]) == ["data", "t-"]
    alike = source_index.folder_names(["a/x", "b/x", "c/x", "d/x-2", "e/x"])
    assert alike == ["x", "x-2", "x-3", "x-2-2", "x-4"]
    assert make("webdataset", pattern, tmp_path, in_place=True)["written"] == 28
    assert array_record.read_manifest(str(tmp_path))["splits"]["train"]["root"] == str(tars)


def test_braces_name_globs_too(tars):
    both = [f"{tars}/000.tar", f"{tars}/002.tar"]
    assert files.find(f"{tars}/{{*0,0?2}}.tar", ()) == both
    with pytest.raises(FileNotFoundError, match=r"1 of 2 files are missing, the first .*9\*\.tar"):
        files.find(f"{tars}/{{00*,9*}}.tar", ())


def test_marks_of_a_glob_in_the_names_of_folders_are_letters(tars, tmp_path):
    folder = tmp_path / "[2024] a*b?"
    shutil.copytree(tars, folder / "in")
    found = files.find(f"{folder}/i?/*0.tar", ())
    assert found == files.find(f"{folder}/in/0*0.tar", ()) == [f"{folder}/in/000.tar"]
    with pytest.raises(FileNotFoundError):
        files.find(f"{tmp_path}/[2024]/*.tar", ())


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_a_bucket(kind, tars, made, tmp_path, monkeypatch, request):
    bucket = request.getfixturevalue(kind)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    system = fsspec.filesystem(kind)
    for tar in sorted(tars.glob("*.tar")):
        system.pipe_file(f"bucket/in_place/{tar.name}", tar.read_bytes())
    url, out = f"{bucket}/in_place/{{000..002}}.tar", f"{bucket}/indexes/tars"
    result = prepare_with_holdout(
        *("webdataset", url, out, 0.2), options=Options(in_place=True), processes=1, progress=False
    )
    copy, index = filters.open_source(str(made / "copy")), filters.open_source(out)
    assert result[0]["written"] == len(copy)
    asked: list[int] = []
    system = files.filesystem(url)[0]
    cat_ranges = system.cat_ranges

    def counted(paths, starts, ends, **keywords):
        asked.append(len(paths))
        return cat_ranges(paths, starts, ends, **keywords)

    monkeypatch.setattr(system, "cat_ranges", counted)
    everything = list(range(len(copy)))
    assert index.read(everything) == copy.read(everything)
    assert asked == [3]  # a request a tar
    assert Mixture(typed(data_config(dict(path=out)))).sizes == [len(copy)]
    system.rm("bucket/in_place/000.tar")
    with pytest.raises(OSError, match="in_place/000.tar cannot be read: FileNotFoundError"):
        filters.open_source(out).read([0])


def test_one_read_of_several_kinds_of_stores(tmp_path):
    fsspec.filesystem("memory").pipe_file("/stores/a", b"in memory")
    (tmp_path / "b").write_bytes(b"on the disk")
    wanted = [
        ("memory://stores/a", 9, 3),
        (str(tmp_path / "b"), 11, 7),
        ("memory://stores/a", 9, 0),
    ]
    asked = [Reference(path, whole, start, 2, UNKNOWN) for path, whole, start in wanted]
    assert remote.read_ranges(asked) == [b"me", b"di", b"in"]


def test_data_that_are_not_prepared_are_sources_and_evaluated_on(tars, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_tar(tmp_path / "data/0.tar", 0, 6)
    entry = dict(path=str(tmp_path / "data"), kind="caption")
    assert evaluation_data.choose_split(entry) == "test" and evaluation_data.splits(entry) == []
    assert evaluation_data.counts(entry) == dict(caption=6, label=0)
    source = evaluation_data.open_source(entry, "test")
    assert [record.image for record in source] == [picture(n) for n in range(6)]
    write_tar(tmp_path / "data/0.tar", 6, 7)  # other files, another index
    assert len(evaluation_data.open_source(entry, "test")) == 7
    config = typed(data_config(entry, dict(path=f"{tars}/000.tar", split="train")))
    found = source_index.of_sources(config, str(tmp_path / "run"))
    assert Mixture(found).sizes == [7, 14]
    assert [entry.path for entry in found.data.sources] == [
        str(tmp_path / "run/data/data"),
        str(tmp_path / "run/data/000"),
    ]
    assert source_index.of_sources(found, str(tmp_path / "run")) is found
    assert source_index.of_sources(config, str(tmp_path / "run")) == found
    (tmp_path / "data/1.tar.gz").touch()
    with pytest.raises(ValueError, match="1.tar.gz is compressed .* `coca-jax prepare` without"):
        evaluation_data.open_source(entry, "test")


def test_fields_of_lists_that_are_not_prepared_are_their_texts(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = ["filepath,description,title,kind"]
    for n in range(4):
        (tmp_path / f"{n}.jpg").write_bytes(picture(n))
        rows.append(f"{n}.jpg,no. {n},{'' if n == 1 else f'title {n}'},{n % 2}")
    (tmp_path / "list.csv").write_text("\n".join(rows) + "\n")
    entry = dict(path=str(tmp_path / "list.csv"), kind="caption")

    def texts(**given):
        return [record.texts[0] for record in evaluation_data.open_source(entry | given, "test")]

    assert texts() == ["title 0", "no. 1", "title 2", "title 3"]  # the one without a title
    assert texts(text_field="title") == ["title 0", "title 2", "title 3"]
    assert texts(text_field="description") == [f"no. {n}" for n in range(4)]
    by_kind = dict(text_field="description", where=dict(kind="1"), label_field="kind")
    found = list(evaluation_data.open_source(entry | by_kind, "test"))
    assert [(r.texts, r.labels) for r in found] == [((f"no. {n}",), ("1",)) for n in (1, 3)]
    config = typed(data_config(entry, entry | dict(text_field="description")))
    for _ in range(2):
        found = source_index.of_sources(config, str(tmp_path / "run"))
        assert Mixture(found).sizes == [4, 4]
        assert len({one.path for one in found.data.sources}) == 2


def test_a_holdout_goes_through_the_data_once(tars, tmp_path, monkeypatch):
    def tree(folder):
        return {file.name: file.read_bytes() for file in folder.iterdir()}

    options = Options(in_place=True, holdout=0.2)
    where = ("webdataset", str(tars))
    keywords = dict(processes=1, progress=False)
    held = dataclasses.replace(options, held_out=True)
    prepare(*where, str(tmp_path / "a"), split="test", options=held, **keywords)
    prepare(*where, str(tmp_path / "a"), options=options, **keywords)
    read: list[int] = []
    read_rows = shards.read_rows

    def dies_at_the_third(job):
        read.append(job.number)
        if len(read) == 3:
            raise KeyboardInterrupt
        return read_rows(job)

    monkeypatch.setattr(shards, "read_rows", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        prepare_with_holdout(*where, str(tmp_path / "b"), 0.2, options=options, **keywords)
    prepare_with_holdout(*where, str(tmp_path / "b"), 0.2, options=options, **keywords)
    assert read == [0, 1, 2, 2] and tree(tmp_path / "a") == tree(tmp_path / "b")


def test_a_view_of_an_index_reads_no_image(tars, tmp_path):
    data = shutil.copytree(tars, tmp_path / "data")
    make("webdataset", data, tmp_path / "index", in_place=True)
    (data / "000.tar").unlink()
    entry = dict(path=str(tmp_path / "index"), where={"url": ["http://x/3", "http://x/20"]})
    source = filters.open_source(entry | dict(text_field="width"))
    assert [record.texts for record in source.read_texts(range(len(source)))] == [("20",)] * 2
    with pytest.raises(FileNotFoundError, match="000.tar"):
        source.read([0])
    shutil.move(data, tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="an index of what lies in .*/data, which is not"):
        filters.open_source(entry)
    manifest = tmp_path / "index/manifest.json"
    manifest.write_text(manifest.read_text().replace(str(data), "http://169.254.169.254/latest"))
    with pytest.raises(ValueError, match="neither here nor in a bucket"):
        filters.open_source(entry)
    # A run in a bucket goes on on any machine, and so has a copy.
    write_tar(tmp_path / "few/0.tar", 0, 40)
    out = data_flag.prepared(str(tmp_path / "few"), "memory://run/data/few")
    assert "root" not in array_record.read_manifest(out)["splits"]["train"]
