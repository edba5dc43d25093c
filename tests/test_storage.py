"""Files of a run in a local folder, on an S3 server and on a server that stands for GCS."""

import json
import pathlib
import resource
import signal
import sys
from concurrent import futures

import fsspec
import numpy as np
import pytest

from coca_jax.cli import report
from coca_jax.evaluation import runner
from coca_jax.evaluation.evaluators import captioning, results
from coca_jax.evaluation.evaluators.base import Writing
from coca_jax.runtime import growing_file, storage
from coca_jax.runtime.metric_log import MetricWriter, read_metrics
from coca_jax.training import trackers


def names(folder):
    """Files below a folder, by their paths in it."""
    system, plain = fsspec.url_to_fs(folder)
    return sorted(name[len(plain.lstrip("/")) :].lstrip("/") for name in _find(system, plain))


def _find(system, plain):
    return [name.lstrip("/") for name in system.find(plain)]


@pytest.mark.parametrize("url", ["gs:/bucket/run", "s3:/bucket", "https:/host/a.tar"])
def test_a_url_with_one_slash_is_no_folder(url):
    for use in (storage.place, storage.filesystem, storage.check_slashes):
        with pytest.raises(ValueError, match=f"{url}: a URL has two slashes, ...?.?.?://"):
            use(url)


def test_files_are_written_whole_or_not_at_all(folder):
    path = storage.place(folder) / "a" / "b.json"
    for text in ("first", "zweite, länger", ""):
        storage.write_text(path, text)
        assert path.read_text() == text
    assert names(folder) == ["a/b.json"]  # nothing temporary stays
    assert storage.reach(path) and storage.reach(path.parent) and not storage.reach(path / "c")


def test_a_growing_file_keeps_its_begin_and_loses_nothing(folder):
    path = storage.place(folder) / "rows.jsonl"
    rows = growing_file.Growing(path)
    for number in range(3):
        rows.write(f"row {number}\n".encode())
    rows.flush()
    assert path.read_text() == "row 0\nrow 1\nrow 2\n"  # before it is closed
    rows.write(b"after the last save")  # and then the program is killed
    again = growing_file.Growing(path, keep=12)
    assert path.read_text() == "row 0\nrow 1\n"
    again.write(b"row 2 again\n")
    again.close()
    assert path.read_text() == "row 0\nrow 1\nrow 2 again\n"


def test_a_growing_object_is_brought_up_to_date_now_and_then(s3):
    path = storage.place(f"{s3}/often.txt")
    often = growing_file.Growing(path, seconds=0)
    often.write(b"one\n")
    assert path.read_bytes() == b"one\n"


def test_a_large_growing_object_is_written_more_rarely(s3, monkeypatch):
    """All of it is sent each time: those of a long run would be a hundred gigabytes in the end."""
    now = [0.0]
    monkeypatch.setattr(growing_file.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(growing_file, "OFTEN", 100)
    path, sent = storage.place(f"{s3}/large.txt"), []
    growing = growing_file.Growing(path, seconds=60)
    for _ in range(100):
        now[0] += 61
        before, size = growing._written_at, len(growing._parts[0]) if growing._parts else 0
        growing.write(b"ten bytes\n")
        if growing._written_at > before:
            sent.append(now[0] - before)
            assert sent[-1] > 60 * max(1, size / 100)
    assert sent[:5] == [61.0] * 5 and 122 in sent and max(sent) > 500 and len(sent) < 40
    growing.close()
    assert path.read_bytes() == b"ten bytes\n" * 100


def test_metrics_go_on_after_the_step_of_the_checkpoint(folder):
    writer = MetricWriter(folder)
    for step in range(1, 6):
        writer.write(step, dict(loss=1 / step, bad=float("nan")))
        if step == 3:
            writer.flush()  # as before a checkpoint
            assert [row["step"] for row in read_metrics(folder)][:3] == [1, 2, 3]
    del writer  # killed
    writer = MetricWriter(folder, start_step=3)
    assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3]
    writer.write(4, dict(loss=0.5))
    writer.close()
    rows = read_metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[2] == dict(step=3, loss=1 / 3, bad=None) and rows[3]["loss"] == 0.5


def test_tensorboard_reads_what_was_written(folder):
    pytest.importorskip("tensorboard", reason="needs the extra 'tensorboard'")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    writer = MetricWriter(folder, trackers=trackers.open_all(("tensorboard",), folder, 0, {}))
    for step in (1, 2):
        writer.write(step, dict(loss=0.5 * step))
    writer.flush()
    with storage.local_copy(storage.place(folder) / "tensorboard") as local:
        (file,) = pathlib.Path(local).iterdir()
        events = list(EventFileLoader(str(file)).Load())
    assert [event.step for event in events] == [0, 1, 2]


def test_evaluations_and_their_report(folder):
    state = runner.Unfinished(folder, dict(weights="w"), Writing(True))
    state.add("task", dict(score=1.0))
    again = runner.Unfinished(folder, dict(weights="w"), Writing(True))
    assert again.scores("task") == dict(score=1.0)
    assert runner.Unfinished(folder, dict(weights="v"), Writing(True)).scores("task") is None
    state.add("other", dict(score=2.0))  # while that of other weights runs, whose file it is now
    state.close()
    assert (storage.place(folder) / "eval_progress.json").exists()
    mine = [runner.Unfinished(folder, dict(weights="v"), Writing(True)) for _ in range(2)]
    for one in mine:
        one.close()
    assert not (storage.place(folder) / "eval_progress.json").exists()
    results.save_results(folder, {"zero_shot/data/top1": 0.75})
    results.save_results(folder, {"zero_shot/data/top5": 1.0})
    image = results.encode_png(np.zeros((8, 8, 3), np.uint8))
    items = [dict(image=image, caption="it", references=["it"], exact=True, f1=1.0)]
    results.save_examples(folder, "captioning/data", dict(kind="captioning", items=items))
    again.close()
    made = report.write_report(folder)
    page = made.read_text()
    assert "75.0%" in page and image in page
    assert names(folder) == ["eval.json", "eval_examples.json", "report.html"]
    assert json.loads((storage.place(folder) / "eval.json").read_text()) == {
        "zero_shot/data/top1": 0.75,
        "zero_shot/data/top5": 1.0,
    }


def test_captions_of_a_killed_evaluation_are_taken_over(folder):
    path = storage.place(folder) / "eval_captions" / "data.jsonl"
    records = [dict(key=str(number)) for number in range(4)]
    outputs = captioning.Outputs(path, dict(step=1), write=Writing(True))
    outputs.add([dict(key="0", caption="a"), dict(key="1", caption="b")])
    outputs.close()
    again = captioning.Outputs(path, dict(step=1), write=Writing(True))
    assert [one["caption"] for one in again.take(records)] == ["a", "b"]
    again.add([dict(key="2", caption="c")])
    again.close()
    whole = captioning.Outputs(path, dict(step=1), write=Writing(False))
    assert [one["caption"] for one in whole.take(records)] == ["a", "b", "c"]
    assert captioning.Outputs(path, dict(step=2), write=Writing(False)).take(records) == []


def test_folders_and_their_copies(folder, tmp_path):
    with storage.local_folder(folder) as local:
        pathlib.Path(local, "sub").mkdir(parents=True)
        pathlib.Path(local, "sub", "large").write_bytes(bytes(3 << 20))
        pathlib.Path(local, "small").write_text("s")
    assert names(folder) == ["small", "sub/large"]
    with storage.local_copy(folder) as local:
        assert pathlib.Path(local, "sub", "large").stat().st_size == 3 << 20
        assert pathlib.Path(local, "small").read_text() == "s"
    with storage.local_copy(storage.place(folder) / "small") as local:
        assert pathlib.Path(local).read_text() == "s"


def test_a_place_that_can_be_written_keeps_no_trace(folder):
    storage.check_writable(folder)
    assert names(folder) == []


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_bucket_that_is_not_there(scheme, request):
    request.getfixturevalue(scheme)
    with pytest.raises(ValueError, match=f"{scheme}://nowhere/run: there is no bucket 'nowhere'"):
        storage.check_writable(f"{scheme}://nowhere/run")


def test_places_where_no_run_can_live(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="hdfs://a/b: a run lives in a local folder or"):
        storage.place("hdfs://a/b")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/run cannot be written"):
        storage.check_writable(tmp_path / "file" / "run")
    for make in (True, False):
        with pytest.raises(ValueError, match="written .*/file is a file.; give another folder"):
            storage.check_writable(tmp_path / "file", make=make)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [])
    with pytest.raises(ValueError, match="s3://bucket/run: .*pip install.*s3"):
        monkeypatch.delitem(sys.modules, "s3fs", raising=False)
        storage.place("s3://bucket/run")


def test_a_growing_file_on_a_full_disk_keeps_what_waits(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit then fails
    rows = growing_file.Growing(tmp_path / "rows")
    rows.write(b"one\n")
    resource.setrlimit(resource.RLIMIT_FSIZE, (6, limits[1]))  # a disk with two bytes left
    try:
        rows.write(b"two\n")
        rows.write(b"three\n")
        assert (tmp_path / "rows").read_bytes() == b"one\ntw"
        with pytest.raises(OSError):
            rows.flush()
        with pytest.raises(OSError):
            storage.write_text(tmp_path / "other", "0123456789")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["rows"]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, former)
    rows.write(b"four\n")
    assert (tmp_path / "rows").read_bytes() == b"one\ntwo\nthree\nfour\n"
    rows.close()


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    """Threads, whose process has one number, as containers of one job have on many machines."""
    path, whole = tmp_path / "plan.json", [bytes([65 + i]) * 300_000 for i in range(4)]
    storage.write_bytes(path, whole[0])

    def work(number):
        for _ in range(40):
            storage.write_bytes(path, whole[number])
            assert path.read_bytes() in whole

    with futures.ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]
    assert storage.UNNAMED.fullmatch(storage.unnamed("a.tar"))[1] == "a.tar"
