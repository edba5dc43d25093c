"""The command `coca-jax`: its list, help, first words and what each command does without JAX."""

import json
import subprocess
import sys

import pytest

from coca_jax import cli

# A line for each command that starts it on what is not there or needs the heavy libraries next.
STARTS = {
    "train": ["--config=tiny", "--workdir=run"],
    "evaluate": ["--checkpoint=weights", "--data=scenes"],
    "caption": ["--checkpoint=weights", "image.png"],
    "prepare": ["--format=csv", "--input=list.csv", "--out=data"],
    "convert": ["--input=weights.bin", "--out=out"],
    "compile": ["--config=tiny", "--topology=cpu:1"],
    "export": ["--checkpoint=weights", "--out=out"],
    "report": ["--workdir=run"],
    "benchmark": ["losses"],
}
# One interpreter for all of them: each runs in a fork of its own, and cannot import what is slow.
DRIVER = """
import json, os, sys
for name in ("jax", "tensorflow", "orbax", "flax"):
    sys.modules[name] = None
from coca_jax import cli
found = {}
for name, arguments in json.loads(sys.argv[1]).items():
    if not (child := os.fork()):
        for number, kind in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{name}.{kind}", os.O_WRONLY | os.O_CREAT), number)
        sys.argv = ["coca-jax", name, *arguments]
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
    found[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
json.dump(found, open("status.json", "w"))
"""


def run_all(folder, arguments):
    """{command: (exit status, standard output, standard error)} of each in a fork."""
    command = [sys.executable, "-c", DRIVER, json.dumps(arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    status = json.loads((folder / "status.json").read_text())
    read = lambda name, kind: (folder / f"{name}.{kind}").read_text()  # noqa: E731
    return {name: (status[name], read(name, "out"), read(name, "err")) for name in arguments}


def test_an_unknown_command_names_the_nearest(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["coca-jax", "trian"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert (
        capsys.readouterr().err == "error: coca-jax trian: no such command; did you mean train?\n"
    )


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_alone_it_lists_every_command_in_a_line(arguments, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["coca-jax", *arguments])
    cli.main()
    lines = capsys.readouterr().out.splitlines()
    named = [line.split()[0] for line in lines if line.startswith("  ")]
    assert named == list(cli.COMMANDS) == list(STARTS)
