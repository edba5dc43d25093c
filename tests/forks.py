"""The commands of coca_jax, each in a fork of one interpreter that has imported everything.

A start of Python with JAX and the rest takes seconds of a core, a fork takes hundredths. A fork is
the command as it is: the same `cli.main`, its own flags, devices, files and exit status.

    with forks.Server(env) as server:
        done = server.run(["train", "--config=tiny"], cwd)  # returncode, stdout, stderr
        subprocess.run(["bash", "-c", "coca-jax train | head"], env=server.env)   # by stand-ins

`server.env` has programs `coca-jax` and `python` first in its PATH, for whatever runs commands by
name: `python -m coca_jax...` goes to the server too, any other Python is the real one.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence

PARSE = "FORKS_PARSE_ONLY"  # in the environment of a command: its flags are read, no more
STAND_IN = """#!{python} -SE
import json, os, socket, sys
arguments = sys.argv[1:]
if os.path.basename(sys.argv[0]).startswith("python"):
    if arguments[:1] != ["-m"] or not arguments[1:] or arguments[1].split(".")[0] != "coca_jax":
        os.execv("{python}", ["{python}", *arguments])
    name = arguments[1].partition(".")[2].removeprefix("cli.")
    arguments = [name, *arguments[2:]] if name else arguments[2:]
with socket.socket(socket.AF_UNIX) as server:
    server.connect("{socket}")
    text = json.dumps([arguments, os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(text).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(text)
    sys.exit(int(server.recv(8) or b"1"))
"""


class Server:
    """An interpreter that waits, started with `env`, and the stand-ins for it.

    blocked: modules that cannot be imported in it; then it imports nothing else beforehand.
    """

    def __init__(self, env: dict[str, str], blocked: Sequence[str] = ()):
        # Not below pytest's folders: a socket's name has at most 107 bytes.
        self.scratch = tempfile.TemporaryDirectory(prefix="forks-")
        folder = pathlib.Path(self.scratch.name)
        self.bin = folder / "bin"
        self.bin.mkdir()
        place = str(folder / "socket")
        for name in ("coca-jax", "python", "python3"):
            text = STAND_IN.format(python=sys.executable, socket=place)
            (self.bin / name).write_text(text)
            (self.bin / name).chmod(0o755)
        self.env = env | {"PATH": f"{self.bin}:{env['PATH']}"}
        command = [sys.executable, str(pathlib.Path(__file__).resolve()), place, *blocked]
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, cwd=folder)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    def run(
        self,
        arguments: Sequence[str],
        cwd: pathlib.Path,
        env: dict[str, str] | None = None,
        timeout: float = 900,
    ) -> subprocess.CompletedProcess[str]:
        """`coca-jax` with `arguments`, in the folder `cwd`, with more environment."""
        return subprocess.run(
            [str(self.bin / "coca-jax"), *arguments],
            cwd=cwd,
            env=self.env | (env or {}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.scratch.cleanup()


def serve(place: str, blocked: Sequence[str] = ()) -> None:
    """Answers one command after the other, each in a process of its own."""
    for name in blocked:
        sys.modules[name] = None  # type: ignore[assignment]
    from coca_jax.cli import main

    if not blocked:
        main.quiet_libraries()
        for name in main.COMMANDS:
            importlib.import_module(f"coca_jax.cli.{name}")
        for name in ("checkpoints.manager", "inference", "training.trainer", "data.prepare"):
            importlib.import_module(f"coca_jax.{name}")
    gc.freeze()  # what is imported stays
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # none is waited for
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place)
        listener.listen()
        print("ready", flush=True)
        while True:
            talk, _ = listener.accept()
            if os.fork():
                talk.close()
                continue
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            listener.close()
            status = 1
            try:
                status = attend(talk)
            finally:
                talk.sendall(str(status).encode())
                os._exit(0)


def attend(talk: socket.socket) -> int:
    """Runs the command that is asked for in a child; its exit status as a shell has it."""
    size, streams, _, _ = socket.recv_fds(talk, 4, 3)
    text = b""
    while len(text) < int.from_bytes(size, "big"):
        text += talk.recv(1 << 16)
    arguments, folder, env = json.loads(text)
    if not (child := os.fork()):
        talk.close()
        run(arguments, folder, env, streams)
    for stream in streams:
        os.close(stream)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status if status >= 0 else 128 - status


def run(arguments: list[str], folder: str, env: dict[str, str], streams: Sequence[int]) -> None:
    """One command, to the end of the process."""
    from coca_jax.cli import main

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    if name := env.get("PYTHONIOENCODING"):  # read by Python as it starts
        sys.stdout.reconfigure(encoding=name)
    sys.argv = ["coca-jax", *arguments]
    status = 1
    try:
        if env.get(PARSE):
            parse(arguments)
        else:
            main.main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def parse(arguments: Sequence[str]) -> None:
    """Reads a command's flags and recipe, and no more."""
    from coca_jax.cli import main

    name = arguments[0]
    assert name in main.COMMANDS, f"no command {name}"
    module = importlib.import_module(f"coca_jax.cli.{name}")
    module.define_flags()
    sys.argv = [f"coca-jax {name}", *arguments[1:]]
    main.parse_flags(sys.argv, module)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2:])
