"""The rows that take from ten minutes to hours: trained models, killed trainings."""

from __future__ import annotations

import measuring_ablations as ablations
import measuring_faults as faults
import measuring_fits as fits
import measuring_runs as runs
from measuring import SEEDS, Measurement

SEEDED = dict(seeds=list(SEEDS))
FIRST = dict(seeds=[0])
SCORES = dict(higher=("*",))
TRAIN = "coca-jax train --config"
EARLIER = "benchmarks/earlier_recipe.py"
TRAINED = (
    Measurement(
        tuple(runs.DEMO),
        runs.demo,
        18,
        f"{TRAIN}=demo --config.seed=SEED",
        more=dict(seeds=[0, 1, 2]),
        **SCORES,
    ),
    Measurement(
        (*runs.EMOJI, "emoji/minutes", "twins/emoji"),
        runs.emoji,
        24,
        f"{TRAIN}=emoji",
        more=FIRST,
        higher=("value", "exact", "bleu4", "rouge_l", "cider_d"),
        lower=("emoji/minutes:value",),
    ),
    Measurement(
        tuple(
            f"fashion_mnist/{row}"
            for row in ("zero_shot", "linear_probe", "nearest", "narrow_pooler", "minutes")
        ),
        runs.fashion_mnist,
        40,
        f"{TRAIN}=fashion_mnist, coca-jax evaluate --tasks=linear_probe,knn, "
        f"{TRAIN}=fashion_mnist_frozen:RUN --config.head.width=96 --config.head.num_heads=3",
        more=SEEDED,
        higher=("seed_*", "value"),
    ),
    *(
        Measurement(
            (f"fashion_mnist/{row}",),
            runs.trained(
                f"fashion_mnist_{name}", {f"fashion_mnist/{row}": runs.TOP1}, "fashion_mnist"
            ),
            30,
            f"{TRAIN}=fashion_mnist_{name}:RUN --config.seed=SEED",
            more=SEEDED,
            **SCORES,
        )
        for row, name in (("frozen", "frozen"), ("finetuned", "finetune"))
    ),
    Measurement(
        (
            *runs.QUESTIONS,
            *(f"{row}_twice_the_rate" for row in runs.QUESTIONS),
            "easy_vqa/minutes",
        ),
        runs.easy_vqa,
        90,
        f"{TRAIN}={EARLIER}:demo, {TRAIN}=easy_vqa:RUN --config.seed=SEED, "
        "also --config.optimizer.learning_rate=0.003",
        more=SEEDED,
        higher=("seed_*",),
    ),
    Measurement(
        ("reinforced/plain", "reinforced/student"),
        runs.reinforced,
        80,
        f"{TRAIN}={EARLIER}:emoji_reinforced, and {TRAIN}={EARLIER}:emoji --config.steps=1200",
        more=SEEDED,
        **SCORES,
    ),
    Measurement(
        ("reinforced/teacher", "reinforced/exact"),
        runs.reinforced_first,
        40,
        f"{TRAIN}={EARLIER}:emoji, {TRAIN}={EARLIER}:emoji_reinforced, and "
        f"{TRAIN}={EARLIER}:emoji --config.steps=1200",
        more=FIRST,
        **SCORES,
    ),
    Measurement(
        tuple(f"averaging/{row}" for row in runs.AVERAGING),
        runs.averaging,
        42,
        f"taskset -c 0 {TRAIN}=demo and {TRAIN}=emoji {' '.join(runs.SQUASHED)}, both also with "
        "--config.optimizer.schedule=cosine --config.optimizer.average_share=0",
        more=FIRST,
    ),
    Measurement(
        tuple(f"margins/{row}" for row in runs.DRAWINGS),
        runs.margins,
        25,
        f"{TRAIN}=emoji {' '.join(runs.EARLY)}, and {' '.join(runs.SQUASHED)}",
        more=FIRST,
        **SCORES,
    ),
    Measurement(
        tuple(f"temperature/{row}" for row in runs.DRAWINGS),
        runs.temperature,
        100,
        f"{TRAIN}=emoji, and with {' '.join(runs.FREE)}",
        more=FIRST,
        **SCORES,
    ),
    Measurement(
        tuple(f"optimizers/{row}" for row in runs.OPTIMIZERS),
        runs.optimizers,
        45,
        f"{TRAIN}={EARLIER}:demo --config.loss.captioning_weight=10 --config.optimizer.name=RULE "
        "--config.steps=STEPS --config.seed=SEED",
        more=SEEDED,
    ),
    Measurement(
        tuple(f"ablations/{row}" for row in ablations.RANGED),
        ablations.ablations,
        50,
        "coca-jax ablate benchmarks/ablations.toml --out=DIR",
        more=SEEDED,
    ),
    Measurement(
        tuple(f"ablations/{row}" for row in ablations.ABLATIONS if row not in ablations.RANGED),
        ablations.ablations_one_seed,
        30,
        "coca-jax ablate benchmarks/ablations_one_seed.toml --out=DIR",
        more=FIRST,
    ),
    Measurement(
        tuple(f"options/{row}" for row in ablations.OPTIONS),
        ablations.options,
        90,
        "taskset -c 0 coca-jax ablate benchmarks/options.toml --out=DIR --minutes=2",
        more=SEEDED | dict(unit="%"),
    ),
    Measurement(
        tuple(f"options_demo/{row}" for row in ablations.OPTIONS),
        ablations.options_demo,
        80,
        "taskset -c 0 coca-jax ablate benchmarks/options_demo.toml --out=DIR --minutes=2",
        more=SEEDED | dict(unit="%"),
    ),
    Measurement(
        ("packing/squash", "packing/native"),
        ablations.packing,
        20,
        "taskset -c 0 coca-jax ablate benchmarks/packing.toml --data=data/gimp_help "
        "--data=data/stamps --out=DIR --minutes=2",
        more=SEEDED | dict(unit="%, steps, images a second of a core"),
    ),
    Measurement(
        ("fit/captions", "fit/labels"),
        fits.folders,
        14,
        "coca-jax fit FOLDER --minutes=5, on what benchmarks/pictures.py draws",
        higher=("image_to_text", "text_to_image", "word_f1", "top1"),
        slack=0.1,
    ),
    Measurement(
        ("fit_types/float32", "fit_types/bfloat16"),
        fits.types,
        28,
        "taskset -c 0 coca-jax fit data/emoji --minutes=10 --config.model.dtype=DTYPE",
        more=FIRST,
        higher=("image_to_text", "text_to_image", "exact"),
        slack=0.1,
    ),
    Measurement(
        ("tuned/before", "tuned/plain", "tuned/keep"),
        runs.tuned,
        10,
        f"{TRAIN}={EARLIER}:emoji, {TRAIN}=tuxpaint_tuned:RUN, also with --config.steps=100 "
        "--config.optimizer.keep_embeddings=False --config.data.features= "
        "--config.data.augmentations=0",
        more=FIRST,
        higher=("tuned/keep:*",),
    ),
    Measurement(
        tuple(f"locked/{row}" for row in ("before", "captioner", "joint", "short")),
        runs.locked,
        14,
        f"{TRAIN}=benchmarks/locked_recipe.py:KIND,STEPS",
        more=FIRST,
        higher=("exact", "image_to_text", "text_to_image"),
    ),
    Measurement(
        ("twins/tuxpaint",),
        runs.tuxpaint,
        60,
        f"{TRAIN}=tuxpaint",
        more=FIRST,
        higher=("mean_recall", "bleu4", "cider_d"),
    ),
    Measurement(
        (*(f"video/{row}" for row in (*runs.VIDEO, "steps")), "twins/animated_emoji"),
        runs.animated,
        12,
        f"{TRAIN}={EARLIER}:emoji; "
        "coca-jax evaluate --checkpoint=RUN --data=data/animated_emoji --num_frames=FRAMES; "
        f"{TRAIN}=animated_emoji:RUN --config.data.num_frames=FRAMES",
        more=FIRST,
        higher=("*_frame", "*_frames", "frozen_?", "finetuned_?"),
    ),
)
FAULTS = (
    Measurement(
        tuple(f"kills/{row}" for row in (*faults.MOMENTS, "recovery")),
        faults.kills,
        90,
        "python tests/soak/kills.py --kills=100",
    ),
    Measurement(
        ("pairs/kills", "pairs/stops", "pairs/recovery"),
        faults.pair_kills,
        30,
        "python tests/soak/kills.py --kills=20 --stops=5 --processes=2",
    ),
    Measurement(
        ("recaption_kills", "recaption_kills_bfloat16"),
        faults.recaption_kills,
        20,
        "python tests/soak/recaption.py --checkpoint=runs/demo --kills=100 --dtype=DTYPE",
        lower=("differences",),
    ),
    Measurement(
        ("search_kills",),
        faults.search_kills,
        10,
        "python benchmarks/search.py kills FOLDER --checkpoint=runs/demo",
        lower=("differences",),
    ),
    Measurement(
        ("fuzzed",),
        faults.fuzzed,
        40,
        "python tests/fuzz/run.py all --count=3600 --seed=22",
        lower=("findings",),
    ),
    Measurement(
        ("soak/last",),
        faults.soaked,
        30,
        "taskset -c 0 python tests/soak/soak.py --minutes=30",
        lower=("mib_end", "files_last"),
    ),
    Measurement(
        ("serve_idle",),
        faults.idle,
        60,
        "python benchmarks/serve.py --idle=PID",
        lower=("mib_last", "files"),
    ),
)
