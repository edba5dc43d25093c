"""Recaptioning on a real Ray cluster on this machine, whose workers are killed in turn."""

import os
import pathlib
import signal
import threading
import time

import pytest
from test_inference import images, model, no_compile_cache, words  # noqa: F401
from test_recaption import asked, checkpoint, do, tars, tree  # noqa: F401

from coca_jax.recaptioning import engines, whole

ray = pytest.importorskip("ray", reason="needs the extra 'ray'")


@pytest.fixture
def cluster():
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def workers() -> list[int]:
    """Process ids of the cluster's workers that have loaded a model or are about to."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(b"ray::_Worker"):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_shards_of_workers_that_are_killed_are_done_again(
    checkpoint,  # noqa: F811
    tars,  # noqa: F811
    tmp_path,
    cluster,
):
    request = asked(checkpoint, tars, tmp_path / "calm", embeddings=True)
    do(request)
    request = asked(checkpoint, tars, tmp_path / "out", embeddings=True)
    killed: list[int] = []
    over = threading.Event()

    def kill() -> None:
        """Each of three workers, after some seconds of its life."""
        while not over.wait(3) and len(killed) < 3:
            for one in sorted(set(workers()) - set(killed))[:1]:
                os.kill(one, signal.SIGKILL)
                killed.append(one)

    thread = threading.Thread(target=kill)
    thread.start()
    start, jobs = time.time(), whole.plan(request)
    told = engines.run(
        request, jobs, jobs, engine="ray", workers=3, say=lambda text: None, progress=False
    )
    over.set()
    thread.join()
    assert len(killed) == 3, f"over after {time.time() - start:.0f} s"
    assert told["count"] == 20
    assert tree(tmp_path / "out") == tree(tmp_path / "calm")
