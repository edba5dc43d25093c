"""Runs commands on bad inputs, each in a fork of one interpreter: a file of JSON to a line of it.

    python tests/bad_inputs.py cases.json     # [[command, argument ...], ...]

A result is [exit status or -signal, standard error]. A case that takes more than
60 s is ended by SIGALRM.
"""

import importlib
import json
import os
import signal
import sys
import tempfile

SECONDS = 60


def main() -> None:
    """Runs all cases in the current folder."""
    from coca_jax import cli

    for name in cli.COMMANDS:
        importlib.import_module(f"coca_jax.{name}")
    for name in ("checkpointing", "inference", "training.run", "importers.splits"):
        importlib.import_module(f"coca_jax.{name}")
    found = []
    with open(sys.argv[1]) as file:
        cases = json.load(file)
    for arguments in cases:
        with tempfile.TemporaryFile() as said:
            if not (child := os.fork()):
                run(cli, arguments, said.fileno())
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            said.seek(0)
            found.append([status, said.read(100_000).decode("utf-8", "replace")])
    print(json.dumps(found))


def run(cli, arguments: list[str], errors: int) -> None:
    """One case; ends the process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(errors, 2)
    signal.alarm(SECONDS)
    sys.argv = ["coca-jax", *arguments]
    status = 1
    try:
        cli.main()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
