"""Faults of the machine and its storage over a small training, one after the other.

    python tests/soak/faults.py                     # all; root is needed for the disks
    python tests/soak/faults.py full_disk stall     # some

Each fault ends as it should or is a problem: the run goes on and ends equal to a calm one, or it
ends with one line and the status that the table of exit statuses gives. The last line of output is
one JSON object.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator

import pairs
from kills import HERE, ROOT, Life, compare, environment, say, step_of

STEPS = 200
ENDED = re.compile(r"Traceback|Segmentation|Fatal")


def start(work: pathlib.Path, workdir: str, *flags: str, recipe: str = "", **env: str) -> Life:
    """A training with one line a step; recipe: Python that stands before that of the recipe."""
    file = HERE / "recipe.py"
    if recipe:
        file = work / f"recipe_{time.monotonic_ns()}.py"
        file.write_text(recipe + (HERE / "recipe.py").read_text().partition('"""\n')[2])
    command = [sys.executable, "-m", "coca_jax", "train", f"--config={file}"]
    command += [f"--workdir={workdir}", f"--config.steps={STEPS}", "--config.log.every_steps=1"]
    return Life([*command, *flags], environment(work) | env)


def after(life: Life, step: int) -> None:
    """Waits for a step."""
    if not life.wait_for(lambda line: step_of(line) >= step):
        raise AssertionError(f"it ended before step {step}: {life.text()}")


def told(life: Life, text: str) -> None:
    """Raises AssertionError unless a line has this in it."""
    if not any(text in line for _, line in life.lines):
        raise AssertionError(f"no line with {text!r}: {life.text()}")


def ends(life: Life, status: int) -> None:
    """Raises AssertionError unless it ends with this status and without a traceback."""
    found = life.end()
    if found != status or ENDED.search(life.text()):
        raise AssertionError(f"status {found} in place of {status}: {life.text()}")


def equal(work: pathlib.Path, workdir: pathlib.Path) -> None:
    """Raises AssertionError unless the run is as the calm one."""
    problems = compare(workdir, work / "calm", STEPS)
    assert not problems, problems


@contextlib.contextmanager
def disk(work: pathlib.Path, size: str) -> Iterator[pathlib.Path]:
    """A disk of its own."""
    place = work / f"disk{time.monotonic_ns()}"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def full_disk(work: pathlib.Path) -> str:
    """Full from step 30 to step 110: saves, metrics and evaluations cannot be written."""
    with disk(work, "64m") as place:
        _fill(start(work, str(place / "run")), place)
        equal(work, place / "run")
    return "warned, went on, ended equal"


def full_disk_of_two(work: pathlib.Path) -> str:
    """The same of a run of two processes, of which one learns that the disk is full."""
    env = environment(work)
    ends(Life(pairs.together(work / "calm_two", STEPS, 2), env), 0)
    with disk(work, "64m") as place:
        _fill(Life(pairs.together(place / "run", STEPS, 2), env), place)
        problems = compare(place / "run", work / "calm_two", STEPS)
        assert not problems, problems
    return "warned, went on, ended equal"


def _fill(life: Life, place: pathlib.Path) -> None:
    """Lets a training go on with no room on its disk from step 30 to step 110, to its end."""
    after(life, 30)
    filler = place / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)
    after(life, 110)
    filler.unlink()
    ends(life, 0)
    told(life, "could not")


def read_only(work: pathlib.Path) -> str:
    """Read-only from the start, then in the middle of a run."""
    with disk(work, "64m") as place:
        subprocess.run(["mount", "-o", "remount,ro", place], check=True)
        life = start(work, str(place / "run"))
        ends(life, 2)
        assert len([line for _, line in life.lines if line.startswith("error:")]) == 1, life.text()
    return "one line, status 2"


class Proxy:
    """Stands before a server and can go away: connections are cut and refused."""

    def __init__(self, port: int):
        self._target, self.away = port, False
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._server.accept()
            if self.away:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._target))
            self._open += [client, server]
            for pair in ((client, server), (server, client)):
                threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def go(self) -> None:
        """Away, with all that is under way."""
        self.away = True
        for end in self._open:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self._open.clear()


def bucket(work: pathlib.Path) -> str:
    """An S3 server that goes away in a save and comes back after 20 seconds."""
    import fsspec
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    proxy = Proxy(server.get_host_and_port()[1])
    env = dict(
        AWS_ENDPOINT_URL=f"http://127.0.0.1:{proxy.port}",
        AWS_DEFAULT_REGION="us-east-1",
        AWS_ACCESS_KEY_ID="test",
        AWS_SECRET_ACCESS_KEY="test",
    )
    os.environ.update(env)
    fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
    life = start(work, "s3://bucket/run", **env)
    after(life, 40)
    proxy.go()
    time.sleep(20)
    proxy.away = False
    ends(life, 0)
    copy = work / "from_bucket"
    fsspec.filesystem("s3", skip_instance_cache=True).get("bucket/run/", f"{copy}/", recursive=True)
    server.stop()
    equal(work, copy)
    warned = any("could not" in line or "not written" in line for _, line in life.lines)
    return f"{'warned' if warned else 'its own retries were enough'}, went on, ended equal"


def clock(work: pathlib.Path) -> str:
    """The wall clock jumps a day on at step 40 and three days back at step 120 (libfaketime)."""
    library = next(pathlib.Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    if library is None:
        raise AssertionError("libfaketime is not here (apt-get install faketime)")
    shift = work / "shift"

    def jump(to: str) -> None:  # in one go: libfaketime ends a process that reads half a file
        (work / "shift.new").write_text(f"{to}\n")
        os.replace(work / "shift.new", shift)

    jump("+0")
    env = dict(LD_PRELOAD=str(library), FAKETIME_TIMESTAMP_FILE=str(shift))
    # Read once a second: a look at the file for every look at the clock holds all threads up.
    env |= dict(FAKETIME_CACHE_DURATION="1", FAKETIME_DONT_FAKE_MONOTONIC="1")
    life = start(work, str(work / "clock"), **env)
    after(life, 40)
    jump("+1d")
    after(life, 120)
    jump("-2d")
    ends(life, 0)
    equal(work, work / "clock")
    from coca_jax.runtime.metric_log import read_metrics

    rows = read_metrics(work / "clock")
    assert min(row["goodput"] for row in rows) >= 0
    assert abs(rows[-1]["time/down"]) < 0.01, rows[-1]
    said = json.loads((work / "clock/goodput.json").read_text())["at"]["wall"]
    assert abs(time.time() - 2 * 86_400 - said) < 3600, "the run did not see the jumps"
    return "nothing noticed it, ended equal"


STALL = """
import time
from coca_jax.data import synthetic_source
from coca_jax.data import scenes

read, calls = synthetic_source.Scenes.read, []

def stall(self, indices):
    calls.append(1)
    if len(calls) == 100:
        time.sleep(SECONDS)
    return read(self, indices)

synthetic_source.Scenes.read = stall
"""


def stall(work: pathlib.Path) -> str:
    """A source that gives nothing for 70 seconds, and one that never goes on."""
    life = start(work, str(work / "stall"), recipe=STALL.replace("SECONDS", "70"))
    ends(life, 0)
    told(life, "waiting for data: reading scenes")
    told(life, "going on after")
    equal(work, work / "stall")
    life = start(
        work,
        str(work / "hang"),
        "--config.faults.hang_minutes=0.2",
        recipe=STALL.replace("SECONDS", "3600"),
    )
    ends(life, 75)
    told(life, "the stacks of all threads are in")
    begin = time.monotonic()
    again = start(work, str(work / "hang"))
    ends(again, 0)
    equal(work, work / "hang")
    return (
        f"named, went on, ended equal; for ever: 75, and equal {time.monotonic() - begin:.0f} s on"
    )


RATE = """
import jax.numpy as jnp
from coca_jax.training import optimizer

plain = optimizer.learning_rate

def rate(kind, schedule, step):
    return jnp.where(step < 50, plain(kind, schedule, step), 1e6)

optimizer.learning_rate = rate
"""


def numbers(work: pathlib.Path) -> str:
    """A learning rate of 1e6: given, and come by on the way (from step 51 on)."""
    life = start(work, str(work / "rate"), "--config.optimizer.learning_rate=1e6")
    ends(life, 2)
    told(life, "config.optimizer.learning_rate=1000000.0: give")
    life = start(work, str(work / "nan"), "--config.checkpoint.max_skipped=30", recipe=RATE)
    ends(life, 2)
    told(life, "the gradients of 30 steps in a row")
    told(life, "is not saved: every step since")
    assert list((work / "nan").glob("skipped_step_*.json")), "the examples are not written out"
    kept = sorted(int(p.name) for p in (work / "nan/checkpoints").iterdir() if p.name.isdigit())
    assert {40, 50} <= set(kept), kept  # from before it
    return f"given: refused; on the way: ended with status 2, checkpoints {kept} stay"


def asleep(work: pathlib.Path) -> str:
    """A process that sleeps for 20 seconds (SIGSTOP) goes on as if nothing had been."""
    life = start(work, str(work / "asleep"))
    after(life, 60)
    life.process.send_signal(signal.SIGSTOP)
    time.sleep(20)
    life.process.send_signal(signal.SIGCONT)
    ends(life, 0)
    equal(work, work / "asleep")
    return "went on, ended equal"


FAULTS: dict[str, Callable[[pathlib.Path], str]] = dict(
    full_disk=full_disk,
    full_disk_of_two=full_disk_of_two,
    read_only=read_only,
    bucket=bucket,
    clock=clock,
    stall=stall,
    numbers=numbers,
    asleep=asleep,
)


def main() -> int:
    wanted = sys.argv[1:] or list(FAULTS)
    found, good = {}, True
    with tempfile.TemporaryDirectory() as folder:
        work = pathlib.Path(folder)
        calm = start(work, str(work / "calm"))
        ends(calm, 0)
        for name in wanted:
            begin = time.monotonic()
            try:
                found[name] = FAULTS[name](work)
            except (AssertionError, subprocess.CalledProcessError) as error:
                found[name], good = f"PROBLEM: {error}", False
            say(f"{name}: {found[name]} ({time.monotonic() - begin:.0f} s)")
    print(json.dumps(found | {"good": good}))
    return int(not good)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    raise SystemExit(main())
