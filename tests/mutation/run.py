"""Mutation test: faults of one line, each put into a copy of the package, and who sees them.

    python tests/mutation/run.py                    # every module
    python tests/mutation/run.py optimizer losses   # some
    python tests/mutation/run.py optimizer --only "warm-up"   # faults whose name has this in it

A module's faults are data, `tests/mutation/MODULE.toml`:

    file = "coca_jax/training/optimizer.py"  # or wherever in the package the text has moved to
    tests = ["tests/test_optimizer.py"]     # pytest's arguments: what should see every fault here

    [[fault]]
    name = "decay ends at a tenth"
    old = "linear=lambda t: 1 - t"          # stands once in the file; may be several lines
    new = "linear=lambda t: 1 - 0.9 * t"
    tests = ["tests/test_train.py"]         # in place of the module's
    equivalent = "why no test can see it"   # then it is not run

Each fault ends as `caught` (a test failed), `survived`, `gone` (its old text is not there any more,
or more than once) or `equivalent`. Tests that fail without a fault stop the module. The exit status
is 0 when nothing survived and nothing is gone.

A run of the tests is a fork of this process, which has imported what the package stands on but
nothing of the package, and reads from a folder of its own what an earlier run compiled: XLA's keys
are the programs, so that a fault compiles what it changes, and no more. The tests that saw the last
faults come first.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import gc
import importlib
import importlib.util
import multiprocessing
import os
import pathlib
import py_compile
import resource
import shutil
import signal
import sys
import tempfile
import tomllib
import warnings

import pytest

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LIMIT_SECONDS = 1200  # a fault that hangs is one that is seen
# So is one that computes on: so many times the processor seconds of the tests without a fault.
LIMIT_TIMES, LIMIT_LEAST = 2, 30
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "runs", "build", "dist")
FORK = multiprocessing.get_context("fork")
IMPORTED = (
    *("numpy", "PIL.Image", "cv2", "simplejpeg", "pyarrow.parquet", "fsspec", "absl.app"),
    *("ml_collections", "jax", "jax.experimental.pallas", "jax.experimental.multihost_utils"),
    *("jax.experimental.compilation_cache.compilation_cache", "flax.linen", "optax"),
    *("orbax.checkpoint", "sentencepiece"),
)


def prepare(folder: pathlib.Path) -> None:
    """Imports what every run of tests would import; what is compiled is kept in `folder`."""
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    sys.dont_write_bytecode = True
    for name in IMPORTED:
        with contextlib.suppress(ModuleNotFoundError):  # an extra
            importlib.import_module(name)
    warnings.filterwarnings("ignore", ".*fork.*")  # JAX starts its threads in the forks
    gc.freeze()


class SeersFirst:
    """For pytest: the tests that saw a fault come first, the last one before all others."""

    def __init__(self) -> None:
        self.saw: list[str] = []

    def add(self, test: str) -> None:
        self.saw = [test, *(other for other in self.saw if other != test)]

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        place = {test: number for number, test in enumerate(self.saw)}
        items.sort(key=lambda item: place.get(item.nodeid, len(place)))


def run_tests(
    copy: pathlib.Path, tests: list[str], first: SeersFirst, seconds: int = LIMIT_SECONDS
) -> tuple[int, str]:
    """pytest in the copy until the first failure: its exit status (124: it took too long, below 0:
    it crashed, or had more processor seconds than these) and what it said."""
    said = copy.with_name("said.txt")
    process = FORK.Process(target=_pytest, args=(copy, tests, first, said, seconds))
    process.start()
    process.join(LIMIT_SECONDS)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return 124, "took too long"
    return process.exitcode, said.read_text(errors="replace")


def _pytest(
    copy: pathlib.Path, tests: list[str], first: SeersFirst, said: pathlib.Path, seconds: int
) -> None:
    """The fork: a process group of its own."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)
    sys.path.insert(0, str(copy))
    spec = importlib.util.find_spec("coca_jax")
    assert spec and str(spec.origin).startswith(str(copy)), f"not the copy: {spec}"
    status = pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests], plugins=[first])
    sys.stdout.flush()
    os._exit(int(status))


def find(copy: pathlib.Path, file: str, old: str) -> list[pathlib.Path]:
    """Where the text stands, once for each time: in the file, else (code moves) in the package."""
    for paths in ([copy / file], sorted(copy.glob("coca_jax/**/*.py"))):
        found = [p for p in paths if p.exists() for _ in range(p.read_text().count(old))]
        if found:
            return found
    return []


def run_fault(
    copy: pathlib.Path, module: dict, fault: dict, first: SeersFirst, seconds: int
) -> tuple[str, str]:
    """(what became of one fault, the first failure or ''). seconds: of the processor, at most."""
    if "equivalent" in fault:
        return "equivalent", fault["equivalent"]
    places = find(copy, fault.get("file", module["file"]), fault["old"])
    if len(places) != 1:
        return "gone", f"its old text stands {len(places)} times in the package"
    path, text = places[0], places[0].read_text()
    path.write_text(text.replace(fault["old"], fault["new"]))
    try:
        status, said = run_tests(copy, fault.get("tests", module["tests"]), first, seconds)
    finally:
        path.write_text(text)
    if status == 0:
        return "survived", ""
    if status in (3, 4, 5):  # 1: a test failed, 2: none could be collected, below 0: it crashed
        raise SystemExit(f"pytest could not run:\n{said}")
    lines = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if lines:
        first.add(lines[-1].split(" ", 1)[1].split(" - ")[0])
    return "caught", (lines or said.splitlines() or [""])[-1]


def run_module(name: str, only: str) -> dict[str, int]:
    """Prints a line a fault; returns how many ended in which way."""
    module = tomllib.loads((HERE / f"{name}.toml").read_text())
    faults = [fault for fault in module["fault"] if only in fault["name"]]
    first = SeersFirst()
    counts = dict.fromkeys(("caught", "survived", "gone", "equivalent"), 0)
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=LEFT_OUT)
        # Byte code that is asked for its source's text: two faults may be of one size and second.
        checked = py_compile.PycInvalidationMode.CHECKED_HASH
        compileall.compile_dir(copy, quiet=1, invalidation_mode=checked)
        wanted = [tuple(fault.get("tests", module["tests"])) for fault in faults]
        limits = {}
        for tests in dict.fromkeys(wanted):
            start = _cpu_seconds()
            status, said = run_tests(copy, list(tests), first)
            limits[tests] = LIMIT_LEAST + round(LIMIT_TIMES * (_cpu_seconds() - start))
            if status:
                raise SystemExit(f"{said[-3000:]}\n{' '.join(tests)} fails without a fault")
        for fault, tests in zip(faults, wanted):
            start = _cpu_seconds()
            outcome, detail = run_fault(copy, module, fault, first, limits[tests])
            counts[outcome] += 1
            seconds = _cpu_seconds() - start
            print(f"{name}: {outcome:10} {seconds:4.1f} s  {fault['name']}  {detail}", flush=True)
    return counts


def _cpu_seconds() -> float:
    """Of the processor, in all processes that this one has waited for."""
    used = os.times()
    return used.children_user + used.children_system


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    every = sorted(path.stem for path in HERE.glob("*.toml"))
    # argparse compares no modules, [], with the choices too.
    parser.add_argument("modules", nargs="*", choices=[*every, []], metavar="MODULE")
    parser.add_argument("--only", default="", help="faults whose name has this in it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as compiled:
        prepare(pathlib.Path(compiled))
        table = {name: run_module(name, arguments.only) for name in arguments.modules or every}
    print(
        "\n| module | faults | caught | survived | gone | equivalent |\n|---|---|---|---|---|---|"
    )
    for name, counts in table.items():
        cells = (sum(counts.values()), *counts.values())
        print(f"| {name} | " + " | ".join(map(str, cells)) + " |")
    return int(any(counts["survived"] or counts["gone"] for counts in table.values()))


if __name__ == "__main__":
    sys.exit(main())
