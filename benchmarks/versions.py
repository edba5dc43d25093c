"""Two versions of the package with one recipe, in turn: processor seconds, memory, size on disk.

    python benchmarks/versions.py OLD_PYTHON OLD_CLONE NEW_PYTHON NEW_CLONE DIR --times=2

Each PYTHON has one version alone, installed from its CLONE. DIR has data/emoji. The recipes are the
old clone's. Prints a JSON line: {"old": {...}, "new": {...}}, medians over the times, of

    start_seconds, start_mib   from `train` of the demo to the end of its first step, in processor
                               seconds with all children; resident memory at most, until then
    compiler_seconds           of these the children's: a C++ compiler that builds kernels
    again_seconds              a second run, which finds what the first one kept
    images, images_mib         of emoji a second of processor time in `benchmark input`; memory
    install_mib                the environment's packages, without byte code

Caches are new each time. Before what counts comes a start in which Python writes its byte code.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import tempfile

# Runs a module as the command line would, until standard error says that step 1 is done.
UNTIL_STEP = """
import json, os, resource, runpy, sys

class Watched:
    def __init__(self, file):
        self.file = file
    def write(self, text):
        if "step 1/1" in text:
            used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
            own, compiler = (one.ru_utime + one.ru_stime for one in used)
            mib = used[0].ru_maxrss / 1024
            found = dict(start_seconds=own + compiler, compiler_seconds=compiler, start_mib=mib)
            print(json.dumps(found))
            sys.stdout.flush()
            os._exit(0)
        return self.file.write(text)
    def __getattr__(self, name):
        return getattr(self.file, name)

sys.stderr = Watched(sys.stderr)
sys.argv = ["train", *sys.argv[1:]]
runpy.run_module("coca_jax.train", run_name="__main__", alter_sys=True)
"""


def call(python: str, clone: str, words: list[str], folder: str, cache: str) -> dict[str, float]:
    """The JSON line that a command prints at last."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "PYTHON"))}
    env |= dict(JAX_PLATFORMS="cpu", PYTHONPATH=clone, HOME=cache, XDG_CACHE_HOME=cache)
    done = subprocess.run([python, *words], env=env, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words[-4:])}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def start(python: str, clone: str, recipes: str, folder: str) -> dict[str, float]:
    """Seconds and memory until the end of the demo's first step, twice."""
    flags = [f"--config={recipes}/configs/demo.py", "--config.steps=1"]
    flags.append("--config.optimizer.warmup_steps=0")
    with tempfile.TemporaryDirectory() as cache:
        first, again = (
            call(
                python, clone, ["-c", UNTIL_STEP, *flags, f"--workdir={cache}/{run}"], folder, cache
            )
            for run in ("first", "again")
        )
    return first | dict(again_seconds=again["start_seconds"])


def images(python: str, clone: str, recipes: str, folder: str) -> dict[str, float]:
    """Emoji a second of processor time, read, decoded, augmented and with their tokens."""
    with tempfile.TemporaryDirectory() as cache:
        words = ["-m", "coca_jax.benchmark", "input", f"--config={recipes}/configs/emoji.py"]
        found = call(python, clone, [*words, "--seconds=20"], folder, cache)
    return dict(images=found["images_per_second_per_core"], images_mib=found["max_rss_mib"])


def size(python: str) -> dict[str, float]:
    """Of all files that are no byte code, in MiB."""
    where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    place = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout
    files = [path for path in pathlib.Path(place.strip()).rglob("*") if path.suffix != ".pyc"]
    return dict(install_mib=sum(f.stat().st_size for f in files if f.is_file()) / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("old_python", "old_clone", "new_python", "new_clone", "folder"):
        parser.add_argument(name)
    parser.add_argument("--times", type=int, default=2)
    given = parser.parse_args()
    versions = dict(
        old=(given.old_python, given.old_clone), new=(given.new_python, given.new_clone)
    )
    found: dict[str, dict[str, list[float]]] = {name: {} for name in versions}
    for time in range(given.times + 1):
        for name, (python, clone) in versions.items():
            for measure in (start, images) if time else (start,):
                values = measure(python, clone, given.old_clone, given.folder)
                print(f"# {name}, {time}: {values}", flush=True)
                for key, value in values.items() if time else ():
                    found[name].setdefault(key, []).append(value)
    table = {
        name: {key: statistics.median(all_of) for key, all_of in values.items()}
        | size(versions[name][0])
        for name, values in found.items()
    }
    print(json.dumps(table))


if __name__ == "__main__":
    main()
