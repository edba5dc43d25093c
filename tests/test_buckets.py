"""Runs whose workdir is in a bucket: an S3 server and a server that stands for GCS."""

import pathlib
import signal
import subprocess
import sys

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_train import COMPARED, tiny_run, whole  # noqa: F401

import coca_jax
from coca_jax import checkpoint_places, checkpointing, evaluate, report, storage
from coca_jax.metrics import read_metrics
from coca_jax.train import train
from coca_jax.train_step import TrainState
from coca_jax.training.stopping import Preempted, Stop

TESTS = str(pathlib.Path(__file__).parent)


def _equal(place, run):
    """Asserts that two runs of the same config left the same: metrics and all arrays."""
    for a, b in zip(read_metrics(run), read_metrics(place), strict=True):
        assert [a["step"], *(a[name] for name in COMPARED)] == [
            b["step"],
            *(b[name] for name in COMPARED),
        ]
    want, got = (_arrays(where) for where in (run, place))
    assert len(want) > 100
    jax.tree.map(np.testing.assert_array_equal, got, want)


def _arrays(place):
    """All arrays of a run's newest checkpoint."""
    import orbax.checkpoint as ocp

    directory, step = checkpointing.find_step(place)
    with ocp.StandardCheckpointer() as reader:
        found = [
            reader.restore(directory / str(step) / item)
            for item in ("params", "opt_state", "counters", "ema")
        ]
    return jax.tree.leaves(found)


def test_a_killed_run_goes_on_bit_for_bit(whole, s3):  # noqa: F811
    workdir = f"{s3}/killed"
    code = (
        f"import os, signal, sys, time; sys.path.insert(0, {TESTS!r})\n"
        "import conftest\n"
        "from test_train import tiny_run\n"
        "from coca_jax import storage, train\n"
        "from coca_jax.training import stopping\n"
        f"saved = storage.place({workdir!r}) / 'checkpoints/2/commit_success.txt'\n"
        "def reached(self, step):\n"
        "  while step == 3:\n"
        "    if saved.exists(): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    time.sleep(0.1)\n"
        "stopping.Stop.reached = reached\n"
        f"train.train(tiny_run(), {workdir!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert [row["step"] for row in read_metrics(workdir)] == [1, 2]  # those of the checkpoint
    assert checkpointing.find_step(workdir)[1] == 2
    train(tiny_run(), workdir)
    _equal(workdir, whole[0])
    files = fsspec.filesystem("s3").find("bucket/killed")
    names = {name.removeprefix("bucket/killed/").split("/")[0] for name in files}
    assert names == {
        *("config.json", "metrics.jsonl", "checkpoints", "vocabulary.model"),
        *("report.html", "seconds.json"),
    }


def test_a_stopped_run_goes_on_bit_for_bit_on_gcs(whole, gs, monkeypatch):  # noqa: F811
    workdir = f"{gs}/stopped"
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "reached", lambda self, step: step == 3)
        with pytest.raises(Preempted, match="saved step 3"):
            train(tiny_run(), workdir)
    assert [row["step"] for row in read_metrics(workdir)] == [1, 2, 3]
    train(tiny_run(), workdir)
    _equal(workdir, whole[0])


def test_a_model_is_loaded_and_scored_in_its_bucket(whole, s3):  # noqa: F811
    with storage.local_folder(f"{s3}/scored") as folder:
        fsspec.filesystem("file").put(f"{whole[0]}/", f"{folder}/", recursive=True)
    workdir = f"{s3}/scored/"
    model = coca_jax.load(workdir)
    local = coca_jax.load(whole[0])
    image = np.zeros((1, 32, 32, 3), np.uint8)
    np.testing.assert_array_equal(model.encode_image(image), local.encode_image(image))
    data = dict(builtin="scenes", split="test", objects=(1,))
    task = dict(kind="captioning", name="scenes", data=data, limit=8, java_metrics=False)
    scores = evaluate.run_tasks(model, [task], workdir)
    assert scores["captioning/scenes/num_examples"] == 8
    place = storage.place(workdir)
    assert len((place / "eval_captions/scenes.jsonl").read_text().splitlines()) == 9
    assert not (place / "eval_progress.json").exists()
    assert "captioning" in report.write_report(workdir).read_text()
    assert coca_jax.load(f"{workdir}checkpoints/2").vocabulary.size == local.vocabulary.size


def _state(step):
    """A state of a few arrays, one of them over all devices."""
    mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    rows = jax.device_put(jnp.arange(32.0).reshape(16, 2) + step, split)
    return TrainState(
        step=jnp.int32(step),
        skipped=jnp.int32(0),
        params={"a": rows, "b": jnp.full(3, step, jnp.bfloat16)},
        opt_state={"m": rows * 2},
        ema={"a": rows + 1, "b": jnp.zeros(3)},
    )


def test_only_whole_steps_count(folder):
    checkpoints = checkpointing.Checkpoints(folder, keep=2)
    assert checkpoints.latest_step() is None
    for step in (1, 2, 3):
        checkpoints.save(step, _state(step))
    checkpoints.close()
    directory, step = checkpointing.find_step(folder)
    assert step == 3 and sorted(p.name for p in directory.iterdir()) == ["2", "3"]
    if not storage.is_remote(folder):
        return
    (directory / "3" / "commit_success.txt").unlink()  # as a kill within the save leaves it
    assert checkpointing.find_step(folder)[1] == 2
    again = checkpointing.Checkpoints(folder, keep=2)
    assert again.latest_step() == 2
    again.save(3, _state(30))
    again.close()
    state = _state(0)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    last = checkpointing.Checkpoints(folder, keep=2)
    got = last.restore(3, state, shardings)
    last.close()
    jax.tree.map(np.testing.assert_array_equal, got, _state(30))
    assert got.params["a"].sharding == state.params["a"].sharding


def test_arrays_are_tried_before_any_work(folder):
    checkpoint_places.check_writable(folder)
    system, plain = storage.filesystem(folder)
    assert system.find(plain) == []


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_bucket_that_is_not_there_ends_the_command(scheme, request, tmp_path):
    request.getfixturevalue(scheme)
    command = [sys.executable, "-m", "coca_jax.train", "--config=tiny"]
    command.append(f"--workdir={scheme}://nowhere/run")
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=200)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {scheme}://nowhere/run: there is no bucket 'nowhere'")
    assert done.stderr.count("\n") == 1
