"""One run, one owner: a folder that a process writes to is refused to every other one.

The owner keeps `lease.json` in the workdir, a folder or a bucket, and counts up a number in it
every few seconds. Who finds such a file asks first whether the owner's process lives, which its
machine knows at once (by its number and the time at which it started), and elsewhere watches
whether the number moves: no clocks are compared, so one that jumps does no harm. An owner that is
dead loses the lease. One that was only asleep finds another's name in the file and ends.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from typing import Any

from coca_jax.runtime import multihost, signals, storage

FILE = "lease.json"
BEAT, BUCKET_BEAT = 5.0, 15.0  # seconds between two beats, on a disk and in a bucket
MISSED = 4  # beats without which an owner on another machine counts as dead
SETTLE = 2.0  # seconds after which a writer in a bucket, which has no lock, reads what it wrote
LAST_BEAT = 1.0  # seconds that a beat under way may take at the end
EXIT_LOST = 2  # another start would be refused


class Held(multihost.KnownToAll):
    """Another process trains in the workdir."""


def this_process() -> dict[str, Any]:
    """What tells this process from all others, on this machine and elsewhere."""
    return dict(
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        started=_started(os.getpid()),
        command=" ".join(sys.argv)[:300],
    )


def is_alive(owner: dict[str, Any]) -> bool | None:
    """Whether the process of a lease lives; None where this machine cannot tell."""
    machine = _machine()
    if not machine or owner.get("machine") != machine:
        return None
    started = _started(int(owner["pid"]))
    return started is not None and started == owner.get("started")


def _machine() -> str:
    """This start of this machine and the space of its process numbers; '' where it has no /proc."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> int | None:
    """When a process of this machine started, in the kernel's ticks; None where it has ended."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])  # ended, and its parent has not looked


class Lease:
    """Of one workdir, taken by `acquire` and given back by `release`.

    Args:
        workdir: a folder that is there, or a place in a bucket; with `beside` a file in one.
        beat: seconds between two beats of this owner.
        lost: called from another thread when someone else has the lease, with a line that says so.
        say: takes lines for people.
        use: what the owner does in it, for the line that refuses others.
        flag: the flag that names it, there too.
        beside: it is a file, and the lease lies beside it, its name before `FILE`.
    """

    def __init__(
        self,
        workdir: str,
        *,
        beat: float | None = None,
        lost: Callable[[str], Any] | None = None,
        say: Callable[[str], Any] = signals.say,
        use: str = "trains in it",
        flag: str = "--workdir",
        beside: bool = False,
    ):
        self._workdir = workdir
        self._path = storage.place(f"{workdir}.{FILE}") if beside else storage.place(workdir) / FILE
        self._remote = storage.is_remote(self._path)
        self._beat_seconds = beat or (BUCKET_BEAT if self._remote else BEAT)
        self._lost, self._say = lost or _leave, say
        self._use, self._flag = use, flag
        self._me = this_process() | {
            "owner": uuid.uuid4().hex,
            "beat_seconds": self._beat_seconds,
            "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        }
        self._beats = 0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Takes the lease and keeps it. Raises Held when a process that lives has it."""
        folder = self._path.parent
        # A bucket knows no locks.
        with contextlib.nullcontext() if self._remote else storage.alone_in(folder):
            self._wait_for_the_dead()
            self._write()
        if self._remote:
            time.sleep(SETTLE)
            if (owner := self._read()) is not None and owner.get("owner") != self._me["owner"]:
                raise Held(self._refusal(owner))
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def _wait_for_the_dead(self) -> None:
        """Returns when nobody has the lease, at once or once its owner has missed its beats."""
        owner = self._read()
        if owner is None:
            return
        alive = is_alive(owner)
        if alive:
            raise Held(self._refusal(owner))
        if alive is None:
            wait = MISSED * float(owner.get("beat_seconds", self._beat_seconds))
            self._say(
                f"{self._workdir} was in use on host {owner.get('host')}: looking for up to "
                f"{wait:.0f} s whether that run still lives"
            )
            end = time.monotonic() + wait
            while time.monotonic() < end:
                time.sleep(min(1.0, wait / 8))
                now = self._read()
                if now is None:
                    return
                if (now.get("owner"), now.get("beats")) != (owner.get("owner"), owner.get("beats")):
                    raise Held(self._refusal(now))
        self._say(f"the run on host {owner.get('host')} (process {owner.get('pid')}) is dead")

    def _refusal(self, owner: dict[str, Any]) -> str:
        return (
            f"{self._workdir} is in use: process {owner.get('pid')} on host {owner.get('host')} "
            f"{self._use} since {owner.get('since')} ({owner.get('command')}); wait for it, stop "
            f"it, or use a new {self._flag}"
        )

    def _read(self) -> dict[str, Any] | None:
        """The lease that is there. What is no whole JSON is looked at again, then counts as none:
        who wrote it was killed in between."""
        for _ in range(5):
            try:
                text = self._path.read_text()
                found = json.loads(text)
                if isinstance(found, dict) and isinstance(found.get("pid"), int):
                    return found
            except FileNotFoundError:
                return None
            except ValueError:
                pass
            time.sleep(0.1)
        return None

    def _write(self) -> None:
        text = json.dumps(self._me | {"beats": f"{self._beats:020d}"}, indent=1) + "\n"
        if self._remote or self._beats == 0:
            storage.write_text(self._path, text)
            return
        # As long as before: a full disk takes it too. Deleted by somebody, it may be another's by
        # now, which "x" does not write over.
        with open(self._path, "r+b" if self._path.exists() else "xb") as file:
            file.write(text.encode())
            file.truncate()

    def check(self) -> None:
        """Raises Held when someone else has taken the lease: this process was taken for dead."""
        owner = self._read()
        if owner is not None and owner.get("owner") != self._me["owner"]:
            raise Held(self._refusal(owner))

    def _keep(self) -> None:
        while not self._done.wait(self._beat_seconds):
            try:
                self.check()
                self._beats += 1
                self._write()
            except Held as error:
                self._lost(f"this run was asleep and lost its workdir: {error}")
                return
            except Exception:  # a disk or a bucket that does not answer: the run goes on
                continue

    def release(self) -> None:
        """Gives the lease back, if it is still this process's."""
        self._done.set()
        if self._thread is not None:
            self._thread.join(LAST_BEAT)  # which would write the file again
        with contextlib.suppress(Exception):
            owner = self._read()
            if owner is not None and owner.get("owner") == self._me["owner"]:
                self._path.unlink()


def _leave(line: str) -> None:
    signals.leave(line, EXIT_LOST)


@contextlib.contextmanager
def held(workdir: str, flag: str = "--workdir") -> Iterator[None]:
    """Inside, the workdir is this run's, whichever process of it keeps the lease (process 0).
    flag: as of Lease.

    Raises Held on all processes where another run has it.
    """
    import jax

    lease, refused = Lease(workdir, flag=flag), ""
    if jax.process_index() == 0:
        try:
            lease.acquire()
        except Held as error:
            refused = str(error)
    if jax.process_count() > 1:
        refused = multihost.from_first("lease", refused)
    if refused:
        raise Held(refused)
    with _given_back(lease):
        yield


@contextlib.contextmanager
def alone(place: str, *, use: str, flag: str, beside: bool = False) -> Iterator[None]:
    """Inside, the folder or file is this process's, whatever other processes work beside it.
    Folders that are missing are made, and removed again where nothing was written. use, flag,
    beside: as of `Lease`.

    Raises Held where another process has it.
    """
    path = storage.place(place)
    folder = path.parent if beside else path
    above = [] if storage.is_remote(path) else [folder, *folder.parents]
    missing = [one for one in above if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lease = Lease(place, use=use, flag=flag, beside=beside)
    lease.acquire()
    try:
        with _given_back(lease):
            yield
    finally:
        with contextlib.suppress(OSError):  # it holds something
            for one in missing:
                os.rmdir(one)


def refuse_held(folder: str, names: Collection[str], *, use: str, flag: str) -> None:
    """Raises Held where another process has one of the leases in a folder, given by the names of
    their files; owners on other machines are watched at the same time. Those of the dead go.
    use, flag: as of `Lease`."""

    def look(name: str) -> None:
        beside = name.removesuffix(FILE).removesuffix(".")
        place = f"{folder}/{beside}" if beside else folder
        found = Lease(place, use=use, flag=flag, beside=bool(beside))
        found._wait_for_the_dead()
        with contextlib.suppress(OSError):  # gone already, or not ours to take away
            found._path.unlink()  # who has taken it since writes it again at the next beat

    with concurrent.futures.ThreadPoolExecutor(len(names) or 1) as pool:
        list(pool.map(look, names))


@contextlib.contextmanager
def _given_back(lease: Lease) -> Iterator[None]:
    """Gives an acquired lease back at the end, however that comes."""
    signals.before_leaving(lease.release)
    try:
        yield
    finally:
        signals.not_before_leaving(lease.release)
        lease.release()
