"""Which rows of docs/results.json are measured again, and how; which are not, and why."""

from __future__ import annotations

from measuring import (
    ALIKE,
    IMPORTS,
    LOSSES,
    MOMENTS,
    PAIRS,
    SEEDS,
    SIZES,
    Measurement,
    alike,
    captions,
    compiled,
    in_place,
    kills,
    losses,
    of_cpu,
    of_gpu,
    of_tpu,
    over_seeds,
    recaption_kills,
    reinforced,
    retrieval,
    sizes,
    start,
    towers,
    trained,
)

DEMO = {
    "demo/zeroshot": "zeroshot/scenes_heldout/top1",
    "demo/image_to_text": "retrieval/scenes_heldout/image_to_text_r1",
    "demo/text_to_image": "retrieval/scenes_heldout/text_to_image_r1",
    "demo/exact": "captioning/scenes_test/exact_match",
    "demo/exact_heldout": "captioning/scenes_heldout/exact_match",
    "demo/f1": "captioning/scenes_heldout_many/attribute_f1",
    "demo/zeroshot_unseen": "zeroshot/scenes_unseen/top1",
    "demo/exact_unseen": "captioning/scenes_unseen/exact_match",
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
# A published size of each family of image and text towers.
TOWERS = dict(
    clip="ViT-B-32-quickgelu",
    siglip="ViT-B-16-SigLIP",
    pe="PE-Core-T-16-384",
    openvision="openvision-vit-base-patch16-224",
)
SAME = dict(peer="open_clip 3.3.0, on the same weights, images and tokens")
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
        tuple(f"alike/{row}" for row in ALIKE),
        alike,
        2,
        "taskset -c 0 python benchmarks/alike.py --repeats=7",
        more=dict(unit="s", peer="PyTorch's model of the same layers, eager, in turn"),
        clock=True,
    ),
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
        f"{BESIDE} --batch_size=1 --num_beams=6",
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
    Measurement(
        ("recaption_kills", "recaption_kills_bfloat16"),
        recaption_kills,
        20,
        "python tests/soak/recaption.py --checkpoint=runs/demo --kills=100 --dtype=DTYPE",
    ),
    Measurement(
        tuple(f"reinforced/{row}" for row in ("plain", "student", "teacher", "exact")),
        reinforced,
        80,
        "coca-jax train --config=emoji_reinforced, and --config=emoji --config.steps=1200",
        more=SEEDED,
    ),
    *(
        Measurement(
            (f"towers/{row}",),
            towers(row, name),
            1,
            f"python benchmarks/towers.py {name}",
            more=SAME,
        )
        for row, name in TOWERS.items()
    ),
    Measurement(
        (
            *(f"in_place/{row}" for row in IMPORTS),
            *(f"in_place_batches/{row}" for row in ("copy", "in_place", "share")),
            "in_place_s3",
        ),
        in_place,
        7,
        "python benchmarks/in_place.py DIR --s3_tars=10",
    ),
    *(compiled(f"tpu_steps/{row}", of_tpu, flags) for row, flags in TPU.items()),
    *(compiled(row, of_gpu, flags) for row, flags in H100.items()),
    *(compiled(f"memory_224/{row}", of_cpu, flags) for row, flags in MEMORY.items()),
)

# Rows that no measurement gives, by the beginnings of their names.
NOT_AGAIN = {
    "demo/whole": "the clock of a fresh clone; run launch/demo.sh",
    "averaging/": "the recipes with another schedule, a core each; run the commands",
    "demo_0_1/": "the recipe of version 0.1",
    "emoji/core_minutes": "a run bound to one core",
    "emoji_0_1/": "the recipe of version 0.1",
    "emoji_0_1/whole": "the clock of one run with another captioning weight",
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
    "in_place_reading": "its tars were not kept",
    "input": "its 2,000 JPEGs were not kept; coca-jax benchmark input --peer, on data of your own",
    "text_lengths/": "by a script that was not kept",
    "optimizers/": "the demo at a captioning weight of 10, which it has no more",
    "ablations/": "with options that the demo has no more; coca-jax ablate examples/ablations.toml",
    "video": "needs runs of hours and foldings whose script was not kept",
    "recaption": "its tars were not kept",
    "step_b32/": "coca-jax benchmark train --peer prints its own",
    "demo_resumed": "by hand: kill a run of the demo, start it again",
    "clock": "a new user's, by hand: the commands of docs/quick_start.md in a fresh clone",
    "versions/": "needs version 0.1 in an environment of its own; python benchmarks/versions.py",
    "serve_": "an hour, and a machine without other work; python benchmarks/serve.py",
    "search_million/": "its index was not kept; python benchmarks/search.py graph makes another",
    "search_embed": "its JPEGs were not kept; python benchmarks/search.py embed on others",
    "search_index": "its 2,000 JPEGs were not kept; `time coca-jax search index` on others",
    "search_kills": "its 2,000 JPEGs were not kept; python benchmarks/search.py kills on others",
    "pairs/": "python tests/soak/kills.py --kills=20 --stops=5 --processes=2 prints its own",
    "damaged/": "counted by tests/test_checkpointing.py and tests/test_damaged_weights.py",
    "fuzzed": "python tests/fuzz/run.py all --count=3600 --seed=22 prints its own",
    "soak/": "python tests/soak/soak.py --minutes=30 prints its own",
    "fit/": "its drawings were not kept",
    "bucket_": "counted in the log of a server for tests",
    "locked/": "its runs were not kept",
    "tuned/": "needs a run on emoji and Tux Paint's stamps; the commands stand in adaptation.md",
}


def of_row(row: str) -> Measurement | None:
    """What measures a row; None for those of NOT_AGAIN."""
    return next((one for one in MEASUREMENTS if row in one.rows), None)


def why_not(row: str) -> str:
    """Why a row is not measured again; '' where it is, or where nobody has said."""
    if of_row(row):
        return ""
    return next((why for begin, why in NOT_AGAIN.items() if row.startswith(begin)), "")
