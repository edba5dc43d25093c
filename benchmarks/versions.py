"""Two versions of the package with one recipe, in turn: processor seconds, memory, size on disk.

    python benchmarks/versions.py OLD_PYTHON OLD_CLONE NEW_PYTHON NEW_CLONE DIR --times=2

    python benchmarks/versions.py OLD_PYTHON OLD_CLONE NEW_PYTHON NEW_CLONE DIR --only=work

Each PYTHON has one version alone, installed from its CLONE. DIR has data/emoji. The recipes are the
old clone's. Prints a JSON line: {"old": {...}, "new": {...}}, medians over the times, of

    start_seconds, start_mib   from `train` of the demo to the end of its first step, in processor
                               seconds with all children; resident memory at most, until then
    compiler_seconds           of these the children's: a C++ compiler that builds kernels
    again_seconds              a second run, which finds what the first one kept
    images, images_mib         of emoji a second of processor time in `benchmark input`; memory
    install_mib                the environment's packages, without byte code
    captions_1, captions_16,   processor seconds of 60 tokens from pixels: one image, 16, one with 6
    beams_6, encode_16         beams; of 16 images' embeddings; float32, coca_ViT-B-32's sizes

The last line is of --only=work: both versions stay, and their calls take turns; beside it stands
"ratio", of each the median of old / new over the turns. The others are of --only=starts. Caches are
new each time. Before what counts comes a start in which Python writes its byte code.
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


# Builds a work of `benchmark` and does it once for every line of standard input: its seconds.
AT_EACH_LINE = """
import importlib.util, json, os, sys, time
import jax
try:
    from coca_jax.apps import benchmark as model_times as module
    from coca_jax.config import typed
except ImportError:
    from coca_jax.cli import benchmark as module
    typed = lambda config: config

def timed(function, repeats, peer=None):
    jax.block_until_ready(function())
    print(json.dumps(0.0), flush=True)
    for _ in sys.stdin:
        began = time.process_time()
        jax.block_until_ready(function())
        print(json.dumps(time.process_time() - began), flush=True)
    os._exit(0)

module.timed = timed
spec = importlib.util.spec_from_file_location("recipe", sys.argv[1])
recipe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(recipe)
config = recipe.get_config()
config.model.dtype = "float32"
kind, *numbers = json.loads(sys.argv[2])
getattr(module, kind)(typed(config), *numbers)
"""
WORK = {
    "captions_1": ("caption", 1, 60, 1, 1),
    "captions_16": ("caption", 16, 60, 1, 1),
    "beams_6": ("caption", 1, 60, 6, 1),
    "encode_16": ("encode", 16, 1),
}


def environment(clone: str, cache: str) -> dict[str, str]:
    """That of a version, with an empty cache."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "PYTHON"))}
    return env | dict(JAX_PLATFORMS="cpu", PYTHONPATH=clone, HOME=cache, XDG_CACHE_HOME=cache)


def call(python: str, clone: str, words: list[str], folder: str, cache: str) -> dict[str, float]:
    """The JSON line that a command prints at last."""
    env = environment(clone, cache)
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
        words = ["-m", "coca_jax.cli.benchmark", "input", f"--config={recipes}/configs/emoji.py"]
        found = call(python, clone, [*words, "--seconds=20"], folder, cache)
    return dict(images=found["images_per_second_per_core"], images_mib=found["max_rss_mib"])


def size(python: str) -> dict[str, float]:
    """Of all files that are no byte code, in MiB."""
    where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    place = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout
    files = [path for path in pathlib.Path(place.strip()).rglob("*") if path.suffix != ".pyc"]
    return dict(install_mib=sum(f.stat().st_size for f in files if f.is_file()) / 2**20)


def in_turn(versions: dict[str, tuple[str, str]], work: str, times: int) -> dict[str, list[float]]:
    """Seconds of one of WORK, so many times: the versions are processes that take turns."""
    recipe = f"{versions['old'][1]}/configs/finetune_open_clip.py"
    running, found = {}, {name: [] for name in versions}
    with tempfile.TemporaryDirectory() as cache:
        for name, (python, clone) in versions.items():
            words = [python, "-c", AT_EACH_LINE, recipe, json.dumps(WORK[work])]
            running[name] = subprocess.Popen(
                words,
                env=environment(clone, f"{cache}/{name}"),
                cwd=clone,
                text=True,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            answer(running[name])
        for _ in range(times):
            for name, process in running.items():
                process.stdin.write("\n")
                process.stdin.flush()
                found[name].append(answer(process))
        for process in running.values():
            process.communicate()
    print(f"# {work}: {found}", flush=True)
    return found


def answer(process: subprocess.Popen) -> float:
    """The next number that a process of AT_EACH_LINE writes."""
    for line in process.stdout:
        if line[:1].isdigit():
            return float(line)
    raise SystemExit(f"{process.args[0]} ended with status {process.wait()}")


def starts(versions: dict[str, tuple[str, str]], folder: str, times: int) -> dict[str, dict]:
    """The medians of all that --only=starts measures."""
    found: dict[str, dict[str, list[float]]] = {name: {} for name in versions}
    for time in range(times + 1):
        for name, (python, clone) in versions.items():
            for measure in (start, images) if time else (start,):
                values = measure(python, clone, versions["old"][1], folder)
                print(f"# {name}, {time}: {values}", flush=True)
                for key, value in values.items() if time else ():
                    found[name].setdefault(key, []).append(value)
    return {
        name: {key: statistics.median(all_of) for key, all_of in values.items()}
        | size(versions[name][0])
        for name, values in found.items()
    }


def works(versions: dict[str, tuple[str, str]], times: int) -> dict[str, dict]:
    """The medians of all that --only=work measures, and of the quotients."""
    table: dict[str, dict[str, float]] = {name: {} for name in (*versions, "ratio")}
    for work in WORK:
        found = in_turn(versions, work, times)
        for name, seconds in found.items():
            table[name][work] = statistics.median(seconds)
        quotients = [old / new for old, new in zip(found["old"], found["new"])]
        table["ratio"][work] = statistics.median(quotients)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("old_python", "old_clone", "new_python", "new_clone", "folder"):
        parser.add_argument(name)
    parser.add_argument("--times", type=int, default=2)
    parser.add_argument("--only", choices=("starts", "work"), default="starts")
    given = parser.parse_args()
    versions = dict(
        old=(given.old_python, given.old_clone), new=(given.new_python, given.new_clone)
    )
    if given.only == "work":
        print(json.dumps(works(versions, given.times)))
    else:
        print(json.dumps(starts(versions, given.folder, given.times)))


if __name__ == "__main__":
    main()
