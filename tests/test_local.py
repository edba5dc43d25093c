"""launch/local.sh: real processes, deaths and stops of them, and Ctrl-C in a terminal."""

import functools
import os
import pathlib
import pty
import shutil
import signal
import subprocess
import sys
import time

import pytest
from launch_stand_ins import program

LAUNCH = pathlib.Path(__file__).resolve().parent.parent / "launch"

# A program of two processes, which the first life of process 1 leaves in start-up.
JOINED = """
import os, pathlib, signal, sys
flags = dict(word[2:].split("=", 1) for word in sys.argv[1:])
mine, workdir = int(flags["process_id"]), pathlib.Path(flags["workdir"])
import jax
jax.distributed.initialize(flags["coordinator"], int(flags["num_processes"]), mine)
if mine == 1 and not (workdir / "died").exists():
    (workdir / "died").touch()
    os.kill(os.getpid(), signal.SIGKILL)
import jax.numpy as jnp
from jax.experimental import multihost_utils
total = multihost_utils.process_allgather(jnp.asarray(mine + 1)).sum()
(workdir / str(mine)).write_text(f"{jax.device_count()} {jax.local_device_count()} {int(total)}")
"""

# Counts what it is asked; TERM and INT end it as they end train.
ASKED = """
import pathlib, signal, sys, time
flags = dict(word[2:].split("=", 1) for word in sys.argv[1:])
mine, asked = pathlib.Path(flags["workdir"], flags["process_id"]), []
def ask(number, frame):
    asked.append(signal.Signals(number).name)
    mine.write_text(" ".join(asked))
signal.signal(signal.SIGTERM, ask)
signal.signal(signal.SIGINT, ask)
mine.write_text("")
while len(asked) < int(flags["patience"]):
    time.sleep(0.02)
time.sleep(0.3)
sys.exit(75 if len(asked) == 1 else 130)
"""


PRINTS = """#!/usr/bin/env bash
[[ $1 != -ISc ]] || shift 3
printf '%s\\n' "$XLA_FLAGS" "$JAX_PLATFORMS" "$PYTHONPATH" "$@"
"""


def stand_in(tmp_path, text):
    """local.sh beside a coca_jax.train of our own, ahead of the real one on the path."""
    package = tmp_path / "root" / "coca_jax"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "train.py").write_text(text)
    launchers = tmp_path / "root" / "launch"
    launchers.mkdir()
    for name in ("local.sh", "restarts.sh"):
        shutil.copy(LAUNCH / name, launchers)
    return launchers / "local.sh"


def environment(**env):
    return {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "PAUSE": "0", **env}


def local(script, *arguments, seconds=120, **env):
    return subprocess.run(
        ["bash", str(script), *arguments],
        capture_output=True,
        text=True,
        cwd=script.parent.parent,
        env=environment(**env),
        timeout=seconds,
    )


def test_a_process_killed_in_start_up_ends_the_other_and_both_start_again(tmp_path):
    """Of two devices each, with which they join then."""
    script = stand_in(tmp_path, JOINED)
    flags = ["--devices=2", "--", f"--workdir={tmp_path}"]
    done = local(script, "2", *flags, ABORT="1", RESTARTS="1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "train failed (status 137): starting it again in 0 s (1 of 1)" in done.stderr
    assert [(tmp_path / process).read_text() for process in "01"] == ["4 2 3", "4 2 3"]


LIVES = """
import os, pathlib, signal, sys, time
flags = dict(word[2:].split("=", 1) for word in sys.argv[1:])
lives = pathlib.Path(flags["workdir"], "lives" + flags["process_id"])
with lives.open("a") as file:
    file.write("x")
if len(lives.read_text()) > 1:
    sys.exit(0)
"""


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("time.sleep(0.3); sys.exit(3)", "time.sleep(60)"),
        ("time.sleep(0.3); sys.exit(75)", "os.kill(os.getpid(), signal.SIGSTOP)"),
        (
            "time.sleep(0.3); os.kill(os.getpid(), signal.SIGKILL)",
            "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)",
        ),
    ],
    ids=["one fails", "one is stopped", "one is deaf to SIGTERM"],
)
def test_what_is_left_when_one_has_ended_ends_within_a_bound_and_starts_again(
    tmp_path, first, second
):
    text = LIVES + f"if flags['process_id'] == '0':\n    {first}\nelse:\n    {second}\n"
    script = stand_in(tmp_path, text)
    done = local(script, "2", "--", f"--workdir={tmp_path}", GRACE="1", ABORT="1", RESTARTS="1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "lives0").read_text() == (tmp_path / "lives1").read_text() == "xx"
    assert "Killed" not in done.stderr and "Terminated" not in done.stderr


def test_after_bad_input_the_others_say_for_themselves_what_is_wrong(tmp_path):
    """Asked to stop, they would say that no step is lost and the same command goes on."""
    text = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit('go on'))\n"
    text += "time.sleep(0.6 * sys.argv.count('--process_id=1'))\n"
    text += "print('bad input', file=sys.stderr)\nsys.exit(2)\n"
    done = local(stand_in(tmp_path, text), "2", "--", "--workdir=x", ABORT="60")
    assert done.returncode == 2
    assert done.stderr.count("bad input\n") == 2 and "go on" not in done.stderr, done.stderr


TOGETHER = """
import pathlib, signal, sys, time
flags = dict(word[2:].split("=", 1) for word in sys.argv[1:])
up = pathlib.Path(flags["workdir"])
signal.signal(signal.SIGTERM, signal.SIG_IGN)
(up / flags["process_id"]).touch()
while flags["process_id"] != "0" or len(list(up.iterdir())) < 8:
    time.sleep(0.02)
sys.exit(3)
"""


def test_of_processes_that_are_killed_in_one_instant_none_is_waited_for_for_ever(tmp_path):
    script = stand_in(tmp_path, TOGETHER)
    (tmp_path / "up").mkdir()
    done = local(
        script, "8", "--", f"--workdir={tmp_path / 'up'}", ABORT="0", RESTARTS="0", seconds=60
    )
    assert done.returncode == 3
    assert "killing 7 process(es) that did not end" in done.stderr


@pytest.mark.parametrize(("patience", "status"), [(1, 75), (2, 130)])
def test_each_ctrl_c_in_a_terminal_reaches_each_process_once(tmp_path, patience, status):
    script = stand_in(tmp_path, ASKED)
    command = ["bash", str(script), "2", "--"]
    command += [f"--workdir={tmp_path}", f"--patience={patience}"]
    terminal, inner = pty.openpty()
    own = "import fcntl, os, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)"
    own += "; signal.signal(signal.SIGINT, signal.SIG_DFL)"  # one behind & ignores it
    process = subprocess.Popen(
        [sys.executable, "-c", own + "; os.execvp(sys.argv[1], sys.argv[1:])", *command],
        stdin=inner,
        stdout=inner,
        stderr=inner,
        cwd=tmp_path,
        env=environment(),
        start_new_session=True,
    )
    for count in range(patience):
        wait_until(functools.partial(all_asked, tmp_path, count))
        os.write(terminal, b"\x03")
    assert process.wait(30) == status
    os.close(terminal)
    os.close(inner)
    want = ["SIGTERM", "SIGINT"][:patience]
    assert [(tmp_path / p).read_text().split() for p in "01"] == [want, want]


def all_asked(folder, count):
    files = [folder / p for p in "01"]
    return all(f.exists() and len(f.read_text().split()) == count for f in files)


def wait_until(true, seconds=30):
    for _ in range(seconds * 50):
        if true():
            return
        time.sleep(0.02)
    raise AssertionError("it did not come to that")


def test_a_request_to_stop_that_comes_before_train_can_answer_counts_as_saved(tmp_path):
    script = stand_in(tmp_path, "import pathlib, time\npathlib.Path('up').touch()\ntime.sleep(60)")
    command = ["bash", str(script), "1", "--", "--workdir=x"]
    process = subprocess.Popen(command, env=environment(), cwd=tmp_path, stderr=subprocess.PIPE)
    wait_until((tmp_path / "up").exists)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75, process.stderr.read()


DIES_ONCE = """
import os, pathlib, signal, sys, time
flags = dict(word[2:].split("=", 1) for word in sys.argv[1:])
lives = pathlib.Path(flags["workdir"], flags["process_id"])
lives.write_text(lives.read_text() + "x" if lives.exists() else "x")
if lives.read_text() == "x":
    time.sleep(0.2 if flags["process_id"] == "1" else 60)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_launcher_that_nobody_listens_to_goes_on(tmp_path):
    """Its standard error is a pipe without a reader, as when the program behind `|` has ended."""
    script = stand_in(tmp_path, DIES_ONCE)
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        ["bash", str(script), "2", "--", f"--workdir={tmp_path}"],
        stderr=writer,
        cwd=script.parent.parent,
        env=environment(ABORT="1"),
        timeout=120,
    )
    os.close(writer)
    assert done.returncode == 0
    assert [(tmp_path / number).read_text() for number in "01"] == ["xx", "xx"]


def test_a_dry_run_prints_one_command_a_process():
    flags = ["--", "--config=configs/coca_2b.py", "--workdir=gs://bucket/a run"]
    done = local(LAUNCH / "local.sh", "3", "--dry_run", *flags, PORT="4321")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) == 3
    for process, line in enumerate(lines):
        assert f"--process_id={process}" in line and "--coordinator=localhost:4321" in line


def test_a_line_of_a_dry_run_is_the_process_that_a_run_would_start(tmp_path):
    """Typed in by hand, it has the devices and the code of the run."""
    python = program(tmp_path / "python", PRINTS)
    flags = ["1", "--devices=4", "--", "--workdir=gs://bucket/a run"]
    env = {"PYTHON": str(python), "PORT": "4321", "XLA_FLAGS": "--xla_a=b --xla_c=d"}
    done = local(LAUNCH / "local.sh", *flags, **env)
    (line,) = local(LAUNCH / "local.sh", *flags[:2], "--dry_run", *flags[2:], **env).stdout.split(
        "\n"
    )[:-1]
    bare = {"PATH": os.environ["PATH"]}
    typed = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=bare)
    assert typed.stdout == done.stdout and typed.stdout.count("--xla") == 3
    assert f"\ncpu\n{LAUNCH.parent}\n" in typed.stdout


@pytest.mark.parametrize(("steady", "lives"), [("0", "xxxx"), ("3600", "xx")])
def test_failures_far_apart_are_counted_anew(tmp_path, steady, lives):
    """Three failures with one restart allowed: each begins the count where runs are steady."""
    text = LIVES.replace("> 1", "> 3") + "sys.exit(3)\n"
    script = stand_in(tmp_path, text)
    done = local(script, "1", "--", f"--workdir={tmp_path}", RESTARTS="1", STEADY=steady)
    assert done.returncode == (0 if steady == "0" else 3), done.stderr
    assert (tmp_path / "lives0").read_text() == lives
