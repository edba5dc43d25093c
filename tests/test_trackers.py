"""Trackers: what each holds of a run, offline, and that none of them can stop one."""

import importlib.machinery
import importlib.util
import json
import math
import os
import pathlib
import re
import sqlite3
import subprocess
import sys
import types

import pytest
from conftest import tiny_config

from coca_jax.config import typed
from coca_jax.config.log import TRACKERS
from coca_jax.runtime import metric_log
from coca_jax.training import setup, trackers

ROOT = pathlib.Path(__file__).resolve().parent.parent
VALUES = {"loss": 1.5, "contrastive_loss/label": 0.25, "gradient_norm": math.nan}


def write_run(name, workdir, start=0, steps=(1, 2)):
    found = trackers.open_all((name,), workdir, start, dict(seed=7))
    writer = metric_log.MetricWriter(workdir, start_step=start, trackers=found)
    for step in steps:
        writer.write(step, VALUES | {"loss": 1.5 * step})
    writer.close()


@pytest.fixture
def tensorboard_x(monkeypatch):
    """The package, which may stand beside the environment, see .ci/run: inside, every run of a
    process would write its files."""
    beside = os.environ.get("COCA_JAX_TRACKERS", str(ROOT / ".venv" / "tracker-packages"))
    before = set(sys.modules)
    if importlib.util.find_spec("tensorboardX") is None and os.path.isdir(beside):
        monkeypatch.syspath_prepend(beside)
        places = [os.environ.get("PYTHONPATH", ""), beside]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, places)))
    if importlib.util.find_spec("tensorboardX") is None:
        pytest.skip("needs the extra 'tensorboard'")
    yield
    for name in set(sys.modules) - before:
        if (
            name.partition(".")[0] == "tensorboardX"
            or name == "coca_jax.training.trackers.tensorboard"
        ):
            del sys.modules[name]


def events_of(workdir):
    """Event protos of all files, the oldest file first."""
    from coca_jax.training.trackers.tensorboard import (
        event_pb2,  # by itself the package takes torch in
    )

    found = []
    for file in sorted((workdir / "tensorboard").iterdir(), key=lambda f: f.stat().st_mtime_ns):
        data = file.read_bytes()
        while data:  # records: length uint64, its checksum uint32, bytes, their checksum uint32
            length = int.from_bytes(data[:8], "little")
            found.append(event_pb2.Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def test_tensorboard_file_holds_the_scalars_without_tensorflow(tmp_path, tensorboard_x):
    code = f"""
import sys
from coca_jax.training import trackers
(tracker,) = trackers.open_all(("tensorboard",), {str(tmp_path)!r}, 0, {{}})
tracker.write(3, {{"loss": 1.5, "contrastive_loss/label": 0.5}})
tracker.flush()
assert not {{"tensorflow", "torch", "boto3", "google.cloud.storage"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    first, second = events_of(tmp_path)
    assert first.file_version == "brain.Event:2" and second.step == 3
    found = {value.tag: value.simple_value for value in second.summary.value}
    assert found == {"loss": 1.5, "contrastive_loss/label": 0.5}


def test_tensorboard_drops_steps_that_a_resumed_run_does_again(tmp_path, tensorboard_x):
    write_run("tensorboard", tmp_path, steps=(1, 2, 3))
    write_run("tensorboard", tmp_path, start=2, steps=(3, 4))
    (restart,) = [event for event in events_of(tmp_path) if event.HasField("session_log")]
    assert restart.step == 3  # TensorBoard purges what it has of this step and later ones
    steps = [event.step for event in events_of(tmp_path) if event.HasField("summary")]
    assert steps == [1, 2, 3, 3, 4]
    assert [row["step"] for row in metric_log.read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_wandb_takes_a_run_offline_and_goes_on_with_the_same_one(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs the extra 'wandb'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    workdir = tmp_path / "mine"
    write_run("wandb", workdir)
    write_run("wandb", workdir, start=2, steps=(3,))
    wandb.teardown()  # its process has written all when it has ended
    folders = list((workdir / "wandb").glob("offline-run-*"))
    name = json.loads((workdir / trackers.NAMES_FILE).read_text())["wandb"]
    assert len(folders) == 2 and all(folder.name.endswith(name) for folder in folders)
    assert name.startswith("mine-")
    held = b"".join(file.read_bytes() for f in folders for file in f.glob("*.wandb"))
    assert b"contrastive_loss/label" in held
    assert b"4.5" in held


def test_trackio_takes_a_run_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("trackio", reason="needs the extra 'trackio'")
    workdir = tmp_path / "mine"
    code = f"""
import sys
sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
from test_trackers import write_run
write_run("trackio", {str(workdir)!r})
"""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (database,) = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(database) as opened:
        rows = opened.execute("select step, metrics from metrics order by step").fetchall()
    found = {step: json.loads(text) for step, text in rows}
    assert set(found) == {1, 2} and found[2]["loss"] == 3.0 and "gradient_norm" not in found[2]


class Service(types.ModuleType):
    """In the place of a service's package: what it was asked and told."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.runs, self.told, self.ended = [], [], 0

    def init(self, **how):
        self.runs.append(how)
        return self

    def log(self, values, step):
        self.told.append((step, values))

    def finish(self):
        self.ended += 1


@pytest.fixture
def service(request, monkeypatch):
    """A `Service` of that name, for this test alone."""
    stand_in = Service(request.param)
    own = f"coca_jax.training.trackers.{request.param}"
    monkeypatch.setitem(sys.modules, request.param, stand_in)
    monkeypatch.delitem(sys.modules, own, raising=False)
    monkeypatch.setenv(f"{request.param.upper()}_PROJECT", "ours")
    yield stand_in
    sys.modules.pop(own, None)


@pytest.mark.parametrize("service", ["wandb", "trackio"], indirect=True)
def test_a_service_gets_each_step_and_the_same_run_when_it_goes_on(service, tmp_path):
    """Without its package: what it is asked and told. With it, see above."""
    name, workdir = service.__name__, tmp_path / "mine"
    write_run(name, workdir)
    write_run(name, workdir, start=2, steps=(3,))
    first, second = service.runs
    assert first == second and service.ended == 2
    assert first["name"].startswith("mine-") and len(first["name"]) == len("mine-") + 8
    assert (first["project"], first["resume"], first["config"]) == ("ours", "allow", {"seed": 7})
    if name == "wandb":
        assert first["id"] == first["name"] and first["dir"] == str(workdir)
    assert [(step, told["loss"]) for step, told in service.told] == [(1, 1.5), (2, 3.0), (3, 4.5)]
    assert all(told["contrastive_loss/label"] == 0.25 for _, told in service.told)
    finite = [all(map(math.isfinite, told.values())) for _, told in service.told]
    assert finite == [name == "trackio"] * 3  # W&B shows NaN as such


@pytest.mark.parametrize("harm", ["", "[]", '{"wandb": "mi'])
def test_damaged_names_of_a_run_are_a_line_that_says_what_to_do(tmp_path, harm):
    name = trackers.run_name(tmp_path, "wandb")
    file = tmp_path / trackers.NAMES_FILE
    whole = file.read_text()
    file.write_text(harm)
    with pytest.raises(
        ValueError, match="trackers.json is damaged .*; restore it, or dele"
    ) as told:
        trackers.run_name(tmp_path, "wandb")
    assert "\n" not in str(told.value) and file.read_text() == harm
    file.write_text(whole)
    assert trackers.run_name(tmp_path, "wandb") == name


def test_a_tracker_that_fails_is_said_once_and_the_run_goes_on(tmp_path, caplog):
    class Failing:
        def write(self, step, values):
            raise ConnectionError("server gone")

        flush = close = None

    writer = metric_log.MetricWriter(
        tmp_path, trackers=[trackers.FaultTolerant("wandb", Failing())]
    )
    for step in (1, 2):
        writer.write(step, VALUES)
    writer.flush()
    writer.close()
    assert [row["step"] for row in metric_log.read_metrics(tmp_path)] == [1, 2]
    assert sum("server gone" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("service", ["wandb"], indirect=True)
@pytest.mark.parametrize("kind", [RuntimeError, ValueError])  # as UnicodeError, JSONDecodeError
def test_a_tracker_that_cannot_be_opened_ends_no_run_that_goes_on(
    service, kind, tmp_path, monkeypatch, caplog
):
    def refuse(**how):
        raise kind("no network")

    monkeypatch.setattr(service, "init", refuse)
    with pytest.raises(ValueError, match=r"log.trackers=.*wandb.*no network"):
        trackers.open_all(("wandb",), tmp_path, 0, {})
    assert trackers.open_all(("wandb",), tmp_path, 5, {}) == []
    assert sum("(no network)" in one.getMessage() for one in caplog.records) == 1
    (tmp_path / trackers.NAMES_FILE).write_text("[")
    with pytest.raises(ValueError, match="is damaged"):
        trackers.open_all(("wandb",), tmp_path, 5, {})


def test_a_tracker_that_is_not_installed_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setitem(TRACKERS, "wandb", "no_such_package")
    monkeypatch.setitem(TRACKERS, "tensorboard", "no_such_package")
    config = tiny_config()
    config.data.sources = (dict(builtin="scenes", split="train", kind="caption"),)
    config.log.trackers = ("wandb",)
    with pytest.raises(ValueError, match="log.trackers=.*wandb needs"):
        setup.check(typed(config), str(tmp_path))
    assert trackers.open_all(("tensorboard",), tmp_path, 0, {}) == []  # nobody asked for it
    with pytest.raises(ValueError, match="log.trackers=.*tensorboard needs"):
        trackers.check(("tensorboard",), asked=True)
    config.log.trackers = ("mlflow",)
    with pytest.raises(ValueError, match="log.trackers"):
        typed(config)


@pytest.mark.parametrize(
    "folder, start",
    [
        ("lr:1e-4 [2]", "lr-1e-4--2-"),
        ("50%?", "50--"),
        ("n" * 200, "n" * 100),
        ("caf\udce9", "caf-"),
        ("größe_1.a-b", "größe_1.a-b"),
    ],
)
def test_a_run_s_name_is_an_id(folder, start, tmp_path):
    """Of any folder: W&B takes none with / \\ # ? % or :, nor one of more than 128 letters."""
    (tmp_path / folder).mkdir()
    name = trackers.run_name(tmp_path / folder, "wandb")
    assert re.fullmatch(re.escape(start) + "-[0-9a-f]{8}", name) and len(name) <= 128
    assert trackers.run_name(tmp_path / folder, "wandb") == name
