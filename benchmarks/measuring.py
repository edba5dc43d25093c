"""How rows of docs/results.json are measured; figure_rows.py says which.

A measurement is a function that gives the values of its rows; nearly all of them call commands of
this package in processes of their own.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
MIB, GIB = 2**20, 2**30
SEEDS = (0, 1, 2)
SIZES = tuple(
    f"sizes/{name}"
    for name in ("coca_2026_small", "coca_base", "coca_2026_base", "coca_large", "coca_2026_large")
)
LOSSES = ("losses/contrastive", "losses/captioning")
PAIRS = ("retrieval_memory/12500", "retrieval_memory/25000", "retrieval_memory/50000")
Values = dict[str, float]
Rows = dict[str, Values]


@dataclasses.dataclass(frozen=True)
class Given:
    """folder: the recipes find their `data/` there; runs: where runs stay, so that they go on."""

    folder: pathlib.Path
    runs: pathlib.Path

    def python(self, *words: str, **more: str) -> str:
        """What this Python prints with these arguments; more: environment. Raises RuntimeError with
        its last line if it fails."""
        paths = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
        env = {"JAX_PLATFORMS": "cpu"} | os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | more
        command = [sys.executable, *words]
        done = subprocess.run(command, env=env, cwd=self.folder, capture_output=True, text=True)
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise RuntimeError(f"{' '.join(words[:4])}: status {done.returncode}: {''.join(said)}")
        return done.stdout

    def coca(self, *words: str) -> dict[str, Any]:
        """What a command prints at last: its result."""
        return json.loads(self.python("-m", "coca_jax", *words).splitlines()[-1])


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What `run` gives: these rows. minutes of two cores, about; how: measured, or estimated by a
    compiler; more: what else stands in each row (unit, seeds, peer); clock: whether other work on
    the machine would be measured with it."""

    rows: tuple[str, ...]
    run: Callable[[Given], Rows]
    minutes: float
    command: str
    how: str = "measured"
    more: dict[str, Any] = dataclasses.field(default_factory=dict)
    clock: bool = False

    @property
    def quick(self) -> bool:
        return self.minutes <= 3


def sizes(given: Given) -> Rows:
    """Parameters in millions, GFLOP of a forward pass over a pair."""
    import jax

    from coca_jax import recipes
    from coca_jax.config import typed
    from coca_jax.estimate.flops import model_flops
    from coca_jax.models import coca

    def one(recipe: str) -> Values:
        model = typed(recipes.load(recipe)).model
        built = coca.build(model)
        arrays = jax.eval_shape(lambda key: coca.init(built, key), jax.random.key(0))
        count = sum(x.size for x in jax.tree.leaves(arrays))
        return dict(parameters=count / 1e6, gflop=model_flops(model) / 1e9)

    return {row: one(row.split("/")[1]) for row in SIZES}


def losses(given: Given) -> Rows:
    told = given.coca("benchmark", "losses", "--repeats=3")
    return {
        row: dict(
            ours_mib=one["ours_bytes"] / MIB,
            plain_mib=one["naive_bytes"] / MIB,
            memory_share=one["memory_ratio"],
            ours_s=one["ours_seconds"],
            plain_s=one["naive_seconds"],
            time_share=one["time_ratio"],
        )
        for row, one in ((row, told[row.split("/")[1]]) for row in LOSSES)
    }


RETRIEVAL = """
import resource, sys, time
import numpy as np
from coca_jax.evaluators import ranks
def made(n):
    both = np.random.default_rng(0).standard_normal((2, n, 64), np.float32)
    both /= np.linalg.norm(both, axis=-1, keepdims=True)
    return *both, np.stack([np.arange(n)] * 2, 1)
def most():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
ranks.retrieval_ranks(*made(64))
given = made(int(sys.argv[1]))
before, start = most(), time.process_time()
ranks.retrieval_ranks(*given)
print(most() - before, time.process_time() - start)
"""


def retrieval(given: Given) -> Rows:
    """Memory above what the process held with the embeddings, in a process of its own each."""

    def one(n: int) -> Values:
        mib, seconds = given.python("-c", RETRIEVAL, str(n)).split()
        return dict(mib=float(mib), whole_mib=4 * n * n / MIB, seconds=float(seconds))

    return {row: one(int(row.split("/")[1])) for row in PAIRS}


def start(given: Given) -> Rows:
    """`import coca_jax`; import, `load` and a first caption, without and with kept programs."""
    run = given.runs / "demo_start"
    flags = ("--config.steps=2", "--config.optimizer.warmup_steps=0", "--config.eval.tasks=()")
    given.coca("train", "--config=demo", f"--workdir={run}", *flags)
    code = (
        "import sys, time; began = time.perf_counter(); import coca_jax; "
        "at = time.perf_counter() - began; import numpy as np; model = coca_jax.load(sys.argv[1]); "
        "model.caption(np.zeros((1, 64, 64, 3), np.uint8)); "
        "print(at, time.perf_counter() - began)"
    )
    cache = given.runs / f"programs_{time.time_ns()}"
    calls = [
        given.python("-c", code, str(run), JAX_COMPILATION_CACHE_DIR=str(cache)).split()
        for _ in range(2)
    ]
    seconds = [float(call[1]) for call in calls]
    return {
        "start": dict(
            import_seconds=float(calls[0][0]), first_seconds=seconds[0], second_seconds=seconds[1]
        )
    }


def captions(batch: int, beams: int, times: int = 1) -> Callable[[Given], Rows]:
    """Tokens a second beside open_clip's, so many runs of it."""

    def run(given: Given) -> Rows:
        found = [
            given.coca(
                *("benchmark", "caption", "--peer", "--config=finetune_open_clip"),
                *("--config.model.dtype=float32", f"--batch_size={batch}", f"--num_beams={beams}"),
                f"--repeats={1 if batch > 1 else 3}",
            )
            for _ in range(times)
        ]
        ours = [one["tokens_per_second"] for one in found]
        peer = [one["tokens_per_second"] / one["times_peer"] for one in found]
        ratio = [one["times_peer"] for one in found]
        late = [one["late_over_early"] for one in found]
        row = f"captions/{f'beams_{beams}' if beams > 1 else f'batch_{batch}'}"
        if times == 1:
            return {row: dict(ours=ours[0], peer=peer[0], ratio=ratio[0], late_over_early=late[0])}
        many = {
            f"{name}_{n}": value
            for name, values in (("ours", ours), ("peer", peer), ("late", late))
            for n, value in enumerate(values, 1)
        }
        return {row: many, f"{row}_ratio": {f"run_{n}": v for n, v in enumerate(ratio, 1)}}

    return run


ALIKE = ("step_16", "step_8", "stem")


def alike(given: Given) -> Rows:
    """Seconds of a core of the emoji recipe's step, and of its stem, and of PyTorch's alike."""
    told = json.loads(given.python(str(ROOT / "benchmarks/alike.py")).splitlines()[-1])

    def one(times: Values) -> Values:
        ours, torch = times["cpu_seconds"], times["peer_cpu_seconds"]
        return dict(ours=ours, torch=torch, torch_ours=torch / ours)

    return {f"alike/{row}": one(told[row]) for row in ALIKE}


def trained(recipe: str, keys: dict[str, str], weights: str = "") -> Callable[[Given], Rows]:
    """Trains a recipe with three seeds (a run that is there goes on, one that is done stays) and
    takes these scores of eval.json, per cent but for those in PLAIN. weights: the recipe from whose
    run of the same seed it starts."""

    def run(given: Given) -> Rows:
        found: dict[str, Values] = {row: {} for row in keys}
        for seed in SEEDS:
            workdir = given.runs / recipe / f"seed{seed}"
            config = f"{recipe}:{given.runs / weights / f'seed{seed}'}" if weights else recipe
            words = (f"--config={config}", f"--workdir={workdir}", f"--config.seed={seed}")
            given.coca("train", *words)
            told = json.loads((workdir / "eval.json").read_text())
            for row, key in keys.items():
                found[row][f"seed_{seed}"] = told[key] * (1 if key.endswith(PLAIN) else 100)
        return found

    return run


PLAIN = ("attribute_f1", "perplexity")  # not per cent


def over_seeds(run: Callable[[Given], Rows]) -> Callable[[Given], Rows]:
    """Mean and range in place of each seed's value."""

    def means(given: Given) -> Rows:
        return {
            row: dict(
                value=statistics.mean(of.values()), low=min(of.values()), high=max(of.values())
            )
            for row, of in run(given).items()
        }

    return means


def reinforced(given: Given) -> Rows:
    """A recipe on recaptioned data beside the one that it is from, of twice its steps, and the run
    that wrote the captions: R@1 of both ways, per cent, mean and range."""
    teacher = given.runs / "emoji/seed0"
    given.coca("train", "--config=emoji", f"--workdir={teacher}", "--config.seed=0")
    out = ("--input=data/emoji", "--out=data/emoji_rich", "--to=array_record", "--text=all")
    given.coca("recaption", f"--checkpoint={teacher}", *out, "--embeddings", *WAYS)
    runs = dict(plain=("emoji", "--config.steps=1200"), student=("emoji_reinforced",))
    scores = {"teacher": [json.loads((teacher / "eval.json").read_text())]}
    for row, (recipe, *flags) in runs.items():
        scores[row] = []
        for seed in SEEDS:
            workdir = given.runs / f"reinforced_{row}" / f"seed{seed}"
            words = (f"--config={recipe}", f"--workdir={workdir}", f"--config.seed={seed}")
            given.coca("train", *words, *flags)
            scores[row].append(json.loads((workdir / "eval.json").read_text()))
    found: Rows = {}
    for row, told in scores.items():
        found[f"reinforced/{row}"] = {}
        for way in ("image_to_text", "text_to_image"):
            each = [100 * one[f"retrieval/emoji_openmoji/{way}_r1"] for one in told]
            means = {way: statistics.mean(each), f"{way}_low": min(each), f"{way}_high": max(each)}
            found[f"reinforced/{row}"] |= means if len(each) > 1 else {way: each[0]}
    exact = {row: 100 * scores[row][0]["captioning/emoji_openmoji/exact_match"] for row in runs}
    return found | {"reinforced/exact": exact}


WAYS = ("--how=greedy,max_tokens=15", "--how=nucleus,top_p=0.9,num_captions=3,max_tokens=15")


def recaption_kills(given: Given) -> Rows:
    """The demo's model captions pictures and is killed a hundred times, in either type."""
    demo = given.runs / "demo/seed0"
    given.coca("train", "--config=demo", f"--workdir={demo}", "--config.seed=0")
    script = str(ROOT / "tests/soak/recaption.py")
    found: Rows = {}
    for row, dtype in (("recaption_kills", "float32"), ("recaption_kills_bfloat16", "bfloat16")):
        flags = (f"--checkpoint={demo}", f"--dtype={dtype}")
        told = json.loads(given.python(script, *flags).splitlines()[-1])
        found[row] = dict(kills=told["kills"], differences=len(told["differences"]))
    return found


def towers(row: str, name: str) -> Callable[[Given], Rows]:
    """How far a family's towers, of a size, are from the library's that they come from."""
    script = str(ROOT / "benchmarks/towers.py")
    return lambda given: {f"towers/{row}": json.loads(given.python(script, name).splitlines()[-1])}


def in_place(given: Given) -> Rows:
    """100,000 pairs in tars: importing them, and batches, here and from a server's bucket."""
    script = str(ROOT / "benchmarks/in_place.py")
    folder = str(given.runs / "in_place")
    told = json.loads(given.python(script, folder, "--s3_tars=10").splitlines()[-1])
    same, bucket = told["same"], told["s3"]
    if not (all(same.values()) and bucket["same"]):
        raise RuntimeError(f"batches differ: {same}, from the bucket: {not bucket['same']}")
    columns = ("mb", "pairs")
    found: Rows = {
        f"in_place/{row}": {column: told["rates"][name][column] for column in columns}
        for row, name in IMPORTS.items()
    }
    batches = told["batches"]
    found |= {f"in_place_batches/{row}": dict(value=batches[row]) for row in ("copy", "in_place")}
    found["in_place_batches/share"] = dict(share=batches["quotient"])
    factors = {name: bucket[f"{name}_factor"] for name in ("index", "first", "again")}
    return found | dict(in_place_s3=factors)


IMPORTS = dict(
    tar="read",
    index_noverify="index_noverify",
    copy_noverify="copy_noverify",
    index="index",
    copy="copy",
)


def compiled(row: str, values: Callable[[dict[str, Any]], Values], flags: str) -> Measurement:
    """A row by `coca-jax compile` with these flags."""

    def run(given: Given) -> Rows:
        return {row: values(given.coca("compile", *flags.split()))}

    return Measurement((row,), run, 15, f"coca-jax compile {flags}", "estimated")


def of_tpu(told: dict[str, Any]) -> Values:
    """The columns of performance.md's first table: by `estimated_cycles`, not by the schedule."""
    share = told["mfu_compute_only_by_estimated_cycles"]
    seconds = told["estimated_compute_seconds"] * told["estimated_mfu_compute_only"] / share
    links = told["collective_bound_seconds"]
    return dict(
        gib=told["bytes_per_device"]["total"] / GIB,
        gib_chip=told["hbm_bytes"] / GIB,
        cycles=told["estimated_cycles"] / 1e6,
        cycles_kernels=told["kernel_cycles"] / 1e6,
        seconds=seconds,
        mfu=100 * share,
        collectives_seconds=links,
        mfu_nothing_overlaps=100 * share * seconds / (seconds + links),
    )


def of_gpu(told: dict[str, Any]) -> Values:
    """The columns of performance.md's tables of a roofline."""
    return dict(
        memory_traffic=told["memory_traffic_bytes"] / 1e9,
        kernels=told["kernels"],
        gib=told["bytes_per_device"]["total"] / GIB,
        mfu_at_most=100 * told["roofline_mfu_compute_only"],
    )


def of_cpu(told: dict[str, Any]) -> Values:
    return dict(gib=told["bytes_per_device"]["total"] / GIB)


def kills(given: Given) -> Rows:
    """A training that is killed a hundred times, at moments that are drawn."""
    script = str(ROOT / "tests/soak/kills.py")
    told = json.loads(given.python(script, "--kills=100").splitlines()[-1])
    found: Rows = {
        f"kills/{row}": {
            column: told["by"].get(f"{moment} {name}", 0) for column, name in SIGNALS.items()
        }
        for row, moment in MOMENTS.items()
    }
    median = told["median_seconds_from_kill_to_first_new_step"]
    return found | {"kills/recovery": dict(median_seconds=median, most_seconds=told["longest"])}


SIGNALS = dict(sigkill="SIGKILL", sigterm="SIGTERM", ctrl_c="SIGINT")
MOMENTS = dict(
    start="start-up",
    compilation="compile",
    step="step",
    save="save",
    evaluation="evaluation",
    end="report",
)
