"""The launchers: shellcheck, what they would do (dry run), and a real run of two processes."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
FLAGS = ["--", "--config=configs/coca_2b.py", "--workdir=gs://bucket/a run"]


def launch(script, *arguments, **env):
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/tmp"), **env},
    )


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", sorted(p.name for p in LAUNCH.glob("*.sh")))
def test_shellcheck_finds_nothing(script):
    done = subprocess.run(
        ["shellcheck", "-x", f"launch/{script}"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout


def test_tpu_pod_creates_installs_runs_and_deletes():
    env = {"NAME": "coca", "ZONE": "us-central2-b", "TYPE": "v4-4096", "SPOT": "1"}
    done = launch("tpu_vm.sh", "all", "--dry_run", *FLAGS, **env)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("gcloud", "tar"))]
    assert "queued-resources create coca" in lines[0]
    assert "--accelerator-type=v4-4096" in lines[0] and "--spot" in lines[0]
    assert lines[1].startswith("tar ") and "scp" in lines[2]
    assert "--worker=all" in lines[4] and "coca_jax.train" in lines[4]
    assert "queued-resources delete coca" in lines[-1]


def test_tpu_pod_quotes_train_s_flags_for_the_workers():
    env = {"NAME": "coca", "ZONE": "z", "TYPE": "v5litepod-256"}
    done = launch("tpu_vm.sh", "run", "--dry_run", *FLAGS, **env)
    # Undo this machine's quoting, then the worker's shell: the flag must be whole.
    (line,) = done.stdout.splitlines()
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True
    ).stdout.splitlines()
    (command,) = [w for w in words if w.startswith("--command=")]
    inner = subprocess.run(
        ["bash", "-c", "printf '%s\\n' " + command.split("coca_jax.train ")[1]],
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    assert inner == FLAGS[1:]


@pytest.mark.parametrize("missing", ["NAME", "ZONE"])
def test_tpu_pod_names_the_missing_setting(missing):
    env = {"NAME": "coca", "ZONE": "z", "TYPE": "v4-8"}
    done = launch(
        "tpu_vm.sh", "create", "--dry_run", **{k: v for k, v in env.items() if k != missing}
    )
    assert done.returncode == 2 and f"set {missing}" in done.stderr


def test_gke_makes_a_jobset_with_one_pod_a_host():
    yaml = pytest.importorskip("yaml")
    env = {
        "NAME": "coca",
        "IMAGE": "gcr.io/p/coca:1",
        "ACCELERATOR": "tpu-v5-lite-podslice",
        "TOPOLOGY": "16x16",
    }
    done = launch("gke.sh", "--dry_run", *FLAGS, **env)
    assert done.returncode == 0, done.stderr
    job = yaml.safe_load(done.stdout)
    assert job["kind"] == "JobSet" and job["spec"]["failurePolicy"]["maxRestarts"] == 100
    spec = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] == 64
    pod = spec["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "16x16"
    assert pod["containers"][0]["command"] == ["python3", "-m", "coca_jax.train", *FLAGS[1:]]
    bad = launch("gke.sh", "--dry_run", *FLAGS, **(env | {"TOPOLOGY": "3x3"}))
    assert bad.returncode == 2 and "does not divide" in bad.stderr


def test_slurm_script_runs_one_task_a_gpu_and_requeues():
    done = launch("slurm.sh", "--dry_run", *FLAGS, NODES="4", GPUS="8", PARTITION="h100")
    assert done.returncode == 0, done.stderr
    for line in (
        "#SBATCH --nodes=4",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --partition=h100",
        "#SBATCH --signal=TERM@300",
    ):
        assert line in done.stdout.splitlines()
    assert "scontrol requeue" in done.stdout and "a\\ run" in done.stdout
    check = subprocess.run(["bash", "-n"], input=done.stdout, text=True, capture_output=True)
    assert check.returncode == 0, check.stderr


@pytest.mark.parametrize("script", ["gke.sh", "slurm.sh"])
def test_train_flags_are_required(script):
    env = {"NAME": "a", "IMAGE": "b", "ACCELERATOR": "c", "TOPOLOGY": "2x2"}
    done = launch(script, "--dry_run", **env)
    assert done.returncode == 2 and "after --" in done.stderr


def test_local_dry_run_prints_one_command_a_process():
    done = launch("local.sh", "3", "--dry_run", *FLAGS, PORT="4321")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 3
    for process, line in enumerate(lines):
        assert f"--process_id={process}" in line and "--coordinator=localhost:4321" in line


STAND_IN = """
import argparse, sys
parser = argparse.ArgumentParser()
for name in ("coordinator", "num_processes", "process_id", "config", "workdir"):
    parser.add_argument("--" + name)
args = parser.parse_args()
import jax
jax.distributed.initialize(args.coordinator, int(args.num_processes), int(args.process_id))
import jax.numpy as jnp
from jax.experimental import multihost_utils
total = multihost_utils.process_allgather(jnp.asarray(jax.process_index() + 1)).sum()
with open(f"{args.workdir}/{jax.process_index()}", "w") as file:
    file.write(f"{jax.device_count()} {jax.local_device_count()} {int(total)}")
"""


def stand_in(tmp_path, text):
    """A coca_jax.train of our own, ahead of the real one on the path."""
    package = tmp_path / "root" / "coca_jax"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "train.py").write_text(text)
    launchers = tmp_path / "root" / "launch"
    launchers.mkdir()
    shutil.copy(LAUNCH / "local.sh", launchers)
    return launchers / "local.sh"


def local(script, *arguments, **env):
    return subprocess.run(
        ["bash", str(script), *arguments],
        capture_output=True,
        text=True,
        cwd=script.parent.parent,
        env={"PATH": os.environ["PATH"], "PYTHON": sys.executable, **env},
        timeout=120,
    )


def test_local_really_runs_two_processes_of_two_devices(tmp_path):
    script = stand_in(tmp_path, STAND_IN)
    done = local(script, "2", "--devices=2", "--", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stderr[-2000:]
    for process in "01":
        assert (tmp_path / process).read_text() == "4 2 3"


def test_local_stops_the_rest_when_one_process_fails(tmp_path):
    script = stand_in(
        tmp_path,
        "import sys, time\nif '--process_id=1' in sys.argv: sys.exit(3)\ntime.sleep(60)\n",
    )
    assert local(script, "2", "--", "--workdir=x").returncode == 3


def test_local_restarts_a_run_that_was_asked_to_stop(tmp_path):
    script = stand_in(
        tmp_path,
        "import pathlib, sys\n"
        "mark = pathlib.Path(sys.argv[-1].split('=')[1])\n"
        "if '--process_id=0' in sys.argv:\n"
        "    mark.write_text(mark.read_text() + 'x' if mark.exists() else 'x')\n"
        "    sys.exit(75 if mark.read_text() == 'x' else 0)\n",
    )
    mark = tmp_path / "mark"
    assert local(script, "1", "--", f"--workdir={mark}", RESTARTS="2").returncode == 0
    assert mark.read_text() == "xx"
    assert local(script, "1", "--", f"--workdir={tmp_path}/other").returncode == 75


@pytest.mark.parametrize("arguments", [[], ["--config.seed=1"], ["runs/other", "--config.seed=1"]])
def test_the_demo_installs_the_package_alone_and_passes_its_flags_on(tmp_path, arguments):
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/usr/bin/env bash\necho "$@" >> {tmp_path}/calls\n')
    python.chmod(0o755)
    env = {"VENV": str(tmp_path / "venv"), "PYTHON": sys.executable}
    done = launch("demo.sh", *arguments, **env)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert f"-m pip install --quiet --editable {ROOT}" in calls
    workdir = arguments[0] if len(arguments) == 2 else "runs/demo"
    flags = f"--config=configs/demo.py --workdir={workdir}" + " --config.seed=1" * bool(arguments)
    assert f"-m coca_jax.train {flags}" in calls
