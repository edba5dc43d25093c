"""Stopping a run from outside: SIGINT (Ctrl-C) and SIGTERM, at any moment, with nothing lost.

The first signal ends the run with status 75, which launchers take as "start me again". Where there
is nothing to lose (start-up, compilation, an evaluation whose state is saved) that is at once; in
the loop the step under way is finished and saved first. A second Ctrl-C ends the run at once, 130.

Python runs its signal handlers in the main thread alone, and not before that is back from C++: a
compilation holds them up for minutes. So the interpreter writes each signal's number into a pipe
(signal.set_wakeup_fd), and a thread that reads it does what is to be done.

This module imports nothing heavy: commands install the handlers before they import anything else.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from coca_jax.runtime import multihost

# What commands that watch for signals have in common.


# A terminal and a program between it and this one both pass a Ctrl-C on, and `timeout` a signal
# that the whole group has got too: two within this time, in seconds, are one.
SAME_KEY = 0.5
AT_ONCE = 130  # the status of one that is ended by a second one, as a shell says of SIGINT


SAVED = ("fit", "train")  # commands that save what they did when they are asked to stop
EXIT_AGAIN = 75  # EX_TEMPFAIL: the launchers start the run again
GRACE = 2.0  # seconds that a command without anything to save may take to remove its files
AGAIN = "run the same command to go on"
MEET = 10.0  # seconds in which processes that fail alike meet at their ends
POLL = 1.0  # seconds between two looks at what the other processes say


class Preempted(Exception):
    """The run saved itself because it was asked to stop."""

    def __init__(self, step: int):
        super().__init__(f"asked to stop: step {step} is saved; {AGAIN}")


class Stop:
    """Whether a run was asked to stop, and what that means at the moment.

    `install` makes it watch the signals from the start of a command. Without that (`train` called
    from a program) it listens from the first step to `close` and only sets what `reached` says.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._lock = threading.RLock()
        self._stage: str | None = "starting"  # what can be left at once; None: there is a state
        self._before_leaving: Callable[[], object] | None = None
        self._interrupts: list[float] = []
        self._watched = False
        self._former: dict[int, Any] = {}
        self._processes = 1

    def install(self) -> None:
        """Watches SIGINT and SIGTERM until the program ends. Main thread only."""
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        self._watched = True
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        self._catch()
        # Registered first, so done last: the run is over. Python ends its threads and handlers
        # before libraries free their memory, and a signal then would end it with another status.
        atexit.register(self._ignore)
        threading.Thread(target=self._watch, args=(reading,), name="stop", daemon=True).start()

    @staticmethod
    def _ignore() -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def _catch(self) -> None:
        """Takes both signals (back): some libraries put handlers of their own."""
        if self._watched:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, _nothing)

    def _watch(self, reading: int) -> None:
        while True:
            if select.select([reading], [], [], POLL)[0]:
                for number in os.read(reading, 16):
                    if number in (signal.SIGINT, signal.SIGTERM):
                        self._receive(number)
            elif self._processes > 1 and self._stage is not None:
                self._look_at_peers()

    def _look_at_peers(self) -> None:
        if multihost.has_stopped():
            self._start_leaving("another process of the run was stopped")
        elif (line := multihost.has_ended()) and _ending.acquire(blocking=False):
            args = (f"error: {line}", 2)
            threading.Thread(target=_end_together, args=args, name="leave", daemon=True).start()

    def _receive(self, number: int) -> None:
        now = time.monotonic()
        if number == signal.SIGINT:
            earlier = [t for t in self._interrupts if now - t > SAME_KEY]
            self._interrupts.append(now)
            if earlier:
                leave("ended at once, without a save", AT_ONCE)
        first = not self._asked.is_set()
        self._asked.set()
        if not first:
            return
        if self._stage is None:
            self._announce()
        else:
            self._start_leaving("stopped")

    def _announce(self) -> None:
        if self._processes > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # to jax, which agrees with the other processes
        say("stopping after this step and its save; Ctrl-C again ends at once, without a save")

    def _start_leaving(self, why: str) -> None:
        # In a thread of its own: this one goes on to wait for a second Ctrl-C.
        threading.Thread(target=self._leave, args=(why,), name="leave", daemon=True).start()

    def _leave(self, why: str) -> None:
        with self._lock:
            stage = self._stage
            if stage is None:  # the first step ended meanwhile: now the loop saves and stops
                return self._announce()
            lost = "no step is lost"
            if self._before_leaving is not None:
                try:
                    self._before_leaving()
                except Exception as error:
                    lost = str(error)
            if self._processes > 1:
                _notify_peers()
            leave(f"{why} while {stage}: {lost}; {AGAIN}", EXIT_AGAIN)

    @property
    def watched(self) -> bool:
        """Whether the run is a command's, which may end the process."""
        return self._watched

    @property
    def alone(self) -> bool:
        """Whether the run is of one process, so that it need not agree with others."""
        return self._processes == 1

    def stage(self, name: str) -> None:
        """From now on the run does `name` ('reading data'), which it can leave at any moment."""
        with self._lock:
            self._stage = name

    @contextlib.contextmanager
    def saved(self, name: str, wait: Callable[[], object]) -> Iterator[None]:
        """Inside, the run does `name` with a state that is saved, or will be once wait() returns.

        With several processes the state stays held: they all leave at the same step.
        """
        if self._processes > 1:
            yield
            return
        with self._lock:
            held, self._stage, self._before_leaving = self._stage, name, wait
        if self._watched and self._asked.is_set():  # since the step's end, as in its save
            self._leave("stopped")
        try:
            yield
        finally:
            with self._lock:
                self._stage, self._before_leaving = held, None

    def joined(self, count: int) -> None:
        """Says how many processes the run has, once they have met."""
        self._processes = count
        self._catch()

    def listen(self) -> None:
        """Before the loop of a run that a program called: takes the signals until `close`."""
        if not self._watched and threading.current_thread() is threading.main_thread():
            several = self._processes > 1  # SIGTERM is jax's then
            numbers = (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM)
            self._former = {number: signal.signal(number, self._flag) for number in numbers}

    def _flag(self, number: int, frame: FrameType | None) -> None:
        """The handler of a run that a program called: the second Ctrl-C is the program's own."""
        del frame
        self._asked.set()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, self._former[signal.SIGINT])
            if self._processes > 1:
                os.kill(os.getpid(), signal.SIGTERM)

    def reached(self, step: int) -> bool:
        """Whether to save and stop after `step`: the same answer on every process.

        From the first call on the run has a state that would be lost.
        """
        with self._lock:
            began, self._stage = self._stage is not None, None
        if self._processes == 1:
            return self._asked.is_set()
        if began:
            _start_agreement()
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)

    def end(self, name: str) -> None:
        """After the last save: what is left, `name`, can be left at any moment."""
        self.close()
        self._catch()
        self.stage(name)
        if self._watched and self._asked.is_set():  # in the very last step, or in its save
            self._leave("stopped")

    def close(self) -> None:
        """Gives the signals that `listen` took back to their former handlers."""
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}


_current: Stop | None = None


def install() -> Stop:
    """For a command that trains, before its imports: watches the signals of this process."""
    global _current
    if _current is not None:
        return _current
    _current = Stop()
    _current.install()
    return _current


def end_on_interrupt() -> None:
    """For a command that saves nothing, before its imports: Ctrl-C ends it within GRACE seconds.

    KeyboardInterrupt is raised as usual, so that unfinished files are removed; where the main
    thread is inside C++ and does not see it, or a library swallows it, the process ends anyway. In
    an import it ends at once: raised there, it can be a segmentation fault of the library's.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.signal(signal.SIGINT, _interrupted)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def watch() -> None:
        while signal.SIGINT not in os.read(reading, 16):
            pass
        time.sleep(GRACE)
        leave("ended by Ctrl-C", AT_ONCE)

    threading.Thread(target=watch, name="interrupt", daemon=True).start()


def _interrupted(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            leave("ended by Ctrl-C", AT_ONCE)
        frame = frame.f_back
    raise KeyboardInterrupt


def current() -> Stop:
    """The Stop of this process's command, or a new one that only listens in the loop."""
    return _current or Stop()


def say(line: str) -> None:
    """Writes a line to standard error from any thread, whatever the others are writing."""
    with contextlib.suppress(OSError):  # closed, or nobody reads it
        os.write(2, f"{line}\n".encode())


_farewells: list[Callable[[], object]] = []
FAREWELL = 5.0  # seconds that all of them may take


def before_leaving(work: Callable[[], object]) -> None:
    """Has `leave` do `work` first, for up to FAREWELL seconds, from a thread of its own."""
    _farewells.append(work)


def not_before_leaving(work: Callable[[], object]) -> None:
    """Takes `before_leaving` back."""
    _farewells.remove(work)


def leave(line: str, status: int) -> NoReturn:
    """Says `line`, if any, and ends the process: no handlers, no waiting for threads inside C++."""
    if line:
        say(line)

    def part() -> None:
        for work in list(_farewells):
            with contextlib.suppress(Exception):
                work()

    if _farewells:
        thread = threading.Thread(target=part, name="farewell", daemon=True)
        thread.start()
        thread.join(FAREWELL)
    os._exit(status)


_ending = threading.Lock()  # held by the thread that ends this process for an error


@contextlib.contextmanager
def failing_alone(count: int) -> Iterator[None]:
    """Around what one of `count` processes does: where it fails, it ends within MEET seconds.

    jax would hold it at its exit for five minutes, for peers that in turn wait for it in a step.
    Those that all fail, as of bad input, meet within that time and end with what each has to say.
    Of bad input the others hear, and end with its line where there is no step to lose.
    """
    try:
        yield
    except Exception as error:
        if count == 1:
            raise
        _ending.acquire()
        bad_input = isinstance(error, (ValueError, OSError))  # as cli has it
        if not bad_input:
            with contextlib.suppress(OSError):
                traceback.print_exc()
            _end_together("ended by this error", 1)
        line = " ".join(str(error).split())
        if not isinstance(error, multihost.KnownToAll):
            multihost.publish_ended(line)
        _end_together(f"error: {line}", 2)


def _end_together(line: str, status: int) -> NoReturn:
    """`leave`, once the others end too, or MEET seconds have passed."""
    import jax

    meeting = threading.Thread(target=jax.distributed.shutdown, daemon=True)
    meeting.start()
    meeting.join(MEET)
    leave(line, status)


def _nothing(number: int, frame: FrameType | None) -> None:
    """A handler must be there for the interpreter to write the signal into the pipe."""


def _notify_peers() -> None:
    """Makes the others leave too, in place of waiting for this process until jax misses it."""
    with contextlib.suppress(Exception):
        multihost.publish_stopped()
        time.sleep(2.5 * POLL)  # process 0 holds the store: the others look first


def _start_agreement() -> None:
    """Lets jax take SIGTERM: it tells all processes and finds the step at which all can stop.

    jax does this at jax.distributed.initialize, before there is a step to stop at; commands switch
    that off (processes.start) and come here before the loop.
    """
    import jax
    from jax._src import distributed  # jax has no public name for it

    if distributed.global_state.preemption_sync_manager is None:
        jax.config.update("jax_enable_preemption_service", True)
        distributed.global_state.initialize_preemption_sync_manager()
