"""What `fit` says to people: the data in a line or two, the scores beside chance."""

from __future__ import annotations

import functools
import importlib.util
import json
import shlex
from collections.abc import Mapping, Sequence

from coca_jax import extras
from coca_jax.config import Config, keys
from coca_jax.fitting.choose import kinds, training
from coca_jax.fitting.kept import Request
from coca_jax.fitting.look import Facts
from coca_jax.report.verdict import FEW_IMAGES, PRETRAINED


def facts_in_words(facts: Facts, where: str) -> list[str]:
    """What was found, a sentence a line."""
    total = facts.train + facts.test
    lines = [
        f"{where}: {total:,} pictures, {facts.width} x {facts.height} px, "
        + ("drawings or screens" if facts.drawn else "photographs")
        + (f", {facts.repeated:,} of them twice" if facts.repeated else "")
    ]
    if facts.captions:
        median, _, most = facts.words
        letters = " and ".join(facts.scripts) or "no"
        lines.append(
            f"captions: {facts.captions + facts.test_captions:,} pictures have one, "
            f"{facts.distinct_captions:,} different ones of {median} words as a rule and {most} at "
            f"most, {facts.distinct_words:,} different words, {letters} letters"
        )
    if facts.labels:
        shown = ", ".join(facts.classes[:4]) + (", ..." if len(facts.classes) > 4 else "")
        lines.append(
            f"labels: {facts.labels + facts.test_labels:,}, of {len(facts.classes):,} classes "
            f"({shown}), the largest {facts.largest_class:.0%}"
        )
    if facts.left_out:
        lines.append(f"left out: {facts.problems}")
    trained = training(facts).train
    lines += _left_aside(facts, facts.train - trained)
    lines.append(f"held out for the scores: {facts.test:,}; to train on: {trained:,}")
    return lines


def _left_aside(facts: Facts, pictures: int) -> list[str]:
    """The kind of texts that does not train, and so many pictures that have no other."""
    found, lines = kinds(facts), []
    for kind, count, other, same in (
        ("caption", facts.captions, "label", False),
        ("label", facts.labels, "caption", len(facts.classes) == 1),
    ):
        if count and kind not in found:
            few = f"at most a quarter as many pictures have one as have a {other}"
            lines.append(f"{kind}s do not train: {'all are the same' if same else few}")
    if pictures:
        lines.append(f"{pictures:,} pictures have no {found[0]}, and do not train")
    return lines


def warnings(facts: Facts, request: Request, workdir: str) -> list[str]:
    """What to expect of such data, and what would help; a paragraph a line."""
    lines = []
    if facts.train < FEW_IMAGES and not request.init_from:
        lines += [
            f"Few images: {facts.train:,}. With fewer than about {FEW_IMAGES:,}, a model trained "
            "from scratch learns most of them by heart: after 795 Tux Paint images it put the "
            "right caption first of 156 for 8.3% of new images (chance 0.6%). Start from "
            "pretrained weights instead:",
            f"  {_pretrained_command(request, workdir)}",
        ]
        if importlib.util.find_spec("huggingface_hub") is None:
            lines.append(f"  (downloading them needs: {extras.remedy('hf')})")
    if facts.classes and all(name.isdigit() for name in facts.classes) and "label" in kinds(facts):
        lines.append(
            f"The classes are numbers ({', '.join(facts.classes[:3])}, ...), and become texts such "
            f"as 'a photo of the {facts.classes[0]}': --class_names=FILE, one name a line in the "
            "order of the numbers, would say more."
        )
    return lines


def _pretrained_command(request: Request, workdir: str) -> str:
    """The same fit from pretrained weights, in a workdir of its own."""
    folder = f"{request.folder}:{request.kind}" if request.kind else request.folder
    fields = [f"--{name}={value}" for name, value in request.fields.items()]
    fields += [f"--allow_paths={one}" for one in request.allow_paths]
    place = f"--workdir={workdir.rstrip('/')}-pretrained"
    return shlex.join(["coca-jax", "fit", folder, place, f"--init_from={PRETRAINED}", *fields])


def score_table(scores: Mapping[str, float], name: str) -> list[str]:
    """The main scores on a data set, next to those of random guesses and of always giving the most
    common answer."""
    rows: list[tuple[str, ...]] = []

    def add(key: str, what: str) -> None:
        if key in scores:
            low, high = scores.get(f"{key}_low"), scores.get(f"{key}_high")
            between = f" ({low:.1%} to {high:.1%})" if low is not None and high is not None else ""
            baselines = (scores.get(f"{key}_{end}") for end in ("chance", "majority"))
            others = ("" if value is None else f"{value:.1%}" for value in baselines)
            rows.append((what, f"{scores[key]:.1%}{between}", *others))

    texts = scores.get(f"retrieval/{name}/num_texts", 1)
    images = scores.get(f"retrieval/{name}/num_images", 1)
    for rank, words in ((1, "comes first"), (5, "is among the first five")):
        key = f"retrieval/{name}/{{}}_r{rank}"
        add(key.format("image_to_text"), f"an image's own caption {words} of {texts:,.0f}")
        add(key.format("text_to_image"), f"a caption's own image {words} of {images:,.0f}")
    add(f"captioning/{name}/exact_match", "captions correct word for word")
    add(f"captioning/{name}/word_f1", "words of captions (F1)")
    add(f"captioning/{name}/same_start", "captions that begin with the same three words")
    classes = scores.get(f"zero_shot/{name}/num_classes", 1)
    add(f"zero_shot/{name}/top1", f"zero-shot classification, {classes:,.0f} classes")
    if not rows:
        return ["no data was held out, so there are no scores"]
    header = ("held-out images", "score (95% interval)", "random guess", "most common answer")
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths)) for row in (header, *rows))
    return [line.rstrip() for line in lines]


def changed(chosen: Config, config: Config, wanted: Config) -> list[str]:
    """What the user wants otherwise than it was chosen, a value a line. config: what came of it;
    wanted: the choice with the user's values alone, without what follows of them."""
    lines = []
    for key, _ in keys(Config):
        first, value, own = (
            functools.reduce(getattr, key.split("."), c) for c in (chosen, config, wanted)
        )
        if own != first:
            lines.append(f"as you wish: {key} {value!r} in place of {first!r}")
    return lines


def next_commands(workdir: str, data: str) -> list[str]:
    """What may follow a fit, to paste into a shell. data: the prepared folder."""
    place = json.dumps(workdir, ensure_ascii=False)
    program = f'import coca_jax; print(coca_jax.load({place}).caption(["a.jpg"]))'
    run = shlex.quote(workdir)
    return [
        "next:",
        f"  coca-jax caption --checkpoint={run} PICTURE_OR_FOLDER",
        f"  coca-jax evaluate --checkpoint={run} --data={shlex.quote(data)}",
        f"  python -c {shlex.quote(program)}",
    ]


def shown_captions(pairs: Sequence[tuple[str, str, Sequence[str]]]) -> list[str]:
    """(picture, written, references) as lines."""
    return [
        f"  {picture}: {written!r}" + (f" (its own: {own[0]!r})" if own else "")
        for picture, written, own in pairs
    ]
