"""Rows that are counted or timed of this package's own parts."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pictures
from measuring import HERE, MIB, Given, Rows, Values, environment

SIZES = tuple(
    f"sizes/{name}"
    for name in ("coca_2026_small", "coca_base", "coca_2026_base", "coca_large", "coca_2026_large")
)
LOSSES = ("losses/contrastive", "losses/captioning")
PAIRS = ("retrieval_memory/12500", "retrieval_memory/25000", "retrieval_memory/50000")


def sizes(given: Given) -> Rows:
    """Parameters in millions, GFLOP of a forward pass over a pair."""
    import jax

    from coca_jax.config import typed
    from coca_jax.estimate.flops import model_flops
    from coca_jax.models import coca
    from coca_jax.training import recipes

    def one(recipe: str) -> Values:
        model = typed(recipes.load(recipe)).model
        built = coca.build(model)
        arrays = jax.eval_shape(lambda key: coca.init(built, key), jax.random.key(0))
        count = sum(x.size for x in jax.tree.leaves(arrays))
        return dict(parameters=count / 1e6, gflop=model_flops(model) / 1e9)

    return {row: one(row.split("/")[1]) for row in SIZES}


def losses(given: Given) -> Rows:
    """Both losses beside their plain forms, and with other chunks and tiles."""
    told = given.coca("benchmark", "losses", "--repeats=3")
    small, large, tiles = json.loads(given.python("-c", CHUNKS).splitlines()[-1])
    others = {
        f"{name}_{size}": of[key] / unit
        for size, of in ((152, small), (608, large))
        for name, key, unit in (("mib", "ours_bytes", MIB), ("time_share", "time_ratio", 1))
    }
    wide = dict(mib=tiles["ours_bytes"] / MIB, time_share=tiles["time_ratio"])
    return {"losses/chunks": others, "losses/tiles_2048": wide} | {
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


def huge_pages(given: Given) -> Rows:
    """Seconds of a core that a step takes without and with huge pages."""
    words = ("benchmark", "train", "--config=emoji", "--config.model.dtype=float32", "--repeats=9")
    without = given.coca(*words, one_core=True)["cpu_seconds"]
    asked = dict(GLIBC_TUNABLES="glibc.malloc.hugetlb=1")
    with_them = given.coca(*words, one_core=True, **asked)["cpu_seconds"]
    return {"huge_pages": dict(without_s=without, with_s=with_them, times=without / with_them)}


CHUNKS = """
import json
from coca_jax.apps.benchmark import captioning, contrastive
found = [captioning(64, 76, 49_408, 512, 8, chunk, 3) for chunk in (152, 608)]
print(json.dumps([*found, contrastive(32_768, 512, 8_192, 2_048, 3)]))
"""


RETRIEVAL = """
import resource, sys, time
import numpy as np
from coca_jax.evaluation.metrics import ranking as ranks
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


def in_place(given: Given) -> Rows:
    """100,000 pairs in tars: importing them, and batches, here and from a server's bucket."""
    told = given.script("in_place.py", str(given.runs.parent / "in_place"), "--s3_tars=10")
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


def kernels(given: Given) -> Rows:
    """Convolutions by XLA and by our kernels, and the parts of a decoder in both types."""
    told = given.script("cpu_kernels.py", one_core=True)
    found: Rows = {f"cpu_convolutions/{name}": row for name, row in told["convolutions"].items()}
    parts = told["decoding"].items()
    return found | {f"caption_kernels/bfloat16_{name}": row for name, row in parts}


def training_kernels(given: Given) -> Rows:
    """Attention and the gradients of weights, by XLA and by our kernels."""
    told = given.script("cpu_training.py", one_core=True)
    found: Rows = {f"cpu_attention/{name}": row for name, row in told["attention"].items()}
    weights = told["weight_gradients"].items()
    return found | {f"cpu_weight_gradients/{name}": row for name, row in weights}


def step_dtypes(given: Given) -> Rows:
    """Seconds of a core that a step of the emoji recipe takes in either type."""
    times = {}
    for dtype in ("float32", "bfloat16"):
        flags = ("--config=emoji", f"--config.model.dtype={dtype}", "--repeats=15")
        times[dtype] = given.coca("benchmark", "train", *flags, one_core=True)["cpu_seconds"]
    return {"step_emoji": times | dict(share=times["bfloat16"] / times["float32"])}


ATTENTION = ("36_by_36", "50_by_50", "76_by_255", "197_by_197")
WEIGHTS = ("4608_640_160", "800_768_3072", "304_520_49408")
WAYS = ("xla", "kernels", "bfloat16_kernels")
CONVOLUTIONS = ("32_64_24_s2", "64_64_12", "64_128_12_s2", "128_128_6")
DECODING = ("mlp", "self_attention", "image_attention", "logits")
WITHOUT = {"batch_1": (1, 1), "batch_16": (16, 1), "beams_6": (1, 6)}


def without_kernels(given: Given) -> Rows:
    """Seconds of captions of 60 tokens, pixels included, by XLA's form and by the kernels."""
    found: Rows = {}
    for row, (batch, beams) in WITHOUT.items():
        flags = ("--config=finetune_open_clip", "--config.model.dtype=float32", "--repeats=3")
        sizes = (f"--batch_size={batch}", f"--num_beams={beams}")
        ways = dict(xla="0", kernels="1")
        found[f"caption_kernels/{row}"] = {
            way: given.coca("benchmark", "caption", *flags, *sizes, COCA_JAX_CPU_KERNELS=on)[
                "seconds"
            ]
            for way, on in ways.items()
        }
    return found


def text_lengths(given: Given) -> Rows:
    return {
        f"text_lengths/{row}": values for row, values in given.script("text_lengths.py").items()
    }


LENGTHS = tuple(
    f"{kind}_{size}"
    for kind, sizes in dict(
        alt=(64, 256, 65536), sentences=(256, 65536), names=(256, 65536)
    ).items()
    for size in sizes
)


def saves(given: Given) -> Rows:
    """What saves and kept texts leave in memory."""
    told = given.script("saves.py")
    return {f"soak/{row}": values for row, values in told.items()}


def bucket(given: Given) -> Rows:
    """Objects and requests of a checkpoint of the demo's state in an S3 bucket."""
    told = given.script("bucket.py")
    saved = dict(objects=told["objects"], saved_mb=told["saved_mb"])
    return dict(bucket_save=saved, bucket_requests=dict(save=told["save"], read=told["read"]))


def resumed(given: Given) -> Rows:
    """Seconds from the command to the second step's line of a run that was killed, twice."""
    run = given.runs / f"resumed_{time.time_ns()}"
    command = [sys.executable, "-m", "coca_jax", "train", "--config=demo", f"--workdir={run}"]
    command += ["--config.log.every_steps=1", "--config.checkpoint.every_steps=5"]

    def until(step: int, resumed: bool) -> float:
        """Seconds until the line of that step, or of the second step of this start; killed then."""
        start, seen = time.monotonic(), 0
        process = subprocess.Popen(
            command, cwd=given.folder, env=environment(), text=True, stderr=subprocess.PIPE
        )
        assert process.stderr
        for line in process.stderr:
            seen += line.startswith("step ")
            if seen == (2 if resumed else step):
                took = time.monotonic() - start
                process.send_signal(signal.SIGKILL)
                process.wait()
                return took
        raise RuntimeError(f"train ended with status {process.wait()}")

    until(12, resumed=False)
    return dict(demo_resumed=dict(first=until(2, True), second=until(2, True)))


def input_memory(given: Given) -> Rows:
    """Resident MiB of reading JPEGs in batches of 64, every ten seconds."""
    flags = (f"--config={HERE}/pictures_recipe.py:{jpeg_data(given)}", "--seconds=60")
    told = given.coca("benchmark", "input", *flags, "--memory_every=10")
    return dict(input_memory={f"s_{10 * (n + 1)}": mib for n, mib in enumerate(told["rss_mib"])})


def jpegs(given: Given) -> str:
    """A folder of 2,000 drawn JPEGs."""
    return str(pictures.drawn("jpegs", given.drawn / "jpegs", 2000))


def jpeg_data(given: Given) -> str:
    """The same as `prepare` makes them."""
    out = given.drawn / "data"
    if not (out / "dataset_info.json").exists():
        flags = (f"--input={jpegs(given)}", f"--out={out}", "--split=train")
        given.python("-m", "coca_jax", "prepare", "--format=imagefolder", *flags)
    return str(out)
