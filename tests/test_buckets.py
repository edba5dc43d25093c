"""Runs whose workdir is in a bucket: an S3 server and a server that stands for GCS."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import scenes_words
from one_device import smallest_run, train_alone
from test_train import COMPARED

import coca_jax
from coca_jax.checkpoints import manager, steps
from coca_jax.cli import report
from coca_jax.evaluation import runner
from coca_jax.runtime import storage
from coca_jax.runtime.metric_log import read_metrics
from coca_jax.runtime.signals import Preempted, Stop
from coca_jax.training.state import TrainState
from coca_jax.training.trainer import train

pytestmark = pytest.mark.usefixtures("compile_once")

TESTS = str(pathlib.Path(__file__).parent)


def small_run(workdir):
    """Trains four steps on one device."""
    config = smallest_run()
    config.data.vocabulary = scenes_words()
    return train_alone(config, workdir)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted local run."""
    workdir = str(tmp_path_factory.mktemp("whole"))
    small_run(workdir)
    return workdir


def _equal(place, run):
    """Asserts that two runs of the same config left the same: metrics and all arrays."""
    for a, b in zip(read_metrics(run), read_metrics(place), strict=True):
        assert [a["step"], *(a[name] for name in COMPARED)] == [
            b["step"],
            *(b[name] for name in COMPARED),
        ]
    want, got = (_arrays(where) for where in (run, place))
    assert len(want) > 50
    jax.tree.map(np.testing.assert_array_equal, got, want)


def _arrays(place):
    """All arrays of a run's newest checkpoint."""
    import orbax.checkpoint as ocp

    directory, step = manager.find_step(place)
    with ocp.StandardCheckpointer() as reader:
        found = [
            reader.restore(directory / str(step) / item)
            for item in ("params", "opt_state", "counters", "ema")
        ]
    return jax.tree.leaves(found)


@pytest.mark.long
def test_a_killed_run_goes_on_bit_for_bit(whole, s3):
    workdir = f"{s3}/killed"
    code = (
        f"import os, signal, sys, time; sys.path.insert(0, {TESTS!r})\n"
        f"import conftest; conftest.scenes_words = lambda: {scenes_words()!r}\n"
        "from test_buckets import small_run\n"
        "from coca_jax.runtime import storage\n"
        "from coca_jax.runtime import signals as stopping\n"
        f"saved = storage.place({workdir!r}) / 'checkpoints/2/commit_success.txt'\n"
        "def reached(self, step):\n"
        "  while step == 3:\n"
        "    if saved.exists(): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    time.sleep(0.02)\n"
        "stopping.Stop.reached = reached\n"
        f"small_run({workdir!r})\n"
    )
    # It compiles what this process did, for as many devices.
    kept = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    kept |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | kept,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert [row["step"] for row in read_metrics(workdir)] == [1, 2]  # those of the checkpoint
    assert manager.find_step(workdir)[1] == 2
    small_run(workdir)
    _equal(workdir, whole)
    files = fsspec.filesystem("s3").find("bucket/killed")
    names = {name.removeprefix("bucket/killed/").split("/")[0] for name in files}
    assert names == {
        *("config.json", "metrics.jsonl", "checkpoints", "vocabulary.model"),
        *("report.html", "seconds.json", "goodput.json"),
    }


@pytest.mark.long
def test_a_stopped_run_goes_on_bit_for_bit_on_gcs(whole, gs, monkeypatch):
    workdir = f"{gs}/stopped"
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "reached", lambda self, step: step == 3)
        with pytest.raises(Preempted, match="step 3 is saved"):
            small_run(workdir)
    assert [row["step"] for row in read_metrics(workdir)] == [1, 2, 3]
    small_run(workdir)
    _equal(workdir, whole)


@pytest.mark.long
def test_a_model_is_loaded_and_scored_in_its_bucket(whole, s3):
    with storage.local_folder(f"{s3}/scored") as folder:
        fsspec.filesystem("file").put(f"{whole}/", f"{folder}/", recursive=True)
    workdir = f"{s3}/scored/"
    model, local = (coca_jax.load(place, devices=jax.devices()[:1]) for place in (workdir, whole))
    image = np.zeros((1, 8, 8, 3), np.uint8)
    np.testing.assert_array_equal(model.encode_image(image), local.encode_image(image))
    data = dict(builtin="scenes", split="test", objects=(1,))
    task = dict(kind="captioning", name="scenes", data=data, limit=8, java_metrics=False)
    scores = runner.run_tasks(model, [task], workdir)
    assert scores["captioning/scenes/num_examples"] == 8
    place = storage.place(workdir)
    assert len((place / "eval_captions/scenes.jsonl").read_text().splitlines()) == 9
    assert not (place / "eval_progress.json").exists()
    assert "captioning" in report.write_report(workdir).read_text()
    step = coca_jax.load(f"{workdir}checkpoints/2", devices=jax.devices()[:1])
    assert step.vocabulary.size == local.vocabulary.size


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


def _restored(folder):
    """(state, step, lines) of the newest step."""
    state = _state(0)
    checkpoints = manager.Checkpoints(folder, keep=2)
    found = checkpoints.restore_newest(state, jax.tree.map(lambda x: x.sharding, state))
    checkpoints.close()
    return found


def test_weights_that_are_not_there_are_told_before_data_are_read(folder, tmp_path, capsys):
    config = smallest_run()
    config.init_from, config.batch_size = f"{folder}/none", 8
    with pytest.raises(FileNotFoundError, match=f"no checkpoint under {folder}/none; give"):
        train(config, str(tmp_path / "run"))
    assert "reading data" not in capsys.readouterr().err


@pytest.mark.long
def test_only_whole_steps_count(folder):
    checkpoints = manager.Checkpoints(folder, keep=2)
    assert checkpoints.steps() == []
    for step in (1, 2, 3):
        checkpoints.save(step, _state(step))
        checkpoints.wait_for(step)
    checkpoints.close()
    directory, step = manager.find_step(folder)
    assert step == 3 and sorted(p.name for p in directory.iterdir()) == ["2", "3"]
    state, step, lines = _restored(folder)
    assert (step, lines) == (3, [])
    jax.tree.map(np.testing.assert_array_equal, state, _state(3))
    assert state.params["a"].sharding == _state(0).params["a"].sharding
    if not storage.is_remote(folder):
        return
    (directory / "3" / "commit_success.txt").unlink()  # as a kill within the save leaves it
    assert manager.find_step(folder)[1] == 2
    with pytest.raises(FileNotFoundError, match="no checkpoint under"):
        manager.find_step(f"{folder}/checkpoints/3")
    again = manager.Checkpoints(folder, keep=2)
    assert again.steps() == [2] and not (directory / "3").exists()
    again.save(3, _state(30))
    again.wait_for(3)
    again.close()
    jax.tree.map(np.testing.assert_array_equal, _restored(folder)[0], _state(30))


@pytest.mark.long
def test_a_damaged_step_is_set_aside(folder):
    checkpoints = manager.Checkpoints(folder)
    for step in (1, 2):
        checkpoints.save(step, _state(step))
        checkpoints.wait_for(step)
    checkpoints.close()
    system, plain = storage.filesystem(f"{folder}/checkpoints/2/params")
    largest = max(system.find(plain), key=system.size)
    data = bytearray(system.cat_file(largest))
    data[len(data) // 2] ^= 1
    system.pipe_file(largest, bytes(data))
    state, step, lines = _restored(folder)
    jax.tree.map(np.testing.assert_array_equal, state, _state(1))
    assert step == 1 and "checkpoint 2 is damaged" in lines[0]
    assert lines[1:] == ["going on from step 1, 1 steps are trained again"]
    assert manager.find_step(folder)[1] == 1
    place = storage.place(folder) / "checkpoints"
    assert (place / "2.damaged/params").is_dir() and not (place / "2").exists()


def test_arrays_are_tried_before_any_work(folder):
    steps.check_writable(folder)
    system, plain = storage.filesystem(folder)
    assert system.find(plain) == []


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_a_bucket_that_is_not_there_ends_the_command(scheme, request, commands, tmp_path):
    request.getfixturevalue(scheme)
    where = {k: v for k, v in os.environ.items() if k not in commands.env}  # the fixture's
    command = ["train", "--config=tiny", f"--workdir={scheme}://nowhere/run"]
    done = commands.run(command, tmp_path, where, timeout=200)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {scheme}://nowhere/run: there is no bucket 'nowhere'")
    assert done.stderr.count("\n") == 1


def test_arrays_are_written_with_the_credentials_that_s3fs_finds(tmp_path, monkeypatch):
    session = pytest.importorskip("botocore.session", reason="needs the extra 's3'")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    keys, config, none = (str(tmp_path / name) for name in ("keys", "config", "none"))
    pathlib.Path(keys).write_text("[mine]\naws_access_key_id = a\naws_secret_access_key = b\n")
    made = json.dumps(dict(Version=1, AccessKeyId="a", SecretAccessKey="b"))
    pathlib.Path(config).write_text(f"[profile made]\ncredential_process = echo '{made}'\n")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")

    def found(profile=None, credentials_file=keys, config_file=config):
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", credentials_file)
        monkeypatch.setenv("AWS_CONFIG_FILE", config_file)
        here = session.Session(profile=profile)
        return steps._credentials(here, here.get_credentials())

    files = dict(config_file=config, credentials_file=keys)
    assert found("mine") == dict(type="profile", profile="mine", **files)
    files = dict(
        config_file=os.devnull, credentials_file=keys
    )  # TensorStore logs what is not there
    assert found("mine", config_file=none) == dict(type="profile", profile="mine", **files)
    assert found("made") == dict(type="default", profile="made")
    assert found(None, none, none) == dict(type="anonymous")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    assert found() == dict(type="environment")
