"""How the rows of docs/results.json are measured again, and which are not, and why.

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
                *("--config.model.dtype=float32", f"--batch_size={batch}", f"--beams={beams}"),
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
SIZES = tuple(
    f"sizes/{name}"
    for name in ("coca_2026_small", "coca_base", "coca_2026_base", "coca_large", "coca_2026_large")
)
LOSSES = ("losses/contrastive", "losses/captioning")
PAIRS = ("retrieval_memory/12500", "retrieval_memory/25000", "retrieval_memory/50000")
DEMO = {
    "demo/zeroshot": "zeroshot/scenes_heldout/top1",
    "demo/image_to_text": "retrieval/scenes_heldout/image_to_text_r1",
    "demo/text_to_image": "retrieval/scenes_heldout/text_to_image_r1",
    "demo/exact": "captioning/scenes_test/exact_match",
    "demo/exact_heldout": "captioning/scenes_heldout/exact_match",
    "demo/f1": "captioning/scenes_heldout_many/attribute_f1",
    "demo/perplexity": "captioning/scenes_heldout_many/perplexity",
}
EMOJI = {
    "emoji/image_to_text": "retrieval/emoji_openmoji/image_to_text_r1",
    "emoji/image_to_text_r5": "retrieval/emoji_openmoji/image_to_text_r5",
    "emoji/text_to_image": "retrieval/emoji_openmoji/text_to_image_r1",
    "emoji/text_to_image_r5": "retrieval/emoji_openmoji/text_to_image_r5",
    "emoji/exact": "captioning/emoji_openmoji/exact_match",
}
TOP1 = "classification/fashion_mnist/top1"
QUESTIONS = {
    "easy_vqa/head": "classification/easy_vqa/top1",
    "easy_vqa/decoder": "answers/easy_vqa/exact_match",
}
TPU = {
    "2b/v4": "--config=coca_2b --topology=v4:8x16x16",
    "2b/v5e": "--config=coca_2b --topology=v5e:16x16 --config.accumulate_steps=16",
    "2b/v5p": "--config=coca_2b --topology=v5p:8x8x8",
    "2b/v6e": "--config=coca_2b --topology=v6e:16x16 --config.accumulate_steps=8",
    "2b_576/v4": "--config=coca_2b --topology=v4:8x16x16 --config.model.image_size=576 "
    "--config.batch_size=16384",
    "2b_576_accumulated/v4": "--config=coca_2b --topology=v4:8x16x16 "
    "--config.model.image_size=576 --config.accumulate_steps=4",
    "large/v4": "--config=coca_large --topology=v4:8x8x8",
    "large/v4_32": "--config=coca_large --topology=v4:2x4x4 --config.accumulate_steps=16",
    "large/v5p": "--config=coca_large --topology=v5p:8x8x8",
    "large/v6e": "--config=coca_large --topology=v6e:16x16 --config.accumulate_steps=2",
    "large/v5e": "--config=coca_large --topology=v5e:16x16 --config.batch_size=16384",
    "base/v4": "--config=coca_base --topology=v4:8x8x8",
    "base/v5e": "--config=coca_base --topology=v5e:16x16 --config.batch_size=32768",
    "base/v5p": "--config=coca_base --topology=v5p:8x8x8",
    "base/v6e": "--config=coca_base --topology=v6e:16x16",
}
ONE = "--topology=h100:1 --config.batch_size=256 --config.remat=none"
H100 = {"h100_base/padded": f"--config=coca_base {ONE}"}
SHARE = "--config=coca_224 --topology=cpu:1 --config.batch_size=64 --config.remat"
MEMORY = {
    "none": f"{SHARE}=none",
    "named": f"{SHARE}=named",
    "full": f"{SHARE}=full",
    "full_accumulated": f"{SHARE}=full --config.accumulate_steps=4",
    "full_eight": "--config=coca_224 --topology=cpu:8 --config.batch_size=512 "
    "--config.mesh.fsdp=8 --config.remat=full",
}
BESIDE = (
    "coca-jax benchmark caption --peer --config=finetune_open_clip --config.model.dtype=float32"
)
PEER = dict(peer="open_clip, in turn with ours in the same run")
SEEDED = dict(seeds=list(SEEDS))
MEASUREMENTS = (
    Measurement(SIZES, sizes, 0.5, "counted of the arrays, and by formula", "estimated"),
    Measurement(
        ("start",), start, 2, "a process each, the demo's model after two steps", clock=True
    ),
    Measurement(LOSSES, losses, 2, "coca-jax benchmark losses --repeats=3", clock=True),
    Measurement(PAIRS, retrieval, 1, "coca_jax.evaluators.ranks.retrieval_ranks, a process each"),
    Measurement(
        ("captions/batch_1",),
        captions(1, 1),
        6,
        f"{BESIDE} --batch_size=1",
        more=PEER,
        clock=True,
    ),
    Measurement(
        ("captions/beams_6",),
        captions(1, 6),
        12,
        f"{BESIDE} --batch_size=1 --beams=6",
        more=PEER,
        clock=True,
    ),
    Measurement(
        ("captions/batch_16", "captions/batch_16_ratio"),
        captions(16, 1, 3),
        15,
        f"{BESIDE} --batch_size=16, three times",
        more=PEER,
        clock=True,
    ),
    Measurement(
        tuple(DEMO),
        over_seeds(trained("demo", DEMO)),
        25,
        "coca-jax train --config=demo --config.seed=SEED",
        more=SEEDED,
    ),
    *(
        Measurement(
            tuple(keys),
            trained(recipe, keys, weights),
            minutes,
            f"coca-jax train --config={recipe}{':RUN' * bool(weights)} --config.seed=SEED",
            more=SEEDED,
        )
        for recipe, weights, minutes, keys in (
            ("emoji", "", 75, EMOJI),
            ("fashion_mnist", "", 30, {"fashion_mnist/zeroshot": "zeroshot/fashion_mnist/top1"}),
            ("fashion_mnist_frozen", "fashion_mnist", 30, {"fashion_mnist/frozen": TOP1}),
            ("fashion_mnist_finetune", "fashion_mnist", 30, {"fashion_mnist/finetuned": TOP1}),
            ("easy_vqa", "demo", 40, QUESTIONS),
        )
    ),
    Measurement(
        tuple(f"kills/{row}" for row in (*MOMENTS, "recovery")),
        kills,
        90,
        "python tests/soak/kills.py --kills=100",
    ),
    *(compiled(f"tpu_steps/{row}", of_tpu, flags) for row, flags in TPU.items()),
    *(compiled(row, of_gpu, flags) for row, flags in H100.items()),
    *(compiled(f"memory_224/{row}", of_cpu, flags) for row, flags in MEMORY.items()),
)

# Rows that no measurement gives, by the beginnings of their names.
NOT_AGAIN = {
    "demo/whole": "the clock of a fresh clone; run launch/demo.sh",
    "emoji/whole": "the clock of one run with another captioning weight",
    "fashion_mnist/": "read off the logs of runs, or of options that the recipe has no more",
    "easy_vqa/": "read off the logs of runs, or at another rate than the recipe's",
    "gradients/": "pytest -m torch tests/test_open_clip_parity.py holds them below a bound",
    "parity/": "pytest -m torch tests/test_open_clip_parity.py holds them below a bound",
    "h100_": "of forms that are no more, or with flags that were not written down",
    "tpu_": "parts of a step, by scripts that were not kept; the whole steps are in tpu_steps",
    "cpu_": "by scripts that were not kept, call by call in turn with torch",
    "losses/": "other chunks than those of `benchmark losses`",
    "captions/other_machine": "on a machine that is not there any more",
    "caption_kernels/": "by a script that was not kept, in turn with and without kernels",
    "twins/": "needs runs of hours, or data that come with no recipe",
    "clip_benchmark": "needs CLIP_benchmark and five sets in its layout",
    "convert_l14": "needs the weights of coca_ViT-L-14, 2.55 GB",
    "in_place": "its tars and its script were not kept",
    "input": "its 2,000 JPEGs were not kept; coca-jax benchmark input --peer, on data of your own",
    "text_lengths/": "by a script that was not kept",
    "optimizers/": "the demo at a captioning weight of 10, which it has no more",
    "ablations/": "with options that the demo has no more; coca-jax ablate examples/ablations.toml",
    "video": "needs runs of hours and foldings whose script was not kept",
    "recaption": "its tar was not kept",
    "soak_memory": "python tests/soak/soak.py --minutes=30 prints its own",
    "fit/": "its drawings were not kept",
    "bucket_": "counted in the log of a server for tests",
    "locked/": "its runs were not kept",
}


def of_row(row: str) -> Measurement | None:
    """What measures a row; None for those of NOT_AGAIN."""
    return next((one for one in MEASUREMENTS if row in one.rows), None)


def why_not(row: str) -> str:
    """Why a row is not measured again; '' where it is, or where nobody has said."""
    if of_row(row):
        return ""
    return next((why for begin, why in NOT_AGAIN.items() if row.startswith(begin)), "")
