"""Copies of shards in a bucket: within a limit, the longest unused leaving, over threads too."""

import concurrent.futures
import os
import resource
import threading
import time

import fsspec
import numpy as np
import pytest
from array_record.python import array_record_module
from in_place_cases import make, write_tar

from coca_jax.data.sources import array_record, records, shard_cache
from coca_jax.data.sources import source as random_access

SIZE = 1 << 20


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """Six files of a MiB each, and room for three and a half copies."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(shard_cache.LIMIT, str(3.5 / 1024))
    system = fsspec.filesystem("memory")
    for number in range(6):
        system.pipe_file(f"/shards/{number}", bytes([number]) * SIZE)
    yield [f"memory://shards/{number}" for number in range(6)]
    system.rm("/shards", recursive=True)


def _copies(folder):
    found = (folder / "coca_jax/shards").iterdir()
    return sorted(file.read_bytes()[0] for file in found if "." not in file.name)


def _read(path):
    with shard_cache.opened(path) as copy, open(copy, "rb") as file:
        return file.read()


def test_the_longest_unused_copies_leave(bucket, tmp_path):
    for number in (0, 1, 2, 0, 3):
        assert _read(bucket[number]) == bytes([number]) * SIZE
        time.sleep(0.01)  # of the file system's clock
    assert _copies(tmp_path) == [0, 2, 3]
    with shard_cache.opened(bucket[0]) as copy:
        file = open(copy, "rb")
    for number in (1, 4, 5):
        _read(bucket[number])
    assert _copies(tmp_path) == [1, 4, 5] and file.read() == bytes([0]) * SIZE
    file.close()


def test_what_a_killed_process_left_goes_and_what_is_under_way_stays(bucket, tmp_path):
    _read(bucket[0])
    folder = tmp_path / "coca_jax/shards"
    (folder / "abc.1").write_bytes(b"under way")
    (folder / "abc.2").write_bytes(b"left")
    os.utime(folder / "abc.2", (1e9, 1e9))
    _read(bucket[1])
    assert (folder / "abc.1").exists() and not (folder / "abc.2").exists()
    assert not [file for file in folder.iterdir() if file.name.endswith(f".{os.getpid()}")]


def test_threads_that_read_more_than_there_is_room_for(bucket, tmp_path):
    def work(number):  # a file each: fsspec's files in memory have one position for all
        return [_read(bucket[number]) == bytes([number]) * SIZE for _ in range(20)]

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert all(all(found) for found in pool.map(work, range(6)))


def test_readers_of_copies_that_have_left_are_closed(bucket, tmp_path):
    system, paths = fsspec.filesystem("memory"), []
    for number in range(6):
        local = str(tmp_path / f"{number}")
        writer = array_record_module.ArrayRecordWriter(local, "group_size:1,uncompressed")
        writer.write(records.serialize(records.Record(bytes([number]) * SIZE, (), (), f"{number}")))
        writer.close()
        system.put_file(local, f"/shards/{number}.array_record")
        paths.append(f"memory://shards/{number}.array_record")
    read = array_record.ArrayRecordFiles(paths, [1] * 6)
    for number in (0, 1, 2, 3, 4, 5, 0, 5):
        assert read([number])[0].image[:1] == bytes([number])
    links = (
        os.readlink(f"/proc/self/fd/{fd}")
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}") or os.path.islink(f"/proc/self/fd/{fd}")
    )
    assert len([name for name in links if str(tmp_path / "coca_jax/shards") in name]) <= 3


def test_more_shards_than_files_that_may_be_open(tmp_path):
    paths = [str(tmp_path / f"{number}") for number in range(200)]
    for number, path in enumerate(paths):
        writer = array_record_module.ArrayRecordWriter(path, "group_size:1,uncompressed")
        writer.write(records.serialize(records.Record(b"image", (), (), f"{number}")))
        writer.close()
    source, again = (
        random_access.Source("many", 200, array_record.ArrayRecordFiles(paths, [1] * 200))
        for _ in range(2)
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    there = max(map(int, os.listdir("/proc/self/fd"))) + 1
    resource.setrlimit(resource.RLIMIT_NOFILE, (there + 150, hard))
    try:
        for _ in range(2):
            found, unread = random_access.read_all(source, np.arange(200))
            assert not unread and [one.key for one in found] == [str(n) for n in range(200)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (1, hard))
        with pytest.raises(OSError, match="many: record 3 .*too many files open .*ulimit -n"):
            random_access.read_all(again, np.array([3]))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_limit_that_is_none_is_refused(bucket, monkeypatch):
    for text in ("much", "0", "-1", "nan"):
        monkeypatch.setenv(shard_cache.LIMIT, text)
        with pytest.raises(ValueError, match=f"COCA_JAX_SHARD_CACHE_GIB={text}: give the GiB"):
            _read(bucket[0])
    assert _read("/proc/self/comm")  # a local file is no copy


def test_files_that_vanish_while_room_is_made(bucket, tmp_path):
    _read(bucket[0])
    folder, stopped = tmp_path / "coca_jax/shards", threading.Event()

    def come_and_go():
        while not stopped.is_set():
            for number in range(30):
                (folder / f"abc.{number}.new").touch()
            for number in range(30):
                (folder / f"abc.{number}.new").unlink()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        done = pool.submit(come_and_go)
        try:
            for _ in range(400):
                shard_cache.make_room(folder, 1)
        finally:
            stopped.set()
        done.result()
    assert _copies(tmp_path) == [0]


def test_a_limit_below_a_shard_is_refused_before_any_record(bucket, tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", 0, 2)
    make("webdataset", tmp_path / "a.tar", tmp_path / "p", in_place=False)
    fsspec.filesystem("memory").put(f"{tmp_path}/p/", "/shards/p/", recursive=True)
    size = next((tmp_path / "p").glob("*.array_record")).stat().st_size
    monkeypatch.setenv(shard_cache.LIMIT, "1e-5")
    line = f"GIB=1e-5: .* less room than one of {size} bytes takes; set 0.001 or more"
    with pytest.raises(ValueError, match=line):
        array_record.open_split("memory://shards/p", "train")
    monkeypatch.setenv(shard_cache.LIMIT, "0.001")
    assert len(array_record.open_split("memory://shards/p", "train")) == 2


def test_a_limit_that_is_none_is_refused_before_any_record(bucket, tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", 0, 2)
    make("webdataset", tmp_path / "a.tar", tmp_path / "p", in_place=False)
    fsspec.filesystem("memory").put(f"{tmp_path}/p/", "/shards/p/", recursive=True)
    monkeypatch.setenv(shard_cache.LIMIT, "much")
    with pytest.raises(ValueError, match="COCA_JAX_SHARD_CACHE_GIB=much: give the GiB"):
        array_record.open_split("memory://shards/p", "train")
    assert len(array_record.open_split(str(tmp_path / "p"), "train")) == 2
