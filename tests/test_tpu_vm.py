"""launch/tpu_vm.sh and worker.sh: what they ask of gcloud, and of train on a worker."""

import os
import shutil
import subprocess

import launch_stand_ins
import pytest
from launch_stand_ins import LAUNCH, launch

FLAGS = ["--", "--config=configs/coca_2b.py", "--workdir=gs://bucket/a run"]
TPU = {"NAME": "coca", "ZONE": "us-central2-b", "TYPE": "v4-4096"}


def test_tpu_pod_quotes_train_s_flags_for_the_workers():
    done = launch("tpu_vm.sh", "run", "--dry_run", *FLAGS, **TPU)
    # Undo this machine's quoting, then the worker's shell: the flag must be whole.
    (line,) = done.stdout.splitlines()
    (command,) = [w for w in words(line) if w.startswith("--command=")]
    assert words(command.split("worker.sh run ")[1]) == FLAGS[1:]


def words(line):
    done = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True)
    return done.stdout.splitlines()


@pytest.mark.parametrize("missing", ["NAME", "ZONE", "TYPE"])
def test_tpu_pod_names_the_missing_setting(missing):
    env = {k: v for k, v in TPU.items() if k != missing}
    done = launch("tpu_vm.sh", "create", "--dry_run", **env)
    assert done.returncode == 2 and f"set {missing}" in done.stderr


@pytest.mark.parametrize("command", ["run", "all"])
@pytest.mark.parametrize("flags", [["--config=tiny"], ["--config=tiny", "--workdir=runs/a"]])
def test_tpu_pod_wants_a_workdir_that_all_workers_see_before_it_rents_one(command, flags):
    done = launch("tpu_vm.sh", command, "--dry_run", "--", *flags, **TPU)
    assert done.returncode == 2 and "give gs://BUCKET/run, or the full path" in done.stderr
    assert not done.stdout


def changes(folder):
    """What gcloud was asked to do, looks apart, each once in a row."""
    verbs = [line.split()[3] for line in (folder / "calls").read_text().splitlines()]
    verbs = [verb for verb in verbs if verb != "describe"]
    return [verb for i, verb in enumerate(verbs) if i == 0 or verb != verbs[i - 1]]


@pytest.mark.parametrize(
    ("queue", "asked"),
    [
        ("WAITING_FOR_RESOURCES WAITING_FOR_RESOURCES PROVISIONING ACTIVE", []),
        ("SUSPENDING SUSPENDED", ["delete", "create"]),
        ("DELETING FAILED", ["delete", "create"]),
    ],
)
def test_all_given_again_goes_on_with_a_request_that_waits_and_asks_anew_for_a_dead_one(
    queue, asked, tmp_path
):
    python, calls = launch_stand_ins.train_with(tmp_path, [0])
    env = launch_stand_ins.cloud(tmp_path) | python | {"EXTRAS": ""}
    (tmp_path / "queue").write_text(queue)
    (tmp_path / "type").write_text("v4-8")
    done = launch("tpu_vm.sh", "all", *FLAGS, **env)
    assert done.returncode == 0, done.stderr
    assert changes(tmp_path) == [*asked, "scp", "ssh", "delete"] and len(calls()) == 1


def test_a_request_that_comes_to_nothing_while_it_waits_is_named(tmp_path):
    env = launch_stand_ins.cloud(tmp_path)
    (tmp_path / "queue").write_text("WAITING_FOR_RESOURCES FAILED")
    (tmp_path / "type").write_text("v4-8")
    done = launch("tpu_vm.sh", "create", **env)
    assert done.returncode == 2
    assert "tpu_vm.sh: the queued resource is FAILED; the same command asks again" in done.stderr


@pytest.mark.parametrize("there", ["state", "queue"])
def test_what_has_the_name_and_is_of_another_type_is_left_alone(there, tmp_path):
    env = launch_stand_ins.cloud(tmp_path) | {"TYPE": "v4-1024"}
    (tmp_path / there).write_text("READY" if there == "state" else "WAITING_FOR_RESOURCES")
    (tmp_path / "type").write_text("v4-16")
    done = launch("tpu_vm.sh", "all", *FLAGS, **env)
    assert done.returncode == 2 and changes(tmp_path) == []
    assert done.stderr == (
        "tpu_vm.sh: coca is there and is a v4-16, not TYPE=v4-1024: give another NAME, or"
        " `delete` it first\n"
    )


def test_a_type_without_a_runtime_of_its_own_is_named():
    done = launch("tpu_vm.sh", "create", "--dry_run", **TPU | {"TYPE": "v3-8"})
    assert done.returncode == 2 and "TYPE=v3-8 is no v4-" in done.stderr
    done = launch("tpu_vm.sh", "create", "--dry_run", **TPU | {"TYPE": "v3-8", "RUNTIME": "r"})
    assert done.returncode == 0 and "--runtime-version=r" in done.stdout


@pytest.fixture
def worker(tmp_path):
    """(folder with launch/worker.sh in it, environment) where train ends at once with 0."""
    (tmp_path / "home/code/launch").mkdir(parents=True)
    shutil.copy(LAUNCH / "worker.sh", tmp_path / "home/code/launch")
    env, _ = launch_stand_ins.train_with(tmp_path, [0])
    return tmp_path / "home", env | {"PATH": os.environ["PATH"]}


@pytest.mark.parametrize("path", ["code/launch/worker.sh", "../home/code/launch/worker.sh"])
def test_a_worker_is_called_by_a_path_from_any_folder(worker, path):
    home, env = worker
    command = ["bash", path, "run", *FLAGS[1:]]
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    calls = (home.parent / "statuses.calls").read_text()
    assert calls == f"-m coca_jax.train {' '.join(FLAGS[1:])}\n"


def test_a_worker_whose_train_never_starts_says_so(worker):
    home, env = worker
    programs = {"setsid": "echo no session here >&2; exit 1", "sleep": ""}  # the wait takes no time
    for name, text in programs.items():
        launch_stand_ins.program(home / "bin" / name, f"#!/bin/sh\n{text}\n")
    env["PATH"] = f"{home}/bin:{env['PATH']}"
    command = ["bash", "code/launch/worker.sh", "run", *FLAGS[1:]]
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=60)
    told = "worker.sh: train has not started within 60 s (no session here); run this again"
    assert (done.returncode, done.stderr.strip()) == (2, told)


def test_a_worker_of_a_slice_counts_the_others(tmp_path, monkeypatch):
    """A Cloud TPU VM learns from its metadata server how many processes the run has."""
    import http.server
    import threading

    import jax

    from coca_jax.runtime import multihost

    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            assert self.headers["Metadata-Flavor"] == "Google"
            found = self.path.endswith("/worker-network-endpoints")
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(self.server.workers.encode())

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    started = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **_: started.append(a))
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    for workers, platform, want in (
        ("a:b:10.0.0.1,a:b:10.0.0.2", "JAX", 1),
        ("a:b:10.0.0.1", "JAX", 0),
        ("a:b:10.0.0.1,a:b:10.0.0.2", "", 0),
    ):
        server.workers = workers
        monkeypatch.setenv("TPU_ML_PLATFORM", platform)
        started.clear()
        multihost.start()
        assert len(started) == want
    server.shutdown()
