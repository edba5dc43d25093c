"""Rows of models that are trained: minutes to hours, and data in the folder's `data/`."""

from __future__ import annotations

import json
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence

from measuring import HERE, SEEDS, Given, Rows, Values

DEMO = {
    "demo/zero_shot": "zero_shot/scenes_heldout/top1",
    "demo/image_to_text": "retrieval/scenes_heldout/image_to_text_r1",
    "demo/text_to_image": "retrieval/scenes_heldout/text_to_image_r1",
    "demo/exact": "captioning/scenes_test/exact_match",
    "demo/exact_heldout": "captioning/scenes_heldout/exact_match",
    "demo/f1": "captioning/scenes_heldout_many/attribute_f1",
    "demo/zero_shot_unseen": "zero_shot/scenes_unseen/top1",
    "demo/exact_unseen": "captioning/scenes_unseen/exact_match",
}
_WAYS = ("", "normalised_", "reranked_")
_FIRST = [f"{way}{to}" for way in _WAYS for to in ("image_to_text", "text_to_image")]
EMOJI = {f"emoji/{name}": f"retrieval/emoji_openmoji/{name}_r1" for name in _FIRST}
EMOJI |= {f"emoji/{name}_r5": f"retrieval/emoji_openmoji/{name}_r5" for name in _FIRST[:2]}
EMOJI["emoji/exact"] = "captioning/emoji_openmoji/exact_match"
TOP1 = "classification/fashion_mnist/top1"
QUESTIONS = {
    "easy_vqa/head": "classification/easy_vqa/top1",
    "easy_vqa/decoder": "answers/easy_vqa/exact_match",
}
EMOJI_CAPTIONS = ("exact_match", "bleu4", "rouge_l", "cider_d")
AVERAGING = {
    "demo_zero_shot_unseen": "zero_shot/scenes_unseen/top1",
    "demo_exact_heldout": "captioning/scenes_heldout/exact_match",
    "demo_exact_unseen": "captioning/scenes_unseen/exact_match",
    "demo_f1": "captioning/scenes_heldout_many/attribute_f1",
    "demo_image_to_text": "retrieval/scenes_heldout/image_to_text_r1",
    "emoji_image_to_text": "retrieval/emoji_openmoji/image_to_text_r1",
    "emoji_text_to_image": "retrieval/emoji_openmoji/text_to_image_r1",
    "emoji_exact": "captioning/emoji_openmoji/exact_match",
}
DRAWINGS = {
    row.partition("/")[2]: key
    for row, key in EMOJI.items()
    if not (row.endswith("_r5") or "normalised" in row)
}
SHORT = ("--config.steps=1200",)
FREE = ("--config.loss.min_temperature=0", "--config.model.temperature=0.07")
EARLY = (*SHORT, *FREE, "--config.optimizer.projection_rate=1")  # the emoji recipe as it was
SQUASHED = (*EARLY, "--config.data.resize=squash")  # and before that
EARLIER = f"{HERE}/earlier_recipe.py"
EARLIER_STEPS = 3600  # of its emoji
COSINE = ("--config.optimizer.schedule=cosine", "--config.optimizer.average_share=0")
OPTIMIZERS = {
    "zero_shot": "zero_shot/scenes_heldout/top1",
    "image_to_text": "retrieval/scenes_heldout/image_to_text_r1",
    "text_to_image": "retrieval/scenes_heldout/text_to_image_r1",
    "exact": "captioning/scenes_test/exact_match",
    "exact_heldout": "captioning/scenes_heldout/exact_match",
    "f1": "captioning/scenes_heldout_many/attribute_f1",
}
PLAIN = ("attribute_f1", "perplexity", "bleu4", "rouge_l", "cider_d", "word_f1")  # not per cent


def shown(told: Mapping[str, float], key: str) -> float:
    """A score as pages have it: per cent but for those in PLAIN."""
    plain = key.endswith((*PLAIN, *(f"{name}_{end}" for name in PLAIN for end in ("low", "high"))))
    return told[key] * (1 if plain else 100)


def interval(told: Mapping[str, float], key: str, name: str) -> Values:
    """{name, name_low, name_high} of a score."""
    ends = ("", "_low", "_high")
    return {f"{name}{end}": shown(told, f"{key}{end}") for end in ends}


def run_of(
    given: Given, recipe: str, name: str = "", flags: Sequence[str] = (), seed: int = 0,
    weights: str = "", one_core: bool = False,
) -> pathlib.Path:  # fmt: skip
    """The folder of a run, `name` (the recipe's) below the runs; one that is there goes on, one
    that is done stays. weights: the run of the same seed from which it starts."""
    workdir = given.runs / (name or recipe) / f"seed{seed}"
    if not (workdir / "eval.json").exists():
        config = f"{recipe}:{given.runs / weights / f'seed{seed}'}" if weights else recipe
        words = (f"--config={config}", f"--workdir={workdir}", f"--config.seed={seed}", *flags)
        given.coca("train", *words, one_core=one_core)
    return workdir


def scores(run: pathlib.Path) -> dict[str, float]:
    return json.loads((run / "eval.json").read_text())


def minutes(run: pathlib.Path) -> float:
    """That a run took, evaluation included."""
    life = json.loads((run / "goodput.json").read_text())["life"]["seconds"]
    return sum(life.values()) / 60


def step_minutes(run: pathlib.Path) -> float:
    """Of all threads of a run's process, in steps and in waits for data: other work on the machine
    changes them little."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return sum(json.loads(line).get("processor_time") or 0.0 for line in lines) / 60


def earlier_emoji(given: Given) -> pathlib.Path:
    """The run on emoji that others start from: seed 0 of the recipe as it was."""
    return run_of(given, f"{EARLIER}:emoji", "earlier_emoji")


def one_run(recipe: str, keys: dict[str, str]) -> Callable[[Given], Rows]:
    """Seed 0 with the intervals over the examples."""

    def run(given: Given) -> Rows:
        told = scores(run_of(given, recipe))
        found = {row: interval(told, key, "value") for row, key in keys.items()}
        names = dict(value="value", value_low="low", value_high="high")
        return {row: {names[k]: v for k, v in of.items()} for row, of in found.items()}

    return run


def trained(
    recipe: str, keys: dict[str, str], weights: str = "", name: str = "", flags: Sequence[str] = ()
) -> Callable[[Given], Rows]:
    """A recipe with three seeds, each seed's scores; on one core."""

    def run(given: Given) -> Rows:
        found: dict[str, Values] = {row: {} for row in keys}
        for seed in SEEDS:
            told = scores(run_of(given, recipe, name, flags, seed, weights, one_core=True))
            for row, key in keys.items():
                found[row][f"seed_{seed}"] = shown(told, key)
        return found

    return run


def demo(given: Given) -> Rows:
    """Seed 0 with its intervals, seeds 1 and 2 beside."""
    found = one_run("demo", DEMO)(given)
    for seed in SEEDS[1:]:
        told = scores(run_of(given, "demo", seed=seed))
        for row, key in DEMO.items():
            found[row][f"seed_{seed}"] = shown(told, key)
    return found


def emoji(given: Given) -> Rows:
    """Seed 0 on all cores with its intervals, and its minutes and captions."""
    found = one_run("emoji", EMOJI)(given)
    run = run_of(given, "emoji")
    names = dict(exact_match="exact")
    captions: Values = {}
    for key in EMOJI_CAPTIONS:
        captions |= interval(scores(run), f"captioning/emoji_openmoji/{key}", names.get(key, key))
    return found | {"emoji/minutes": dict(value=minutes(run)), "twins/emoji": captions}


def fashion_mnist(given: Given) -> Rows:
    """The recipe with three seeds; probes of seed 0's encoder; a narrower head; minutes."""
    found = trained("fashion_mnist", {"fashion_mnist/zero_shot": "zero_shot/fashion_mnist/top1"})(
        given
    )
    run = run_of(given, "fashion_mnist")
    flags = ("--data=data/fashion_mnist", "--name=fashion_mnist", f"--out={run}/probes")
    given.coca("evaluate", f"--checkpoint={run}", "--tasks=linear_probe,knn", *flags)
    told = json.loads((run / "probes/eval.json").read_text())
    for row, kind in (("linear_probe", "linear_probe"), ("nearest", "knn")):
        found[f"fashion_mnist/{row}"] = dict(value=100 * told[f"{kind}/fashion_mnist/top1"])
    narrow = ("--config.head.width=96", "--config.head.num_heads=3")
    name = "fashion_mnist_narrow"
    told = scores(run_of(given, "fashion_mnist_frozen", name, narrow, weights="fashion_mnist"))
    found["fashion_mnist/narrow_pooler"] = dict(value=100 * told[TOP1])
    return found | {"fashion_mnist/minutes": dict(minutes=minutes(run))}


def easy_vqa(given: Given) -> Rows:
    """From runs of 0.1's demo, three seeds; at twice the recipe's rate, too."""
    demo = "earlier_demo"
    for seed in SEEDS:
        run_of(given, f"{EARLIER}:demo", demo, seed=seed)
    found = trained("easy_vqa", QUESTIONS, demo)(given)
    twice = {f"{row}_twice_the_rate": key for row, key in QUESTIONS.items()}
    flags = ("--config.optimizer.learning_rate=0.003",)
    found |= trained("easy_vqa", twice, demo, "easy_vqa_twice", flags)(given)
    return found | {"easy_vqa/minutes": dict(minutes=minutes(run_of(given, "easy_vqa")))}


def averaging(given: Given) -> Rows:
    """A rate that falls beside a mean, equal steps, seed 0, one core."""
    ways = {
        "demo": (
            run_of(given, "demo", "demo_cosine", COSINE, one_core=True),
            run_of(given, "demo", "demo_mean", one_core=True),
        ),
        "emoji": (
            run_of(given, "emoji", "emoji_1200_cosine", (*SQUASHED, *COSINE), one_core=True),
            run_of(given, "emoji", "emoji_1200_squash", SQUASHED, one_core=True),
        ),
    }
    found: Rows = {}
    for row, key in AVERAGING.items():
        told = [scores(run) for run in ways[row.partition("_")[0]]]
        values = dict(zip(("cosine", "mean"), (shown(one, key) for one in told), strict=True))
        found[f"averaging/{row}"] = values
    return found


def margins(given: Given) -> Rows:
    """Drawings with their margins and without, equal steps, seed 0, one core."""
    ways = dict(
        squash=scores(run_of(given, "emoji", "emoji_1200_squash", SQUASHED, one_core=True)),
        trim=scores(run_of(given, "emoji", "emoji_1200_trim", EARLY, one_core=True)),
    )
    return beside("margins", ways)


def temperature(given: Given) -> Rows:
    """The emoji with a temperature that is learned freely and with the recipe's, seed 0."""
    ways = dict(
        free=scores(run_of(given, "emoji", "emoji_free", FREE)),
        held=scores(run_of(given, "emoji")),
    )
    return beside("temperature", ways)


def beside(name: str, ways: Mapping[str, Mapping[str, float]]) -> Rows:
    """What the runs on emoji of some ways, by name, found: a row a score."""
    return {
        f"{name}/{row}": {way: shown(told, key) for way, told in ways.items()}
        for row, key in DRAWINGS.items()
    }


def optimizers(given: Given) -> Rows:
    """0.1's demo at a captioning weight of 10 by AdamW and by Muon."""
    found: Rows = {f"optimizers/{row}": {} for row in OPTIMIZERS}
    for rule, steps in (("adamw", 3400), ("muon", 2600)):
        flags = (f"--config.optimizer.name={rule}", f"--config.steps={steps}")
        for seed in SEEDS:
            more = (*flags, "--config.loss.captioning_weight=10")
            told = scores(run_of(given, f"{EARLIER}:demo", f"demo_{rule}", more, seed))
            for row, key in OPTIMIZERS.items():
                found[f"optimizers/{row}"][f"{rule}_{seed}"] = shown(told, key)
    return found


def reinforced(given: Given) -> Rows:
    """A recipe on recaptioned data beside the one that it is from, of twice its steps, as the
    recipes were: R@1 of both ways, per cent, mean and range."""
    found: Rows = {}
    for row, each in _reinforced(given, SEEDS).items():
        found[f"reinforced/{row}"] = {}
        for way in ("image_to_text", "text_to_image"):
            of = [100 * one[f"retrieval/emoji_openmoji/{way}_r1"] for one in each]
            means = {way: statistics.mean(of), f"{way}_low": min(of), f"{way}_high": max(of)}
            found[f"reinforced/{row}"] |= means
    return found


def reinforced_first(given: Given) -> Rows:
    """R@1 of the run that wrote the captions, and exact names of those that followed, seed 0."""
    teacher, told = scores(earlier_emoji(given)), _reinforced(given, SEEDS[:1])
    ways = ("image_to_text", "text_to_image")
    exact = {
        row: 100 * each[0]["captioning/emoji_openmoji/exact_match"] for row, each in told.items()
    }
    return {
        "reinforced/teacher": {
            way: 100 * teacher[f"retrieval/emoji_openmoji/{way}_r1"] for way in ways
        },
        "reinforced/exact": exact,
    }


def _reinforced(given: Given, seeds: Sequence[int]) -> dict[str, list[dict[str, float]]]:
    """Scores of each seed of both recipes, the data of one written by a run of the other."""
    out = ("--input=data/emoji", "--out=data/emoji_rich", "--to=array_record", "--text=all")
    teacher = f"--checkpoint={earlier_emoji(given)}"
    given.coca("recaption", teacher, *out, "--embeddings", *WAYS)
    runs = dict(
        plain=(f"{EARLIER}:emoji", "earlier_emoji_1200", SHORT),
        student=(f"{EARLIER}:emoji_reinforced", "earlier_reinforced", ()),
    )
    return {
        row: [scores(run_of(given, recipe, name, flags, seed, one_core=True)) for seed in seeds]
        for row, (recipe, name, flags) in runs.items()
    }


WAYS = ("--how=greedy,max_tokens=15", "--how=nucleus,top_p=0.9,num_captions=3,max_tokens=15")


def tuned(given: Given) -> Rows:
    """A run on emoji as it was, tuned on Tux Paint's stamps, plainly and so that it stays able."""
    start = earlier_emoji(given)
    plain = ("--config.steps=100", "--config.optimizer.keep_embeddings=False")
    plain += ("--config.data.features=", "--config.data.augmentations=0")
    runs = dict(plain=("tuxpaint_plain", plain), keep=("tuxpaint_tuned", ()))
    found: Rows = {}
    for row, (name, flags) in runs.items():
        run = run_of(given, f"tuxpaint_tuned:{start}", name, flags, one_core=True)
        first = json.loads((run / "evaluations.jsonl").read_text().splitlines()[0])["scores"]
        for where, told in (("before", first), (row, scores(run))):
            values: Values = {}
            for name, key in TUNED.items():
                values |= interval(told, key, name)
            found[f"tuned/{where}"] = values
    return found


TUNED = dict(
    recall="retrieval/emoji_openmoji/mean_recall",
    cider_d="captioning/tuxpaint/cider_d",
    word_f1="captioning/tuxpaint/word_f1",
)


def animated(given: Given) -> Rows:
    """Clips by one frame and by eight: a run on emoji as it was, then tuned to their groups."""
    start = earlier_emoji(given)
    found: Rows = {f"video/{row}": {} for row in VIDEO}
    for frames in (1, 8):
        flags = ("--data=data/animated_emoji", "--split=test", f"--num_frames={frames}")
        out = given.runs / f"animated_{frames}"
        tasks = "--tasks=retrieval,zero_shot,linear_probe"
        given.coca(
            "evaluate", f"--checkpoint={start}", tasks, "--name=clips", f"--out={out}", *flags
        )
        told = json.loads((out / "eval.json").read_text())
        for row, key in VIDEO.items():
            name = f"{frames}_frame{'s' * (frames > 1)}"
            found[f"video/{row}"] |= interval(told, key, name)
        for row, rate in (("frozen", 0.0), ("finetuned", 3e-4)):
            more = (f"--config.data.num_frames={frames}",)
            more += (f"--config.optimizer.encoder_learning_rate={rate}",)
            run = run_of(given, f"animated_emoji:{start}", f"animated_{row}_{frames}", more)
            key = "classification/animated_emoji/top1"
            found.setdefault("twins/animated_emoji", {}).update(
                interval(scores(run), key, f"{row}_{frames}")
            )
    steps = dict.fromkeys(("ranks", "logistic", "of"), EARLIER_STEPS)  # none is cut off
    return found | {"video/steps": steps}


VIDEO = dict(
    clip_to_name="retrieval/clips/image_to_text_r1",
    name_to_clip="retrieval/clips/text_to_image_r1",
    zero_shot_group="zero_shot/clips/top1",
    logistic="linear_probe/clips/top1",
)


def locked(given: Given) -> Rows:
    """A captioner on a locked encoder beside both losses from scratch, on three groups of emoji."""
    recipe = f"{HERE}/locked_recipe.py"

    def of(name: str, words: str) -> pathlib.Path:
        return run_of(given, f"{recipe}:{words}", f"locked_{name}", one_core=True)

    start, short = of("contrastive", "contrastive,700"), of("short", "contrastive,400")
    named = dict(before=start, captioner=of("captioner", f"captioner,700,{start}"))
    named |= dict(joint=of("joint", "joint,700"), short=of("on_short", f"captioner,500,{short}"))
    found: Rows = {}
    for row, run in named.items():
        told, values = scores(run), dict(minutes=step_minutes(run))
        if row != "before":
            values |= interval(told, "captioning/emoji_openmoji/exact_match", "exact")
        if row == "short":
            values["minutes"] += step_minutes(short)
        else:
            for way in ("image_to_text", "text_to_image"):
                values[way] = shown(told, f"retrieval/emoji_openmoji/{way}_r1")
        found[f"locked/{row}"] = values
    return found


def tuxpaint(given: Given) -> Rows:
    """Stamps with captions in many languages, from scratch."""
    told = scores(run_of(given, "tuxpaint"))
    values: Values = {}
    for way in ("image_to_text", "text_to_image"):
        values |= {f"{way}_r{n}": shown(told, f"retrieval/tuxpaint/{way}_r{n}") for n in (1, 10)}
    values |= interval(told, "retrieval/tuxpaint/mean_recall", "mean_recall")
    captions = {key: told[f"captioning/tuxpaint/{key}"] for key in ("bleu4", "rouge_l", "cider_d")}
    return {"twins/tuxpaint": values | captions}
