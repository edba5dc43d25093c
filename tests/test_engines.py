"""Shards done apart, by --shard=i/n, by processes, and by a real Ray cluster on this machine whose
workers are killed: what comes of it is what one process writes, to the byte."""

import dataclasses
import functools
import importlib
import os
import pathlib
import signal
import sys
import tarfile

import pytest
from test_inference import images, model, no_compile_cache, words  # noqa: F401
from test_recaption import asked, checkpoint, tars, tree  # noqa: F401

import coca_jax
from coca_jax.apps.recaption import job
from coca_jax.apps.search import index
from coca_jax.apps.search.parts import Parts
from coca_jax.data.prepare import prepare, prepare_with_holdout
from coca_jax.data.sources.items import Options
from coca_jax.runtime import workers
from coca_jax.runtime.workers import Engine

QUIET = dict(processes=1, progress=False)
LOCAL = Engine()


# ---- the three works


def prepared(input: str, out, engine: Engine = LOCAL, **options) -> dict:
    """A copy without doubles."""
    options = dict(dedup="content") | options
    return prepare(
        "webdataset", input, str(out), options=Options(**options), engine=engine, **QUIET
    )


def searched(input: str, out, load, engine: Engine = LOCAL) -> dict:
    """An index in parts of three pictures."""
    parts, how = Parts(str(out)), dict(checkpoint="here", batch_size=4, part=3)
    groups = index.groups([input], parts, 3)
    if engine != LOCAL:
        waiting = index.stage(load, groups, parts, engine, **how)
        if engine.share:
            return dict(waiting=waiting)
    told = index.add(None if engine != LOCAL else load(), groups, parts, say=said.append, **how)
    index.finish(parts)
    return told


def recaptioned(request, engine: Engine = LOCAL) -> dict:
    jobs = job.plan(request)
    return job.run(request, jobs, engine, say=lambda text: None, progress=False)


said: list[str] = []


# ---- shares


def test_a_share_is_every_nth_shard():
    jobs = list(range(7))
    assert [Engine(share=f"{i}/3").own(jobs) for i in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]
    assert Engine().own(jobs) == jobs
    for wrong in ("2/2", "1", "a/2", "-1/2", "1/", "²/3", "1/³"):
        with pytest.raises(ValueError, match=f"--shard={wrong}: give i/n, i from 0 to n - 1"):
            Engine(share=wrong)
    with pytest.raises(ValueError, match="--engine=spark: use one of local, ray"):
        Engine("spark")
    with pytest.raises(ValueError, match="--workers=3: it is of --engine=ray; leave it out"):
        Engine(workers=3)


def test_prepared_by_shares_and_joined(tars, tmp_path):  # noqa: F811
    prepared(tars, tmp_path / "whole")
    first, second = Engine(share="0/2"), Engine(share="1/2")
    out = tmp_path / "out"
    for left in ([3, 2], [0, 0]):  # fingerprints of all shards come before the first is written
        told = [prepared(tars, out, engine) for engine in (first, second)]
        assert told == [dict(split="train", out=str(out), shards=3, waiting=n) for n in left]
    assert not (out / "manifest.json").exists()
    assert prepared(tars, out)["written"] == 20
    assert tree(out) == tree(tmp_path / "whole")
    assert prepared(tars, out, first)["written"] == 20  # a job that starts late
    with pytest.raises(ValueError, match="--overwrite and --shard exclude each other"):
        prepare("webdataset", tars, str(out), overwrite=True, engine=first, **QUIET)


def test_a_holdout_by_shares_and_what_a_lost_job_left(tars, tmp_path):  # noqa: F811
    def held(out, **how):
        return prepare_with_holdout("webdataset", tars, str(out), 0.3, **QUIET, **how)

    held(tmp_path / "whole")
    told = held(tmp_path / "out", engine=Engine(share="1/2"))
    assert [one["waiting"] for one in told] == [2, 2]
    held(tmp_path / "out")  # does the other share as well
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["tars", "folder"])
def test_indexed_by_shares_and_joined(model, tars, tmp_path, monkeypatch, kind):  # noqa: F811
    input = tars
    if kind == "folder":
        for number, path in enumerate(sorted(pathlib.Path(tars).glob("*.tar"))):
            with tarfile.open(path) as archive:
                archive.extractall(tmp_path / f"pictures/{number}", filter="data")
        input = str(tmp_path / "pictures")
    searched(input, tmp_path / "whole", lambda: model)
    out = tmp_path / "out"
    assert searched(input, out, lambda: model, Engine(share="1/2"))["waiting"] > 0
    del said[:]
    parts = Parts(str(out))
    joined = index.groups([input], parts, 3)[:1]
    take = dict(checkpoint="here", batch_size=4, part=3, say=said.append)
    index.add(model, joined, parts, **take)  # ended after the first group
    told = searched(input, out, lambda: model)
    assert told["pictures"] == 20 and len(said) == 1 and "skipped" in said[0]
    assert tree(out) == tree(tmp_path / "whole")
    assert searched(input, out, lambda: model, Engine(share="0/2"))["waiting"] == 0
    other = {"model": "0123", "checkpoint": "there"}
    with pytest.raises(ValueError, match="made by another model"):
        index.Work(lambda: model, str(out), other, "here", 4, 3)(joined[0], said.append)


# ---- processes

WORK = """
import os, pathlib, signal, time

def bad(job, report):
    pathlib.Path(job).touch()
    if job.endswith("0"):
        raise ValueError("shard 0: bad input")
    time.sleep(0.5)
    report(3)

def deadly(job, report):
    if job.endswith("1"):
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_bad_input_and_a_process_that_is_killed_end_the_work(tmp_path, monkeypatch):
    """No shard begins after the bad one; the one beside it is finished and counted."""
    (tmp_path / "work_of_shards.py").write_text(WORK)
    monkeypatch.syspath_prepend(tmp_path)
    work = importlib.import_module("work_of_shards")
    (tmp_path / "begun").mkdir()
    jobs, done = [f"{tmp_path}/begun/{i}" for i in range(8)], []
    with pytest.raises(ValueError, match="^shard 0: bad input$"):
        Engine().run(work.bad, jobs, done.append, processes=2)
    assert sorted(os.listdir(tmp_path / "begun")) == ["0", "1"] and done == [3]
    with pytest.raises(OSError, match="a worker process was ended, .* fewer --processes than 2"):
        Engine().run(work.deadly, jobs, done.append, processes=2)


# ---- Ray


@pytest.fixture(scope="module")
def ray():
    module = pytest.importorskip("ray", reason="needs the extra 'ray'")
    os.environ["RAY_worker_niceness"] = "0"  # 15 by default, which is slow beside other tests
    for last in (False, False, True):
        try:
            module.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
            break
        except Exception:  # Ray gives its own processes 30 s, of a machine that may be busy
            module.shutdown()
            if last:
                raise
    module.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield module
    module.shutdown()


class Deadly:
    """A work whose worker is killed in the middle of each of the first shards that begin, one
    after the other; `folder` remembers."""

    def __init__(self, work, folder: str, kills: int):
        self.work, self.folder, self.kills = work, folder, kills

    def __call__(self, job, report):
        def killed(items: int) -> None:
            for number in range(self.kills):
                try:
                    os.close(os.open(f"{self.folder}/{number}", os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    continue
                os.kill(os.getpid(), signal.SIGKILL)
            report(items)

        return self.work(job, killed)


@dataclasses.dataclass(frozen=True)
class Killing(Engine):
    """Ray with four places for workers, of which three are killed at work."""

    name: str = "ray"
    workers: int = 4
    folder: str = ""
    kills: int = 3

    def run(self, work, jobs, report, **how):
        os.makedirs(self.folder, exist_ok=True)
        return super().run(Deadly(work, self.folder, self.kills), jobs, report, **how)

    def killed(self) -> int:
        return len(os.listdir(self.folder))


def squared(job: int, report) -> int:
    report(job)
    if job == 5:
        raise FileNotFoundError("job 5: no such file")
    return job * job


@pytest.mark.long
def test_workers_that_are_killed_that_never_come_and_that_fail(ray, tmp_path, monkeypatch):
    done: list[int] = []
    engine = Killing(workers=6, folder=str(tmp_path / "a"))  # on four cores: two have no place
    assert engine.run(squared, [0, 1, 2, 3, 4, 6], done.append) == [0, 1, 4, 9, 16, 36]
    assert sum(done) == 16 and engine.killed() == 3
    with pytest.raises(FileNotFoundError, match="^job 5: no such file$"):
        Engine("ray", 2).run(squared, [4, 5], done.append)
    monkeypatch.setattr(workers, "_LOST", 2)
    with pytest.raises(OSError, match="2 workers were lost at shard 0; the last: "):
        Killing(workers=1, folder=str(tmp_path / "b"), kills=99).run(squared, [1], done.append)
    assert Engine("ray").run(squared, [], done.append) == []


@pytest.mark.long
def test_prepared_by_workers_that_are_killed(ray, tars, tmp_path):  # noqa: F811
    prepared(tars, tmp_path / "whole", dedup="none")
    engine = Killing(folder=str(tmp_path / "killed"))
    prepared(tars, tmp_path / "out", engine, dedup="none")
    assert engine.killed() == 3 and tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.slow  # seven processes load a model
def test_indexed_by_workers_that_are_killed(ray, checkpoint, tars, tmp_path):  # noqa: F811
    load = functools.partial(coca_jax.load, checkpoint, num_frames=0, batch_size=4)
    searched(tars, tmp_path / "whole", load)
    engine = Killing(folder=str(tmp_path / "killed"))
    assert searched(tars, tmp_path / "out", load, engine)["pictures"] == 20
    assert engine.killed() == 3 and tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.slow
def test_recaptioned_by_workers_that_are_killed(ray, checkpoint, tars, tmp_path):  # noqa: F811
    recaptioned(asked(checkpoint, tars, tmp_path / "whole", embeddings=True))
    engine = Killing(folder=str(tmp_path / "killed"))
    request = asked(checkpoint, tars, tmp_path / "out", embeddings=True)
    assert recaptioned(request, engine)["count"] == 20
    assert engine.killed() == 3 and tree(tmp_path / "out") == tree(tmp_path / "whole")
