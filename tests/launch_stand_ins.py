"""Small programs in the place of gcloud, sbatch and Python, so that launchers run for real here.

gcloud keeps a "slice" in the folder CLOUD: each worker is a home folder in it, `ssh --command` runs
the command there, `scp` copies there. The file `queue` holds the states of a request for it, which
goes on by one whenever it is looked at, and brings the slice when it is ACTIVE. `sbatch` runs the
script that it is given, again for as long as the script puts itself back in the queue.
"""

import os
import pathlib
import shutil
import subprocess
import sys

LAUNCH = pathlib.Path(__file__).resolve().parent.parent / "launch"

GCLOUD = """
import os, pathlib, shutil, signal, subprocess, sys, time
cloud, words = pathlib.Path(os.environ["CLOUD"]), sys.argv[1:]
with (cloud / "calls").open("a") as file:
    file.write(" ".join(words).split(" --command")[0] + "\\n")
assert words[:2] == ["compute", "tpus"], words
kind, verb, *rest = words[2:]
state, homes = cloud / "state", [cloud / str(i) for i in range(int(os.environ["WORKERS"]))]
queue, type_ = cloud / "queue", cloud / "type"
options = dict(word[2:].split("=", 1) for word in rest if "=" in word)

def fault(command):
    '''Breaks a line of run as CLOUD/faults says: "drop 3" and "preempt 6", at that checkpoint.'''
    faults = cloud / "faults"
    lines = faults.read_text().splitlines() if faults.exists() else []
    train = cloud / "0/coca_jax/.worker/pid"
    if "worker.sh run" not in command or not lines:
        return None
    what, step = lines[0].split()
    faults.write_text("\\n".join(lines[1:]))
    line = subprocess.Popen(["bash", "-c", command], cwd=homes[0], start_new_session=True,
                            env={**os.environ, "HOME": str(homes[0])})
    while not train.exists():
        time.sleep(0.02)
    pid = int(train.read_text())
    os.kill(pid, signal.SIGCONT)
    while not pathlib.Path(os.environ["WORKDIR"], "checkpoints", step).exists():
        assert line.poll() is None, "train ended before its fault"
        time.sleep(0.02)
    if what == "preempt":
        os.kill(pid, signal.SIGKILL)
        state.write_text("PREEMPTED")
        queue.write_text("SUSPENDED")
    else:
        os.kill(pid, signal.SIGSTOP)  # no step before the launcher is back
    os.killpg(line.pid, signal.SIGKILL)
    line.wait()
    return 255

def look():
    file = queue if kind == "queued-resources" else state
    if not file.exists():
        sys.exit(f"ERROR: (gcloud.compute.tpus.{kind}.describe) NOT_FOUND: Resource was not found")
    now, *later = file.read_text().split()
    print(now, type_.read_text(), sep="\\t")
    if later:
        queue.write_text("\\n".join(later))
        if later[0] == "ACTIVE":
            grant()

def grant():
    state.write_text("READY")
    for home in homes:
        home.mkdir()

if verb == "create":
    if state.exists() or queue.exists():
        sys.exit("ERROR: (gcloud) ALREADY_EXISTS: Resource already exists")
    type_.write_text(options["accelerator-type"])
    if kind == "queued-resources":
        queue.write_text("ACTIVE")
    grant()
elif verb == "describe":
    look()
elif verb == "delete":
    (queue if kind == "queued-resources" else state).unlink()
    state.unlink(missing_ok=True)
    for home in homes:
        shutil.rmtree(home, ignore_errors=True)
elif state.read_text() != "READY":
    sys.exit(255)
elif verb == "scp":
    for home in homes:
        shutil.copy(rest[0], home)
elif verb == "ssh":
    status = fault(options["command"])
    if status is None:
        lines = [subprocess.Popen(["bash", "-c", options["command"]], cwd=home,
                                  env={**os.environ, "HOME": str(home)}) for home in homes]
        status = next((s for s in [line.wait() for line in lines] if s), 0)
    sys.exit(status)
"""

SBATCH = """#!/usr/bin/env bash
cat >"$SLURM/script"
export SLURM_JOB_ID=7
while true; do
  rm -f "$SLURM/requeued"
  bash "$SLURM/script"
  status=$?
  [[ -e $SLURM/requeued ]] || exit "$status"
done
"""
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/usr/bin/env bash
[[ "$*" == "requeue 7" ]] && touch "$SLURM/requeued"
"""

# Everything that a launcher asks of Python succeeds; train ends with the next of STATUSES,
# or, at "wait", when it is asked to.
PYTHON = """#!/usr/bin/env bash
[[ $1 != -ISc ]] || shift 2
[[ $1 == -m ]] || shift
if [[ "$1 $2" != "-m coca_jax.train" ]]; then exit 0; fi
echo "$@" >>"$STATUSES.calls"
status=$(head -n 1 "$STATUSES")
sed -i 1d "$STATUSES"
if [[ $status == wait ]]; then
  trap 'exit 75' TERM
  echo "waits"
  while true; do sleep 0.05; done
fi
exit "${status:-99}"
"""


def program(path, text):
    """Writes an executable file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def cloud(folder, workers=1):
    """The environment of a launcher that finds this gcloud, with no slice yet."""
    program(folder / "bin/gcloud", f"#!{sys.executable} -SE\n{GCLOUD}")  # a quicker start
    env = {"CLOUD": str(folder), "WORKERS": str(workers), "NAME": "coca", "ZONE": "z"}
    return env | {"TYPE": "v4-8", "POLL": "0", "PAUSE": "0", "PATH": path(folder / "bin")}


def slurm(folder):
    """The environment of a launcher that finds this SLURM."""
    for name, text in dict(sbatch=SBATCH, srun=SRUN, scontrol=SCONTROL).items():
        program(folder / "bin" / name, text)
    return {"SLURM": str(folder), "PAUSE": "0", "PATH": path(folder / "bin")}


def train_with(folder, statuses):
    """(environment, calls) of a VENV whose train ends with these statuses, one after the other;
    calls() are the command lines that it was given."""
    python = program(folder / "venv/bin/python", PYTHON)
    file = folder / "statuses"
    file.write_text("".join(f"{status}\n" for status in statuses))
    env = {"VENV": str(python.parent.parent), "PYTHON": str(python), "STATUSES": str(file)}

    def calls():
        done = pathlib.Path(f"{file}.calls")
        return done.read_text().splitlines() if done.exists() else []

    return env, calls


def path(first):
    """PATH with `first` ahead of the system's own folders, and git."""
    git = pathlib.Path(shutil.which("git") or "/usr/bin/git").parent
    return f"{first}:/usr/bin:/bin:{git}"


def launch(script, *arguments, cwd=None, **env):
    """Runs a launcher with this environment alone."""
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/tmp"), **env},
    )
