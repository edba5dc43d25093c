"""Ctrl-C and SIGTERM at any moment of a run: one line, the right status, no finished step lost."""

import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from conftest import COMPILE_FAST

from coca_jax.checkpoints import manager
from coca_jax.cli import main
from coca_jax.runtime.metric_log import read_metrics

ROOT = pathlib.Path(__file__).parent.parent
STEPS, EVERY, EVALUATE = 60, 20, 30
TASK = dict(
    kind="zero_shot",
    name="scenes",
    data=dict(builtin="scenes", split="heldout", kind="label"),
    limit=64,
)
COMPARED = ("loss", "contrastive_loss", "captioning_loss", "gradient_norm", "learning_rate")


class Command:
    """A `coca-jax train` of the tiny recipe, whose lines are read as they come."""

    def __init__(self, workdir, program, env, *more):
        flags = [f"--config.steps={STEPS}", f"--config.checkpoint.every_steps={EVERY}"]
        flags += [f"--config.eval.every_steps={EVALUATE}", f"--config.eval.tasks=({TASK!r},)"]
        flags += ["--config.model.bias=False", "--config.optimizer.name=adamw"]  # less to compile
        self.workdir = workdir
        self.process = subprocess.Popen(
            [*program, "train", "--config=tiny", f"--workdir={workdir}", *flags, *more],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=env,
            cwd=ROOT,
        )
        self.lines, self.output = [], []
        self._readers = [
            threading.Thread(target=self._read, args=args, daemon=True)
            for args in ((self.process.stderr, self.lines), (self.process.stdout, self.output))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, pipe, lines):
        for line in pipe:
            lines.append(line)

    def wait_for(self, text):
        """Returns once a line holds `text`, or the process has ended."""
        while self.process.poll() is None and not any(text in line for line in self.lines):
            time.sleep(0.01)

    @property
    def owner(self):
        """The number of the process that trains, once it does: it may be another one's fork."""
        return json.loads((self.workdir / "lease.json").read_text())["pid"]

    def end(self):
        """(exit status, standard error)"""
        status = self.process.wait(timeout=300)
        for reader in self._readers:
            reader.join()
        return status, "".join(self.lines)


def alone(workdir, cache):
    """In an interpreter of its own, whose compiled programs are kept in `cache`."""
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "XLA_FLAGS": COMPILE_FAST}
    env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1", "PYTHONPATH": str(ROOT)}
    return Command(workdir, [sys.executable, "-m", "coca_jax"], env)


def assert_stopped(command):
    """It gave 75 (or was done already), said so in one line, and kept every finished step."""
    status, text = command.end()
    assert status in (0, 75), text[-3000:]
    for word in ("Traceback", "Fatal", "Segmentation", "KeyboardInterrupt", "Error:"):
        assert word not in text, text[-3000:]
    if status == 75:
        said = [line for line in text.splitlines() if line.endswith("same command to go on")]
        assert len(said) == 1, text[-3000:]
        rows = read_metrics(command.workdir)
        if "asked to stop: step" in said[0]:
            _, saved = manager.find_step(str(command.workdir))
            assert saved >= rows[-1]["step"]
    return status, text


def assert_equal_runs(workdir, whole):
    want, got = read_metrics(whole), read_metrics(workdir)
    assert [row["step"] for row in got] == list(range(1, STEPS + 1))
    for a, b in zip(got, want, strict=True):
        assert [a[name] for name in COMPARED] == [b[name] for name in COMPARED]
    scores = [json.loads((place / "eval.json").read_text()) for place in (workdir, whole)]
    assert scores[0] == scores[1]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """An undisturbed run."""
    workdir = tmp_path_factory.mktemp("whole")
    status, text = alone(workdir, cache).end()
    assert status == 0, text[-3000:]
    return workdir


BUSY = "__import__('hashlib').pbkdf2_hmac('sha256', b'', b'', 2 * 10**9)"  # C code, for minutes


@pytest.mark.parametrize(
    "script, signals, status, said",
    [
        (f"stop.stage('compiling'); {BUSY}", "INT", 75, "stopped while compiling: no step is lost"),
        (f"stop.stage('compiling'); {BUSY}", "TERM", 75, "stopped while compiling: no step"),
        (f"stop.reached(1); {BUSY}", "INT INT", 130, "ended at once, without a save"),
        (f"stop.reached(1); {BUSY}", "TERM INT INT", 130, "ended at once, without a save"),
        ("stop.reached(1)\nwhile not stop.reached(2): pass\nprint('saved')", "INT", 0, "saved"),
        ("stop.reached(1)\nwhile not stop.reached(2): pass\nprint('saved')", "TERM", 0, "saved"),
        (
            f"stop.reached(1)\nwith stop.saved('evaluating', lambda: print('is saved')): {BUSY}",
            "INT",
            75,
            "is saved\nstopped while evaluating: no step is lost",
        ),
        (  # in the save before it
            "stop.reached(1)\nwhile not stop.reached(2): pass\n"
            f"with stop.saved('evaluating', lambda: print('is saved')): {BUSY}",
            "TERM",
            75,
            "is saved\nstopped while evaluating: no step is lost",
        ),
    ],
)
def test_signals_act_while_the_main_thread_is_inside_c(script, signals, status, said):
    code = "from coca_jax.runtime import signals as stopping\nstop = stopping.install()\n"
    code += "print('ready', flush=True)\n" + script
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    for number, name in enumerate(signals.split()):
        time.sleep(0.6 if number else 0)  # within half a second two Ctrl-C are one
        process.send_signal(getattr(signal, f"SIG{name}"))
    text = process.communicate(timeout=30)[0]
    assert process.returncode == status, text
    assert said in text and "Traceback" not in text


def test_a_command_without_anything_to_save_ends_within_seconds():
    for body in ("__import__('time').sleep(60)", BUSY):
        code = "from coca_jax.cli import main as cli\nfrom coca_jax.runtime import signals as stopping\n"
        code += f"def start(*_):\n  print('ready', flush=True)\n  {body}\n"
        code += "cli._start = start\ncli.command('caption')"
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        text = process.communicate(timeout=30)[1]
        assert process.returncode == 130
        assert text.splitlines()[-1].endswith("ended by Ctrl-C") and "Traceback" not in text


@pytest.mark.long
def test_a_run_is_stopped_in_start_up_in_its_steps_and_in_an_evaluation(commands, tmp_path):
    program = [commands.bin / "coca-jax"]
    for moment, number, said in (
        ("reading data", signal.SIGTERM, "stopped while reading data: no step is lost"),
        ("step 5/", signal.SIGINT, "asked to stop: step "),
        ("evaluating step 30", signal.SIGINT, "stopped while evaluating: no step is lost"),
    ):
        less = "--config.loss.captioning_weight=0.0"  # half as much to compile
        command = Command(tmp_path, program, commands.env, less)
        command.wait_for(moment)
        os.kill(command.owner, number)
        status, text = assert_stopped(command)
        assert status == 75 and said in text, text[-3000:]
    assert manager.find_step(str(tmp_path))[1] == 30


FAILING = """
import os, signal, sys, time
from coca_jax.runtime import multihost as processes
from coca_jax.runtime import signals as stopping

def fails(number, port, alone):
    processes.start(f"localhost:{port}", 2, number)
    stopping.MEET = 1.0 if alone else 60.0
    with stopping.failing_alone(2):
        if alone and number == 1:
            time.sleep(600)  # as in a step, for process 0
        raise ValueError(f"process {number} cannot\\ngo on")

# Forks of one interpreter that has imported everything, of which each writes a file of its own.
started = {}
for port in sys.argv[1:]:
    alone = port == sys.argv[1]
    for one in range(2):
        name = f"{'alone' if alone else 'together'} {one}"
        started[name] = os.fork()
        if not started[name]:
            os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY), 2)
            signal.alarm(100)  # ends what waits for the other; jax's own bound is 300 s
            fails(one, port, alone)
for name, process in started.items():
    if name == "alone 1":
        os.kill(process, signal.SIGKILL)
    print(name, os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
"""


def test_a_process_of_two_that_fails_does_not_wait_for_the_other(tmp_path):
    """Neither where the other is in a step nor where it fails too."""
    servers = [socket.create_server(("localhost", 0)) for _ in range(2)]
    ports = [str(server.getsockname()[1]) for server in servers]
    for server in servers:
        server.close()
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", FAILING, *ports]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    status = ["alone 0 2", f"alone 1 {-signal.SIGKILL}", "together 0 2", "together 1 2"]
    assert done.stdout.splitlines() == status, done.stderr
    for name in ("alone 0", "together 0", "together 1"):
        said = (tmp_path / name).read_text()
        assert f"error: process {name[-1]} cannot go on\n" in said


def test_who_has_nothing_to_say_leaves_without_a_line():
    """All processes of a run that is stopped but the first, which says what is saved."""
    code = "from coca_jax.runtime import signals as stopping; stopping.leave('', 75)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr, done.stdout) == (75, "", "")


ENDING = """
import os, time
from coca_jax.runtime import signals as stopping
stopping.install()
class Library:
    def __del__(self, write=os.write, sleep=time.sleep):
        write(1, b"freeing")
        sleep(1)
library = Library()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_python_itself_ends_changes_nothing(number):
    """The run is over and said so; only memory is being freed."""
    process = subprocess.Popen([sys.executable, "-c", ENDING], stdout=subprocess.PIPE)
    assert os.read(process.stdout.fileno(), 100) == b"freeing"
    process.send_signal(number)
    assert process.wait(60) == 0
    process.stdout.close()


def test_a_full_disk_under_standard_error_loses_lines_and_ends_nothing():
    with open("/dev/full", "w", buffering=1) as file:
        said = main.LossyStream(file)
        with pytest.raises(OSError):
            print("a line", file=file)
        print("another", file=said, flush=True)
        assert said.fileno() == file.fileno()
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())  # else its own close fails


@pytest.mark.slow
def test_thirty_times_at_random_moments(whole, cache, tmp_path, capsys):
    """Start-up, compilation, steps, saves, evaluation, report: wherever the delay leads."""
    rng = random.Random(0)
    seen, run = [], 0
    start = time.monotonic()
    status, text = alone(tmp_path / "timed", cache).end()
    longest = time.monotonic() - start
    while len(seen) < 30:
        workdir = tmp_path / str(run)
        # A cache of its own now and then: compilation is as long as the first time.
        own = tmp_path / f"cache{run}" if len(seen) % 3 == 0 else cache
        command = alone(workdir, own)
        time.sleep(rng.uniform(0.3, longest))
        if command.process.poll() is None:
            command.process.send_signal(signal.SIGINT)
            status, text = assert_stopped(command)
            if status == 75:
                seen.append([line for line in text.splitlines() if "go on" in line][0])
        status = command.end()[0]
        if status == 0:
            assert_equal_runs(workdir, whole)
            run += 1
    with capsys.disabled():
        print("", *seen, sep="\n")


def test_ctrl_c_in_an_import_ends_at_once_and_elsewhere_unwinds(tmp_path):
    """Raised inside a library that is being loaded, KeyboardInterrupt crashed jaxlib."""
    ask = "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(1)\n"
    (tmp_path / "loaded.py").write_text(
        f"try:\n    {ask}except BaseException:\n    print('seen')\n"
    )
    begin = "from coca_jax.runtime import signals as stopping; stopping.end_on_interrupt()\n"
    for code, status, said in (
        ("import loaded", 130, ("", "ended by Ctrl-C\n")),
        (f"try:\n    {ask}except KeyboardInterrupt:\n    print('unwound')", 0, ("unwound\n", "")),
    ):
        command = [sys.executable, "-c", begin + code]
        env = dict(os.environ, PYTHONPATH=f"{ROOT}:{tmp_path}")
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert (done.returncode, (done.stdout, done.stderr)) == (status, said)
