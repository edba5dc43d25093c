"""Rows of what is killed, damaged, fuzzed, served, or set beside an older version."""

from __future__ import annotations

import ast
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pictures
from measuring import ROOT, Given, Rows, Values, environment
from measuring_parts import jpegs


def recaption_kills(given: Given) -> Rows:
    """The demo's model captions pictures and is killed a hundred times, in either type."""
    demo = given.demo()
    found: Rows = {}
    for row, dtype in (("recaption_kills", "float32"), ("recaption_kills_bfloat16", "bfloat16")):
        flags = (f"--checkpoint={demo}", f"--dtype={dtype}")
        told = given.script("tests/soak/recaption.py", *flags)
        found[row] = dict(kills=told["kills"], differences=len(told["differences"]))
    return found


def kills(given: Given) -> Rows:
    """A training that is killed a hundred times, at moments that are drawn."""
    told = given.script("tests/soak/kills.py", "--kills=100")
    found: Rows = {
        f"kills/{row}": {
            column: told["by"].get(f"{moment} {name}", 0) for column, name in SIGNALS.items()
        }
        for row, moment in MOMENTS.items()
    }
    median = told["median_seconds_from_kill_to_first_new_step"]
    recovery = dict(kills=told["kills"], median_seconds=median, most_seconds=told["longest"])
    return found | {"kills/recovery": recovery}


SIGNALS = dict(sigkill="SIGKILL", sigterm="SIGTERM", ctrl_c="SIGINT")
MOMENTS = dict(
    start="start-up",
    compilation="compile",
    step="step",
    save="save",
    evaluation="evaluation",
    end="report",
)


def pair_kills(given: Given) -> Rows:
    """Two processes of one training, one of which is killed or stopped."""
    flags = ("--kills=20", "--stops=5", "--processes=2")
    told = given.script("tests/soak/kills.py", *flags)
    killed, stopped = told["restarts"]["SIGKILL"], told["restarts"]["SIGSTOP"]
    median = told["median_seconds_from_kill_to_first_new_step"]
    return {
        "pairs/kills": dict(kills=len(killed), restart_most_seconds=max(killed)),
        "pairs/stops": dict(
            stops=len(stopped),
            restart_least_seconds=min(stopped),
            restart_most_seconds=max(stopped),
        ),
        "pairs/recovery": dict(median_seconds=median, most_seconds=told["longest"]),
    }


def search_kills(given: Given) -> Rows:
    """`search index` of drawn JPEGs, killed ten times."""
    folder = pictures.drawn("jpegs", given.drawn / "jpegs5000", 5000)
    told = given.script("search.py", "kills", str(folder), f"--checkpoint={given.demo()}")
    return dict(search_kills=dict(kills=told["kills"], differences=int(not told["same"])))


def million(given: Given) -> Rows:
    """A graph of a million drawn vectors: what it finds, what it takes."""
    out = given.runs / f"million_{time.time_ns()}"
    told = given.script("search.py", "graph", f"--out={out}", one_core=True)
    graph = dict(core_seconds=told["build_core_seconds"], megabytes=told["graph_mb"])
    found: Rows = {"search_million/graph": graph | dict(open_seconds=told["open_seconds"])}
    for row in ("pictures", "texts"):
        of = told[row]
        values = dict(recall=of["recall"], p50=of["core_p50_ms"], p99=of["core_p99_ms"])
        found[f"search_million/{row}"] = values
    return found


def tests(given: Given, *words: str) -> str:
    """What pytest prints of these. Raises RuntimeError where one fails."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", *words],
        cwd=ROOT, env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"pytest {' '.join(words)}: {done.stdout.splitlines()[-1:]}")
    return done.stdout


def damaged(given: Given) -> Rows:
    """One damage at a time of a checkpoint and of folders of weights, and what became of it."""
    said = tests(given, "tests/test_checkpointing.py", "-k", "no_damage_is_silent", "-m", "slow")
    seen = ast.literal_eval(re.search(r"Counter\((\{.*?\})\)", said)[1])
    rows = dict(checkpoint=(seen.get("went back", 0), 0, seen.get("as it was", 0)))
    said = tests(given, "tests/test_damaged_weights.py", "-k", "random_damage")
    for source, table in re.findall(r"^\.*(\w+) (\{.*?\})", said, re.M):
        seen = ast.literal_eval(table)
        told, warned = (seen.get(f"told {how}", 0) for how in ("in a line", "as a warning"))
        rows["export" if source == "exported" else source] = (told, warned, 0)
    return {
        f"damaged/{row}": dict(damages=sum(of), line=of[0], warned=of[1], no_effect=of[2], used=0)
        for row, of in rows.items()
    }


def fuzzed(given: Given) -> Rows:
    """Inputs of every kind that is read."""
    told = given.script("tests/fuzz/run.py", "all", "--count=3600", "--seed=22")
    values: Values = dict(inputs=sum(one["inputs"] for one in told), kinds=len(told))
    values |= dict(
        findings=sum(len(one["findings"]) for one in told),
        most_seconds=max(one["worst_seconds"] for one in told),
        most_mib=max(one["worst_mib"] for one in told),
    )
    return dict(fuzzed=values)


def soaked(given: Given) -> Rows:
    """Half an hour of training with saves and evaluations."""
    told = given.script("tests/soak/soak.py", "--minutes=30", one_core=True)
    keys = dict(
        minutes="minutes",
        steps="steps",
        mib_per_1000="mib_per_1000_steps",
        mib_end="mib_at_the_end",
        files_first="files_at_rest_first",
        files_last="files_at_rest_last",
        speed_first="steps_a_second_first",
        speed_last="steps_a_second_last",
    )
    return {"soak/last": {key: told[name] for key, name in keys.items()}}


@contextmanager
def server(given: Given) -> Iterator[tuple[str, int]]:
    """(address, process) of a server with the demo's run, on one core."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["taskset", "-c", str(max(os.sched_getaffinity(0))), sys.executable, "-m", "coca_jax"]
    command += ["serve", f"--checkpoint={given.demo()}", f"--port={port}"]
    given.runs.mkdir(parents=True, exist_ok=True)
    log = given.runs / f"serve_{port}.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment(), stderr=file)
    try:
        while "serving at" not in log.read_text():
            if process.poll() is not None:
                raise RuntimeError(f"serve ended with status {process.returncode}: {log}")
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


def loaded(given: Given) -> Rows:
    """Five hundred requests by fifty clients, after two such rounds that compile."""
    picture = next(pathlib.Path(jpegs(given)).glob("*.jpg"))
    with server(given) as (url, pid):
        for _ in range(3):
            told = given.script("serve.py", url, str(picture), f"--pid={pid}")
    count = told["requests"]
    values: Values = dict(requests=count, at_once=told["at_once"], lost=count - told["same"])
    values |= dict(p50=told["p50_ms"], p99=told["p99_ms"])
    return dict(serve_load=values | dict(core_ms=1000 * told["core_seconds"] / count))


def idle(given: Given) -> Rows:
    """An hour in which nobody asks."""
    with server(given) as (_, pid):
        told = given.script("serve.py", f"--idle={pid}", "--minutes=60")
    first, last, most = told["first"], told["last"], told["most"]
    values = dict(mib_first=first["mib"], mib_last=last["mib"], mib_most=most["mib"])
    spent = last["core_seconds"] - first["core_seconds"]
    return dict(
        serve_idle=dict(minutes=60) | values | dict(files=last["files"], core_seconds=spent)
    )


def new_user(given: Given) -> Rows:
    """From a clone in an empty home to a caption and a searchable folder, on one core."""
    place = given.runs / f"new_user_{time.time_ns()}"
    told = given.script("new_user.py", str(place), jpegs(given), one_core=True)
    start = dict(first=told.pop("serve_first"), later=told.pop("serve_later"))
    return dict(clock=told, serve_start=start)


def whole_demo(given: Given) -> Rows:
    """launch/demo.sh in a fresh clone, set-up and evaluation included."""
    clone = given.runs / f"clone_{time.time_ns()}"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    start = time.perf_counter()
    subprocess.run(["launch/demo.sh"], cwd=clone, check=True, capture_output=True)
    took = time.perf_counter() - start
    return {"demo/whole": dict(minutes=int(took // 60), seconds=round(took % 60))}
