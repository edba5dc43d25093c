"""How each row of docs/results.json is measured again.

Rows of the clock that take minutes come first, so that a quiet hour gets through them.
"""

from __future__ import annotations

import figure_rows_long as long
import measuring_compiled as estimates
import measuring_faults as faults
import measuring_parts as parts
import measuring_peers as peers
from measuring import Measurement

BESIDE = (
    "coca-jax benchmark caption --peer --config=finetune_open_clip --config.model.dtype=float32"
)
# A published size of each family of image and text towers.
TOWERS = dict(
    clip="ViT-B-32-quickgelu",
    siglip="ViT-B-16-SigLIP",
    pe="PE-Core-T-16-384",
    openvision="openvision-vit-base-patch16-224",
)
SAME = dict(peer="open_clip 3.3.0, on the same weights, images and tokens")
PEER = dict(peer="open_clip 3.3.0, in turn with ours in the same run")
DIFFERENCE = dict(lower=("*",), slack=1.0)  # of rounding: twice as much is worse
TRAIN = "coca-jax train --config"


def beside(row: str, batch: int, beams: int, minutes: float, times: int = 1) -> Measurement:
    """Captions beside open_clip's."""
    rows = (f"captions/{row}", f"captions/{row}_ratio") if times > 1 else (f"captions/{row}",)
    flags = f"{BESIDE} --batch_size={batch} --num_beams={beams}"
    command = f"{flags}, {times} times" if times > 1 else flags
    run = peers.captions(batch, beams, times)
    patterns = ("ratio", f"captions/{row}_ratio:*")
    return Measurement(rows, run, minutes, command, more=PEER, clock=True, higher=patterns)


CLOCK = (
    Measurement(
        ("start",),
        parts.start,
        1.5,
        "a process each, the demo's model after two steps",
        clock=True,
        lower=("first_seconds", "second_seconds"),
    ),
    Measurement(
        (*parts.LOSSES, "losses/chunks", "losses/tiles_2048"),
        parts.losses,
        2,
        "coca-jax benchmark losses --repeats=3; apps/benchmark.py with other chunks",
        clock=True,
        lower=("ours_mib", "time_share*", "mib*"),
    ),
    Measurement(
        tuple(f"alike/{row}{suffix}" for row, suffix in peers.ALIKE),
        peers.alike,
        3,
        "taskset -c 0 python benchmarks/alike.py --repeats=7, also --dtype=bfloat16",
        more=dict(unit="s", peer="PyTorch's model of the same layers, eager, in turn"),
        clock=True,
        higher=("torch_ours",),
    ),
    Measurement(
        ("huge_pages",),
        parts.huge_pages,
        1,
        "taskset -c 1 coca-jax benchmark train --config=emoji --repeats=9; again with "
        "GLIBC_TUNABLES=glibc.malloc.hugetlb=1",
        more=dict(unit="s"),
        clock=True,
        higher=("times",),
    ),
    beside("batch_1", 1, 1, 1.5),
    Measurement(
        ("search_embed",),
        peers.embedded,
        3,
        "taskset -c 0 python benchmarks/search.py embed FOLDER --count=320",
        more=dict(unit="images a second", peer="open_clip 3.3.0 behind torch's loader, same core"),
        clock=True,
        higher=("ratio",),
    ),
    Measurement(
        ("input/plain", "input/fast"),
        peers.read_beside,
        2.5,
        "coca-jax benchmark input --config=benchmarks/pictures_recipe.py:DATA --peer",
        more=PEER | dict(unit="images a CPU second"),
        clock=True,
        higher=("ratio",),
    ),
    beside("beams_6", 1, 6, 3),
    Measurement(
        (
            *(f"cpu_convolutions/{n}_{way}" for n in parts.CONVOLUTIONS for way in parts.WAYS),
            *(f"caption_kernels/bfloat16_{part}" for part in parts.DECODING),
        ),
        parts.kernels,
        1,
        "taskset -c 0 python benchmarks/cpu_kernels.py",
        clock=True,
        higher=("cpu_convolutions/*_kernels:*",),
        lower=("caption_kernels/*",),
    ),
    Measurement(
        (
            *(f"cpu_attention/{shape}" for shape in parts.ATTENTION),
            *(f"cpu_weight_gradients/{shape}" for shape in parts.WEIGHTS),
        ),
        parts.training_kernels,
        0.7,
        "taskset -c 0 python benchmarks/cpu_training.py",
        more=dict(unit="ms"),
        clock=True,
        lower=("cpu_attention/*:kernels", "cpu_weight_gradients/*:bfloat16_kernels"),
    ),
    Measurement(
        ("step_emoji",),
        parts.step_dtypes,
        1,
        "taskset -c 1 coca-jax benchmark train --config=emoji "
        "--config.model.dtype=float32, bfloat16",
        more=dict(unit="s"),
        clock=True,
        lower=("step_emoji",),
    ),
    Measurement(
        tuple(f"caption_kernels/{row}" for row in parts.WITHOUT),
        parts.without_kernels,
        2.5,
        "coca-jax benchmark caption --config=finetune_open_clip, COCA_JAX_CPU_KERNELS=0 and 1",
        more=dict(unit="s"),
        clock=True,
        lower=("kernels",),
    ),
    Measurement(
        ("demo_resumed",),
        parts.resumed,
        1,
        f"{TRAIN}=demo --config.log.every_steps=1, killed and started again",
        more=dict(unit="s"),
        clock=True,
        lower=("first", "second"),
        slack=0.1,
    ),
    Measurement(
        ("serve_load",),
        faults.loaded,
        1,
        "python benchmarks/serve.py URL picture.jpg --pid=PID, the third such run",
        clock=True,
        lower=("lost", "core_ms"),
    ),
    Measurement(
        (*peers.RECAPTION, *(f"recaption_time/{row}" for row in peers.SPENT)),
        peers.recaptioned,
        5,
        "coca-jax recaption --how=greedy,max_tokens=29 --batch_size=32 --rows=64; "
        "python benchmarks/recaption_peer.py generate",
        more=dict(peer="open_clip 3.3.0, batches of 32, right after it"),
        clock=True,
        higher=("recaption/ratio:*",),
    ),
    beside("batch_16", 16, 1, 9, 3),
    Measurement(
        ("step_b32/float32", "step_b32/bfloat16"),
        peers.steps_beside,
        9,
        "coca-jax benchmark train --config=finetune_open_clip --config.batch_size=16 --peer",
        more=PEER,
        clock=True,
        higher=("captions", "full"),
        lower=("memory_*",),
    ),
    Measurement(
        ("step_b32/by_kernels",),
        peers.step_by_kernels,
        8,
        "coca-jax benchmark train --config=finetune_open_clip --config.batch_size=16 --peer "
        "--config.model.dtype=bfloat16, COCA_JAX_CPU_KERNELS=0 and 1",
        more=PEER,
        clock=True,
        higher=("kernels",),
    ),
    Measurement(
        ("clock", "serve_start"),
        faults.new_user,
        12,
        "taskset -c 0 python benchmarks/new_user.py PLACE PHOTOS",
        clock=True,
        lower=("to_caption", "to_search", "first", "later"),
    ),
    Measurement(
        ("demo/whole",),
        faults.whole_demo,
        7,
        "launch/demo.sh in a fresh clone",
        clock=True,
        lower=("minutes",),
    ),
    Measurement(
        tuple(f"search_million/{row}" for row in ("pictures", "texts", "graph")),
        faults.million,
        16,
        "taskset -c 0 python benchmarks/search.py graph --out=DIR",
        clock=True,
        higher=("recall",),
        lower=("p50", "core_seconds", "megabytes"),
    ),
)
COUNTED = (
    Measurement(
        parts.SIZES, parts.sizes, 0.5, "counted of the arrays, and by formula", "estimated"
    ),
    Measurement(
        parts.PAIRS,
        parts.retrieval,
        1,
        "coca_jax.evaluation.metrics.ranking.retrieval_ranks, a process each",
        lower=("mib",),
        slack=0.1,
    ),
    Measurement(
        (*(f"text_lengths/{row}" for row in parts.LENGTHS), "text_lengths/base_step"),
        parts.text_lengths,
        0.5,
        "python benchmarks/text_lengths.py",
        "estimated",
    ),
    *(
        Measurement(
            (f"towers/{row}",),
            peers.towers(row, name),
            1,
            f"python benchmarks/towers.py {name}",
            more=SAME,
            lower=("image", "text"),
            slack=1.0,
        )
        for row, name in TOWERS.items()
    ),
    Measurement(
        ("clip_benchmark",),
        peers.suites,
        2,
        "python benchmarks/suite_peer.py CHECKPOINT, of a run of the demo",
        more=dict(peer="CLIP_benchmark 1.6.2, in the same run"),
        lower=("difference",),
        slack=1.0,
    ),
    *(
        Measurement(
            (f"parity/{row}", *more),
            peers.parity(row, name),
            minutes,
            f"python benchmarks/parity.py {name}{flags}",
            more=SAME,
            **DIFFERENCE,
        )
        for row, name, minutes, flags, more in (
            ("small", "small", 1, "", ()),
            ("b32", "coca_ViT-B-32", 3, " --gradients", ("gradients/float32", "gradients/float64")),
            ("l14", "coca_ViT-L-14", 3, "", ("convert_l14",)),
        )
    ),
    Measurement(
        ("soak/leak", "soak/given_back", "soak/texts"),
        parts.saves,
        1.5,
        "python benchmarks/saves.py",
        lower=("*",),
        slack=0.3,
    ),
    Measurement(
        ("bucket_save", "bucket_requests"),
        parts.bucket,
        1.5,
        "python benchmarks/bucket.py",
        lower=("*",),
    ),
    Measurement(
        ("input_memory",),
        parts.input_memory,
        2,
        "coca-jax benchmark input --config=benchmarks/pictures_recipe.py:DATA --memory_every=10",
        more=dict(unit="MiB"),
        lower=("*",),
        slack=0.1,
    ),
    Measurement(
        tuple(
            f"damaged/{row}" for row in ("checkpoint", "export", "hub", "converted", "open_clip")
        ),
        faults.damaged,
        6,
        "python -m pytest -s -m slow tests/test_checkpointing.py -k no_damage_is_silent; "
        "python -m pytest -s tests/test_damaged_weights.py -k random_damage",
        lower=("used",),
    ),
    Measurement(
        (
            *(f"in_place/{row}" for row in parts.IMPORTS),
            *(f"in_place_batches/{row}" for row in ("copy", "in_place", "share")),
            "in_place_s3",
        ),
        parts.in_place,
        7,
        "python benchmarks/in_place.py DIR --s3_tars=10",
        higher=("share",),
    ),
)
MEASUREMENTS = (*CLOCK, *COUNTED, *estimates.MEASUREMENTS, *long.TRAINED, *long.FAULTS)


def of_row(row: str) -> Measurement:
    """What measures a row."""
    return next(one for one in MEASUREMENTS if row in one.rows)
