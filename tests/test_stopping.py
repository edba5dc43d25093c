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

from coca_jax import checkpointing, quiet
from coca_jax.metrics import read_metrics

ROOT = pathlib.Path(__file__).parent.parent
STEPS, EVERY, EVALUATE = 60, 20, 30
TASK = dict(
    kind="zeroshot",
    name="scenes",
    data=dict(builtin="scenes", split="heldout", kind="label"),
    limit=64,
)
COMPARED = ("loss", "contrastive_loss", "captioning_loss", "gradient_norm", "learning_rate")


class Command:
    """A `coca-jax train` of the tiny recipe, whose lines are read as they come."""

    def __init__(self, workdir, cache, *more):
        flags = [f"--config.steps={STEPS}", f"--config.checkpoint.every_steps={EVERY}"]
        flags += [f"--config.eval.every_steps={EVALUATE}", f"--config.eval.tasks=({TASK!r},)"]
        env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "XLA_FLAGS": COMPILE_FAST}
        env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1", "PYTHONPATH": str(ROOT)}
        self.workdir = workdir
        self.process = subprocess.Popen(
            [sys.executable, "-m", "coca_jax", "train", "--config=tiny", f"--workdir={workdir}"]
            + [*flags, *more],
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

    def send(self, number):
        self.process.send_signal(number)

    def end(self):
        """(exit status, standard error)"""
        status = self.process.wait(timeout=300)
        for reader in self._readers:
            reader.join()
        return status, "".join(self.lines)


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
            _, saved = checkpointing.find_step(str(command.workdir))
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
    status, text = Command(workdir, cache).end()
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
    code = "from coca_jax.training import stopping\nstop = stopping.install()\n"
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
    for name in signals.split():
        process.send_signal(getattr(signal, f"SIG{name}"))
        time.sleep(0.6)  # within half a second two Ctrl-C are one
    text = process.communicate(timeout=30)[0]
    assert process.returncode == status, text
    assert said in text and "Traceback" not in text


def test_a_command_without_anything_to_save_ends_within_seconds():
    for body in ("__import__('time').sleep(60)", BUSY):
        code = "from coca_jax import cli\nfrom coca_jax.training import stopping\n"
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
def test_a_run_is_stopped_in_start_up_in_its_steps_and_in_an_evaluation(cache, tmp_path):
    for moment, number, said in (
        ("reading data", signal.SIGTERM, "stopped while reading data: no step is lost"),
        ("step 5/", signal.SIGINT, "asked to stop: step "),
        ("evaluating step 30", signal.SIGINT, "stopped while evaluating: no step is lost"),
    ):
        command = Command(tmp_path, cache)
        command.wait_for(moment)
        command.send(number)
        status, text = assert_stopped(command)
        assert status == 75 and said in text, text[-3000:]
    assert checkpointing.find_step(str(tmp_path))[1] == 30


FAILING = """
import sys, time
from coca_jax import processes
from coca_jax.training import stopping
number, port, alone = int(sys.argv[1]), sys.argv[2], sys.argv[3] == "alone"
processes.start(f"localhost:{port}", 2, number)
stopping.MEET = 1.0 if alone else 60.0
with stopping.failing_alone(2):
    if alone and number == 1:
        time.sleep(600)  # as in a step, for process 0
    raise ValueError(f"process {number} cannot\\ngo on")
"""


@pytest.mark.parametrize("how", ["alone", "together"])
def test_a_process_of_two_that_fails_does_not_wait_for_the_other(how, tmp_path):
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", FAILING, str(number), str(port), how],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        for number, process in list(enumerate(both))[: 1 if how == "alone" else 2]:
            said = process.communicate(timeout=120)[1]  # jax's own bound is 300 s
            assert process.returncode == 2, said
            assert f"error: process {number} cannot go on\n" in said
    finally:
        for process in both:
            process.kill()
            process.communicate()


def test_who_has_nothing_to_say_leaves_without_a_line():
    """All processes of a run that is stopped but the first, which says what is saved."""
    code = "from coca_jax.training import stopping; stopping.leave('', 75)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr, done.stdout) == (75, "", "")


ENDING = """
import os, time
from coca_jax.training import stopping
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
        said = quiet.Lasting(file)
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
    status, text = Command(tmp_path / "timed", cache).end()
    longest = time.monotonic() - start
    while len(seen) < 30:
        workdir = tmp_path / str(run)
        # A cache of its own now and then: compilation is as long as the first time.
        own = tmp_path / f"cache{run}" if len(seen) % 3 == 0 else cache
        command = Command(workdir, own)
        time.sleep(rng.uniform(0.3, longest))
        if command.process.poll() is None:
            command.send(signal.SIGINT)
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
    begin = "from coca_jax.training import stopping; stopping.end_on_interrupt()\n"
    for code, status, said in (
        ("import loaded", 130, ("", "ended by Ctrl-C\n")),
        (f"try:\n    {ask}except KeyboardInterrupt:\n    print('unwound')", 0, ("unwound\n", "")),
    ):
        command = [sys.executable, "-c", begin + code]
        env = dict(os.environ, PYTHONPATH=f"{ROOT}:{tmp_path}")
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert (done.returncode, (done.stdout, done.stderr)) == (status, said)
