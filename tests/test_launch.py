"""The launchers: shellcheck, one table of exit statuses, the quoting of flags, manifests."""

import os
import re
import shutil
import subprocess
import sys

import launch_stand_ins
import pytest
from launch_stand_ins import LAUNCH, launch

ROOT = LAUNCH.parent
FLAGS = ["--", "--config=configs/coca_2b.py", "--workdir=gs://bucket/a run"]
GKE = {"NAME": "coca", "IMAGE": "gcr.io/p/coca:1"}
SLICE = GKE | {"ACCELERATOR": "tpu-v5-lite-podslice", "TOPOLOGY": "16x16"}
GPUS = GKE | {"ACCELERATOR": "nvidia-h100-80gb", "NODES": "2"}


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", sorted(p.name for p in LAUNCH.glob("*.sh")))
def test_shellcheck_finds_nothing(script):
    done = subprocess.run(
        ["shellcheck", "-x", f"launch/{script}"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout


# What train ends with, life by life, where one restart after a failure is allowed: the last is what
# the launcher ends with.
TABLE = {
    "done": [0],
    "bad input": [2],
    "a second Ctrl-C": [130],
    "asked to stop, as often as it comes": [75, 75, 75, 75, 0],
    "asked to stop before Python was up": [143, 143, 143, 0],
    "failures, to a bound": [1, 137],
    "a failure, then a stop": [134, 75, 0],
    "bad input after a failure": [1, 2],
}


@pytest.fixture(params=["local.sh", "tpu_vm.sh", "slurm.sh"])
def launcher(request, tmp_path):
    """(environment, command line before train's flags)"""
    if request.param == "local.sh":
        return {"PATH": os.environ["PATH"], "PORT": "1", "PAUSE": "0"}, ["local.sh", "1"]
    if request.param == "tpu_vm.sh":
        return launch_stand_ins.cloud(tmp_path) | {"EXTRAS": ""}, ["tpu_vm.sh", "all"]
    return launch_stand_ins.slurm(tmp_path), ["slurm.sh"]


@pytest.mark.parametrize("statuses", TABLE.values(), ids=TABLE)
def test_a_launcher_starts_a_run_again_by_the_table(launcher, statuses, tmp_path):
    env, command = launcher
    python, calls = launch_stand_ins.train_with(tmp_path, statuses)
    done = launch(*command, *FLAGS, **env, **python, RESTARTS="1")
    assert len(calls()) == len(statuses), done.stderr
    assert done.returncode == statuses[-1], done.stderr
    assert all(call.endswith(" ".join(FLAGS[1:])) for call in calls())


def manifest(env, *flags):
    yaml = pytest.importorskip("yaml")
    done = launch("gke.sh", "--dry_run", *(flags or FLAGS), **env)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


@pytest.mark.parametrize(
    ("status", "action"),
    [
        (2, "FailJobSet"),
        (130, "FailJobSet"),
        (75, "RestartJobSetAndIgnoreMaxRestarts"),
        (143, "RestartJobSetAndIgnoreMaxRestarts"),
        (1, "RestartJobSet"),
        (137, "RestartJobSet"),
    ],
)
def test_gke_starts_a_run_again_by_the_table(status, action):
    spec = manifest(SLICE | {"RESTARTS": "5"})["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 5
    job = spec["replicatedJobs"][0]["template"]["spec"]
    codes = job["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert (codes["operator"], codes["containerName"]) == ("In", "train")
    assert job["template"]["spec"]["containers"][0]["name"] == "train"
    # As Kubernetes and JobSet do: the job's reason and message, then the first rule that fits.
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    if status in codes["values"]:
        reason = "PodFailurePolicy"
        message = f"Container train for pod d/p failed with exit code {status} matching FailJob"
        message += " rule at index 0"
    assert action == next(
        (
            rule["action"]
            for rule in spec["failurePolicy"]["rules"]
            if reason in rule["onJobFailureReasons"]
            and any(re.search(p, message) for p in rule.get("onJobFailureMessagePatterns", [""]))
        ),
        "RestartJobSet",
    )


@pytest.mark.parametrize("env", [SLICE, GPUS], ids=["TPU", "GPU"])
@pytest.mark.parametrize("workdir", ["gs://bucket/run", "/mnt/bucket/run"])
def test_gke_s_job_is_one_that_kubernetes_knows(env, workdir):
    validate = pytest.importorskip("kubernetes_validate")
    job = manifest(env, "--", f"--workdir={workdir}")
    template = job["spec"]["replicatedJobs"][0]["template"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, **template}
    validate.validate(job, "1.34", strict=True)
    pod = template["spec"]["template"]
    mounts = [m["mountPath"] for m in pod["spec"]["containers"][0]["volumeMounts"]]
    volumes = {v["name"]: v for v in pod["spec"]["volumes"]}
    assert ("/mnt/bucket" in mounts) == ("bucket" in volumes) == workdir.startswith("/mnt")
    if "bucket" in volumes:
        assert volumes["bucket"]["csi"]["volumeAttributes"]["bucketName"] == "bucket"
        assert pod["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}


def test_gke_gives_a_slice_one_pod_a_host_and_gpu_nodes_each_other():
    job = manifest(SLICE)["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 64
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "16x16"
    assert pod["containers"][0]["command"] == ["python3", "-m", "coca_jax.train", *FLAGS[1:]]
    seventh = manifest(SLICE | {"ACCELERATOR": "tpu7x", "TOPOLOGY": "4x4x4"})
    job = seventh["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == 16
    job = manifest(GPUS)["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert job["parallelism"] == 2 and container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert container["command"][3:6] == [
        "--coordinator=coca-workers-0-0.coca:8476",
        "--num_processes=2",
        "--process_id=$(JOB_COMPLETION_INDEX)",
    ]


def test_gke_quotes_whatever_it_is_given():
    odd = 'a "b" \\ $(HOME)\n: {'
    job = manifest(SLICE | {"IMAGE": 'i: "x"'}, "--", "--workdir=gs://b/r", f"--x={odd}")
    (container,) = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ]
    assert container["image"] == 'i: "x"'
    assert container["command"][-1] == "--x=" + odd.replace("$(", "$$(")  # Kubernetes' own quoting


@pytest.mark.parametrize(
    ("env", "flags", "named"),
    [
        (SLICE | {"TOPOLOGY": "3x3"}, FLAGS, "does not divide"),
        (SLICE | {"NAME": "Coca 1"}, FLAGS, "NAME=Coca 1"),
        (SLICE, ["--", "--workdir=runs/a"], "--workdir=runs/a"),
        (SLICE | {"ACCELERATOR": "v5e"}, FLAGS, "ACCELERATOR=v5e; it is a node label"),
        (SLICE | {"RESTARTS": "many"}, FLAGS, "RESTARTS=many"),
        (SLICE, [], "after --"),
    ],
)
def test_gke_names_what_is_wrong(env, flags, named):
    done = launch("gke.sh", "--dry_run", *flags, **env)
    assert done.returncode == 2 and named in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("script", "setting", "value"),
    [
        *(("local.sh", name, value) for name in ("GRACE", "ABORT") for value in ("1h30", "60 ")),
        ("local.sh", "PORT", "http"),
        ("local.sh", "PAUSE", "010"),
        ("tpu_vm.sh", "POLL", "30s"),
        *(("slurm.sh", name, "none") for name in ("NODES", "GPUS", "CPUS", "TIME")),
        ("slurm.sh", "GRACE", "0"),
    ],
)
def test_a_setting_that_is_no_number_is_refused_before_anything_runs(script, setting, value):
    before = {"local.sh": ["2"], "tpu_vm.sh": ["all"]}.get(script, [])
    env = {"NAME": "coca", "ZONE": "z", "TYPE": "v4-8", setting: value}
    done = launch(script, *before, "--dry_run", *FLAGS, **env)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"{script}: {setting}={value}; ")


@pytest.mark.parametrize("script", ["tpu_vm.sh", "gke.sh", "slurm.sh"])
@pytest.mark.parametrize(
    ("flags", "taken"),
    [
        (["--workdir", "/mnt/b/run"], True),
        (["--workdir=runs/a", "--workdir=/mnt/b/run"], True),
        (["--config=tiny", "--workdir"], False),
    ],
    ids=["two words", "the last of two", "no value"],
)
def test_a_workdir_is_taken_in_each_form_that_train_takes(script, flags, taken):
    command = [script, "run"] if script == "tpu_vm.sh" else [script]
    done = launch(*command, "--dry_run", "--", *flags, **SLICE, ZONE="z")
    assert done.returncode == (0 if taken else 2), done.stderr
    assert not taken or flags[-1] in done.stdout
    assert taken or "--workdir=" in done.stderr


@pytest.mark.parametrize("limit", ["90", "1:30:00", "2-12", "1-0:30:00", "UNLIMITED"])
def test_slurm_takes_its_forms_of_a_time(limit):
    done = launch("slurm.sh", "--dry_run", *FLAGS, TIME=limit)
    assert f"#SBATCH --time={limit}" in done.stdout.splitlines(), done.stderr


def test_slurm_script_runs_one_task_a_gpu():
    done = launch("slurm.sh", "--dry_run", *FLAGS, NODES="4", GPUS="8", PARTITION="h100")
    assert done.returncode == 0, done.stderr
    for line in (
        "#SBATCH --nodes=4",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --partition=h100",
        "#SBATCH --signal=TERM@300",
    ):
        assert line in done.stdout.splitlines()
    check = subprocess.run(["bash", "-n"], input=done.stdout, text=True, capture_output=True)
    assert check.returncode == 0, check.stderr


def test_slurm_s_setup_may_read_variables_that_nobody_has_set(tmp_path):
    """As the scripts do that `conda activate` and `module load` run."""
    python, calls = launch_stand_ins.train_with(tmp_path, [0])
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python3").symlink_to(python["PYTHON"])
    env = launch_stand_ins.slurm(tmp_path) | {"STATUSES": python["STATUSES"]}
    done = launch("slurm.sh", *FLAGS, **env, SETUP='echo "in $NO_SUCH_VARIABLE."')
    assert (done.returncode, done.stdout, done.stderr) == (0, "in .\n", "")
    assert len(calls()) == 1


def test_slurm_wants_a_workdir():
    done = launch("slurm.sh", "--dry_run", "--", "--config=tiny")
    assert done.returncode == 2 and "give --workdir=DIR behind --" in done.stderr


def test_slurm_names_the_environment_that_is_not_there(tmp_path):
    env = launch_stand_ins.slurm(tmp_path) | {"VENV": str(tmp_path / "none")}
    done = launch("slurm.sh", *FLAGS, **env)
    assert done.returncode == 2 and f"{tmp_path}/none/bin/python" in done.stderr


@pytest.mark.parametrize("script", ["gke.sh", "slurm.sh", "local.sh", "tpu_vm.sh"])
def test_train_flags_are_required(script):
    before = {"local.sh": ["2"], "tpu_vm.sh": ["all"]}.get(script, [])
    done = launch(script, *before, "--dry_run", **SLICE, **{"ZONE": "z"})
    assert done.returncode == 2 and "after --" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["--config.seed=1"], ["runs/other", "--config.seed=1"]])
def test_the_demo_installs_the_package_alone_and_passes_its_flags_on(tmp_path, arguments):
    python = tmp_path / "venv" / "bin" / "python"
    launch_stand_ins.program(python, f'#!/usr/bin/env bash\necho "$@" >> {tmp_path}/calls\n')
    env = {"VENV": str(tmp_path / "venv"), "PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    done = launch("demo.sh", *arguments, **env)
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    assert f"-m pip install --quiet --editable {ROOT}" in calls
    workdir = arguments[0] if len(arguments) == 2 else "runs/demo"
    flags = f"--config=configs/demo.py --workdir={workdir}" + " --config.seed=1" * bool(arguments)
    assert f"-m coca_jax.train {flags}" in calls


def test_the_demo_draws_its_pictures_in_a_folder_of_any_name(tmp_path):
    call = f'[[ $1 != -c ]] || exec {sys.executable} "$@"'  # of all Python, this is for real
    launch_stand_ins.program(tmp_path / "venv/bin/python", f"#!/usr/bin/env bash\n{call}\n")
    env = {"VENV": str(tmp_path / "venv"), "PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}
    done = launch("demo.sh", str(tmp_path / 'it\'s a "run"'), **env)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / 'it\'s a "run"/images').glob("*.png"))) == 12


@pytest.mark.parametrize("script", ["gke.sh", "slurm.sh", "local.sh", "tpu_vm.sh", "install.sh"])
def test_help_is_the_head_of_the_script(script):
    done = launch(script, "--help")
    head = (LAUNCH / script).read_text().split("\nset -euo")[0].splitlines()[1:]
    assert done.returncode == 0
    assert done.stdout.splitlines() == [re.sub("^# ?", "", line) for line in head]
