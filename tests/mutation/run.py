"""Mutation test: faults of one line, each put into a copy of the package, and who sees them.

    python tests/mutation/run.py                    # every module
    python tests/mutation/run.py optimizer losses   # some
    python tests/mutation/run.py optimizer --only "warm-up"   # faults whose name has this in it

A module's faults are data, `tests/mutation/MODULE.toml`:

    file = "coca_jax/optimizer.py"          # or wherever in the package the text has moved to
    tests = ["tests/test_optimizer.py"]     # pytest's arguments: what should see every fault here

    [[fault]]
    name = "decay ends at a tenth"
    old = "linear=lambda t: 1 - t"          # stands once in the file; may be several lines
    new = "linear=lambda t: 1 - 0.9 * t"
    tests = ["tests/test_train.py"]         # in place of the module's
    equivalent = "why no test can see it"   # then it is not run

Each fault ends as `caught` (a test failed), `survived`, `gone` (its old text is not there any more,
or more than once) or `equivalent`. Tests that fail without a fault stop the module. The exit status
is 0 when nothing survived and nothing is gone. One fault takes as long as its tests until the first
failure: 5 to 60 seconds.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LIMIT_SECONDS = 1200  # a fault that hangs is one that is seen
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "runs", "build", "dist")


def run_tests(copy: pathlib.Path, tests: list[str], python: str) -> subprocess.CompletedProcess:
    """pytest in the copy until the first failure; return code 124 when it took too long."""
    command = [python, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    env = os.environ | {
        "PYTHONPATH": str(copy),
        "JAX_PLATFORMS": "cpu",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    try:
        return subprocess.run(
            command, cwd=copy, env=env, capture_output=True, text=True, timeout=LIMIT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "took too long", "")


def find(copy: pathlib.Path, file: str, old: str) -> list[pathlib.Path]:
    """Where the text stands, once for each time: in the file, else (code moves) in the package."""
    for paths in ([copy / file], sorted(copy.glob("coca_jax/**/*.py"))):
        found = [p for p in paths if p.exists() for _ in range(p.read_text().count(old))]
        if found:
            return found
    return []


def run_fault(copy: pathlib.Path, module: dict, fault: dict, python: str) -> tuple[str, str]:
    """(what became of one fault, the first failure or '')."""
    if "equivalent" in fault:
        return "equivalent", fault["equivalent"]
    places = find(copy, fault.get("file", module["file"]), fault["old"])
    if len(places) != 1:
        return "gone", f"its old text stands {len(places)} times in the package"
    path, text = places[0], places[0].read_text()
    path.write_text(text.replace(fault["old"], fault["new"]))
    try:
        result = run_tests(copy, fault.get("tests", module["tests"]), python)
    finally:
        path.write_text(text)
    if result.returncode == 0:
        return "survived", ""
    if result.returncode not in (1, 2, 124):  # 2: the tests could not be collected
        raise SystemExit(f"pytest could not run:\n{result.stdout}\n{result.stderr}")
    lines = [line for line in result.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "caught", (lines or result.stdout.splitlines() or [""])[-1]


def run_module(name: str, only: str, python: str) -> dict[str, int]:
    """Prints a line a fault; returns how many ended in which way."""
    module = tomllib.loads((HERE / f"{name}.toml").read_text())
    faults = [fault for fault in module["fault"] if only in fault["name"]]
    counts = dict.fromkeys(("caught", "survived", "gone", "equivalent"), 0)
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        wanted = [tuple(fault.get("tests", module["tests"])) for fault in faults]
        for tests in dict.fromkeys(wanted):
            result = run_tests(copy, list(tests), python)
            if result.returncode:
                print(result.stdout[-3000:])
                raise SystemExit(f"{' '.join(tests)} fails without a fault")
        for fault in faults:
            start = time.monotonic()
            outcome, detail = run_fault(copy, module, fault, python)
            counts[outcome] += 1
            seconds = time.monotonic() - start
            print(f"{name}: {outcome:10} {seconds:4.0f} s  {fault['name']}  {detail}", flush=True)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = sorted(path.stem for path in HERE.glob("*.toml"))
    parser.add_argument("modules", nargs="*", default=every, choices=every, metavar="MODULE")
    parser.add_argument("--only", default="", help="faults whose name has this in it")
    parser.add_argument("--python", default=sys.executable, help="what runs the tests")
    arguments = parser.parse_args()
    table = {name: run_module(name, arguments.only, arguments.python) for name in arguments.modules}
    print(
        "\n| module | faults | caught | survived | gone | equivalent |\n|---|---|---|---|---|---|"
    )
    for name, counts in table.items():
        cells = (sum(counts.values()), *counts.values())
        print(f"| {name} | " + " | ".join(map(str, cells)) + " |")
    return int(any(counts["survived"] or counts["gone"] for counts in table.values()))


if __name__ == "__main__":
    sys.exit(main())
