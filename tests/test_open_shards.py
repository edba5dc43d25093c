"""Shards in a bucket are copied once, and more shards than files may be open are read."""

import os
import resource

import fsspec
import numpy as np
import pytest
from array_record.python import array_record_module

from coca_jax.data.sources import array_record, records, remote
from coca_jax.data.sources import source as random_access


def test_a_shard_in_a_bucket_is_copied_once_and_anew_where_it_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    system = fsspec.filesystem("memory")
    system.pipe_file("/shards/a", b"one")
    first = remote.local_copy("memory://shards/a")
    assert open(first, "rb").read() == b"one" and remote.local_copy("memory://shards/a") == first
    system.pipe_file("/shards/a", b"other")
    assert open(remote.local_copy("memory://shards/a"), "rb").read() == b"other"
    assert len(list((tmp_path / "coca_jax/shards").iterdir())) == 2
    assert remote.local_copy("/proc/self/comm") == "/proc/self/comm"
    system.rm("/shards", recursive=True)


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
