"""From facts to a recipe: a pure function of what the data, the machine and the time are.

A light convolutional stem, Muon, equal texts as positives, captions twice the weight and a
byte-pair vocabulary were chosen because they learned most in equal minutes on the emoji drawings.
Sizes above 'small' follow from arithmetic and were not trained. docs/own_data.md has what was seen.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from coca_jax import image_shape
from coca_jax.config import Config, Model
from coca_jax.fitting.look import Facts
from coca_jax.fitting.machine import Machine
from coca_jax.fitting.sizes import Size, affordable, step_flops, vocabulary_size

LEAST = 20  # pictures in all, with which there is anything to hold out and to tell apart
PASSES = 200  # over the data, at most; beyond, small data are learned by heart
ENOUGH_STEPS = 150  # of a model from scratch; a size that takes fewer in the time is too large
_USUAL_STEPS = 400  # that a run should have, before its batch is made larger
_GROWING_MINUTES = 15  # from which on compiling a second image size pays
_LABEL_SHARE = 8  # where there are captions, one row in so many is a label


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights to start from: the place, config.model, the number of parameters, how
    images were resized, the vocabulary's file, and what the user called them."""

    path: str
    model: Model
    parameters: int
    resize: str
    label_token: bool = False
    vocabulary: str = ""
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Choice:
    """A recipe but for its steps, and why it is so, a sentence a line."""

    config: Config
    why: tuple[str, ...]
    size: str


def kinds(facts: Facts) -> tuple[str, ...]:
    """Which texts train: ('caption', 'label'), or one of them, the first being the main one."""
    found = {
        "caption": facts.captions if facts.distinct_captions != 1 else 0,
        "label": facts.labels if len(facts.classes) > 1 else 0,
    }
    most = max(found.values())
    return tuple(kind for kind, count in found.items() if count > max(LEAST // 4, most // 4))


def training(facts: Facts) -> Facts:
    """The facts with those pictures alone counted as `train` that have a text which trains."""
    counts = {"caption": facts.captions, "label": facts.labels}
    usable = sum(counts[kind] for kind in kinds(facts))  # those with both are counted twice
    return dataclasses.replace(facts, train=min(facts.train, usable))


def choose(
    facts: Facts,
    machine: Machine,
    minutes: float,
    size: Size,
    *,
    path: str,
    splits: tuple[str, str] = ("train", "test"),
    name: str = "data",
    vocabulary: str = "",
    weights: Weights | None = None,
    bytes_needed: Callable[[Config], float] | None = None,
    change: Callable[[Config], Config] = lambda config: config,
) -> Choice:
    """The recipe for some data on a machine, but for its length, which `with_steps` sets.

    Args:
        facts: of the data, with the lengths of their texts in tokens.
        size: one of `sizes.sizes_for`; not used with weights.
        path, splits, name: the prepared folder, its split to train on and the held-out one ('' for
            none), and what to call it.
        vocabulary: its file.
        weights: to start from.
        bytes_needed: of a config's step on one device; the batch is computed in as many parts as
            it takes to fit. None: nothing is known, and one part is taken.
        change: gives a config with the user's own values, with which a step has to fit.

    Raises ValueError for data that cannot train: too few, or without captions and labels.
    """
    check(facts)
    words = (weights.vocabulary if weights else "") or vocabulary
    provisional = {"steps": 1000, "optimizer.warmup_steps": 100, "data.vocabulary": words}
    config = Config().change(provisional)
    acts: list[Callable[[Config], tuple[Config, str]]] = [
        lambda config: (
            _from_weights(config, machine, weights)
            if weights
            else _from_scratch(config, facts, machine, size, minutes)
        ),
        lambda config: _batch(config, facts, machine, minutes, size, weights),
        lambda config: _texts(config, facts, machine),
        lambda config: _pictures(config, facts, weights),
        lambda config: _data(config, facts, path, splits, name),
        lambda config: _fit_memory(config, machine, bytes_needed, change),
    ]
    why = []
    for act in acts:
        config, line = act(config)
        why.append(line)
    return Choice(config, tuple(line for line in why if line), size.name)


def check(facts: Facts) -> None:
    """Raises ValueError for data that cannot train, with what would help."""
    total = facts.train + facts.test
    without = dict(facts.left_out).get("missing_text", 0)
    if not total and facts.left_out and not without:
        hint = "`coca-jax prepare` lists what is wrong with each one"
        if facts.left_out[0][0] == "outside_input":
            hint = "give --allow_paths=FOLDER (or a URL) to read images from outside the folder"
        raise ValueError(
            f"none of the images can be used ({facts.problems}; the first: {facts.first_problem}). "
            f"{hint[:1].upper()}{hint[1:]}."
        )
    if not kinds(facts) and facts.captions and facts.distinct_captions == 1:
        raise ValueError(
            f"all {facts.captions:,} captions are the same and there are no classes to learn: a "
            "model could learn nothing. Give each image a caption or a label of its own."
        )
    if not kinds(facts) and facts.labels and len(facts.classes) == 1:
        raise ValueError(
            f"all labels are {facts.classes[0]!r}: with one class there is nothing to tell "
            "apart; give pictures of two classes or more, or captions"
        )
    if not kinds(facts) and (facts.captions + facts.labels < total or without):
        fields = f"; its other fields are {', '.join(facts.fields)}" if facts.fields else ""
        raise ValueError(
            f"{facts.captions} of {total + without} pictures have a caption and {facts.labels} a "
            f"label{fields}. Name the field that holds them with --text_field or --label_field, or "
            "put the pictures into one folder a class, or write metadata.jsonl with lines "
            '{"file_name": ..., "text": ...}'
        )
    if total < LEAST:
        found = f" ({facts.problems} left out)" if facts.left_out else ""
        raise ValueError(
            f"pictures with a text that can be used: {total}{found}, too few to learn from and to "
            f"test on; give {LEAST} at the very least, and some thousands for a model from scratch"
        )


def _from_scratch(
    config: Config, facts: Facts, machine: Machine, size: Size, minutes: float
) -> tuple[Config, str]:
    large = size.width >= 512
    model = dict(
        image_size=size.image_size,
        patch_size=size.patch_size,
        embed_dim=size.width,
        dtype=machine.dtype,
        activation="gelu" if large else "relu",
        image=dict(
            width=size.width,
            depth=size.depth,
            mlp_dim=4 * size.width,
            num_heads=size.heads,
            conv_widths=tuple(width for width, _ in size.stem),
            conv_depths=tuple(blocks for _, blocks in size.stem),
        ),
        text=dict(
            width=size.width,
            unimodal_depth=size.unimodal,
            multimodal_depth=size.multimodal,
            mlp_dim=4 * size.width,
            num_heads=size.heads,
            vocab_size=vocabulary_size(facts, size),
        ),
        pooler=dict(num_queries=size.queries, num_heads=size.heads),
    )
    optimizer = dict(
        name="muon",
        learning_rate=1e-3 if large else 1.5e-3,
        schedule="cosine",
        weight_decay=0.1,
        beta2=0.98,
    )
    loss = dict(caption_chunk=2048 if large else 512, captioning_weight=2.0)
    config = config.change(dict(model=model, loss=loss, optimizer=optimizer))
    stem = "a light convolutional stem" if size.stem else "plain patches"
    side = f"{size.image_size} px"
    if minutes >= _GROWING_MINUTES and size.image_size >= 48:
        first = size.patch_size * round(size.image_size / size.patch_size * 2 / 3)
        config = config.change(dict(image_sizes=((0.3, first),)))
        side = f"{first}, later {size.image_size} px"
    return config, (
        f"model: {size.name}, {side}, {stem}, width {size.width}, "
        f"{size.depth} + {size.unimodal} + {size.multimodal} layers, {machine.dtype}, from scratch"
    )


def _from_weights(config: Config, machine: Machine, weights: Weights) -> tuple[Config, str]:
    small = weights.parameters < 30e6
    optimizer = dict(
        name="muon" if small else "adamw",
        learning_rate=5e-4 if small else 1e-5,
        schedule="cosine",
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.98,
    )
    loss: dict[str, Any] = dict(caption_chunk=2048, captioning_weight=2.0)
    if not small:
        loss["reduction"] = "mean"  # as open_clip's weights were trained
    config = config.change(
        dict(
            init_from=weights.path,
            model=weights.model.change(dict(dtype=machine.dtype)),
            data=dict(resize=weights.resize, label_token=weights.label_token),
            loss=loss,
            optimizer=optimizer,
        )
    )
    return config, (
        f"model: that of {weights.name or weights.path}, {weights.parameters / 1e6:.1f}M "
        f"parameters, {image_shape.words(config.model.image_size)} px, {machine.dtype}, fine-tuned "
        f"at a rate of {config.optimizer.learning_rate:g}"
    )


def _batch(
    config: Config,
    facts: Facts,
    machine: Machine,
    minutes: float,
    size: Size,
    weights: Weights | None,
) -> tuple[Config, str]:
    """The largest usual batch that leaves enough steps, and no picture twice in most batches."""
    most = 128 if size.width < 256 else 256 if size.width < 512 else 1024
    pairs = affordable(size, facts, machine, minutes)
    if weights:  # six operations a parameter and token, the parameters seen once a token
        tokens = config.model.num_patches + 32
        pairs = 60 * minutes * step_flops(machine) / (6 * weights.parameters * tokens)
        most = 128
    steps = _USUAL_STEPS / (4 if weights else 1)
    batch = machine.devices  # times a power of two, so that it splits
    while batch < 16 or (2 * batch <= min(most, facts.train / 4) and pairs / (2 * batch) >= steps):
        batch *= 2
    config = config.change({"batch_size": batch, "loss.duplicate_texts": "positives"})
    return config, (
        f"batch: {config.batch_size} pairs, in which every picture finds its text among all of "
        "them; equal texts are all right answers"
    )


def _texts(config: Config, facts: Facts, machine: Machine) -> tuple[Config, str]:
    """How long texts are: whole ones but for the last percent, short ones cheaper."""
    usual, nearly_all, _ = facts.tokens
    known = config.model.text.max_len if config.init_from else 0
    length = min(max(8, 2 * -(-nearly_all // 2)), max(64, known))
    if length > known:  # weights' texts get places behind, which start untrained
        config = config.change({"model.text.max_len": length})
    short = 4 * -(-usual // 4)
    if usual and short <= 0.7 * length and config.batch_size % (4 * machine.devices) == 0:
        config = config.change(dict(text_lengths=(short,), text_parts=4))
    pieces = f"{config.model.text.vocab_size:,} word pieces at most, learned from them"
    if config.init_from:
        pieces = "in the word pieces of the weights"
        if length > known:
            pieces += f", which know {known} places"
    cut = f"; {short} are room for most, which saves time" if config.text_lengths else ""
    return config, f"texts: {pieces}; at most {length} a text{cut}"


def _pictures(config: Config, facts: Facts, weights: Weights | None) -> tuple[Config, str]:
    """How pictures vary in training, so that the model does not learn them by heart."""
    tiny = max(image_shape.pair(config.model.image_size)) <= 32
    cut = weights is not None and weights.resize != "trim"  # which leaves nothing to cut
    mode = "none" if tiny else "crop" if cut and not facts.drawn else "drawing"
    # A mirrored picture is another one where captions say left, or name things in their order,
    # and where the classes are letters or numbers.
    letters = all(len(name) <= 2 or name.isdigit() for name in facts.classes)
    flip = not (facts.captions or letters or facts.drawn or tiny)
    how = {
        "none": "as they are, so small that cutting would lose them",
        "drawing": "turned, scaled, recoloured and drawn as outlines at random",
        "crop": "cut at random",
    }[mode]
    mirrored = ", half of them mirrored" if flip else ", never mirrored"
    config = config.change(dict(data=dict(augment=mode, flip=flip)))
    return config, f"pictures: {how}{mirrored}"


def _data(
    config: Config, facts: Facts, path: str, splits: tuple[str, str], name: str
) -> tuple[Config, str]:
    """What trains and what is scored."""
    found = kinds(facts)
    train, held = splits
    weights = {"caption": 1.0, "label": 1.0}
    if len(found) == 2:
        share = config.batch_size // _LABEL_SHARE
        weights = {"caption": float(config.batch_size - share), "label": float(share)}
    sources = tuple(dict(path=path, split=train, kind=kind, weight=weights[kind]) for kind in found)
    tasks: list[dict[str, Any]] = []
    if held and "caption" in found and facts.test_captions:
        task = dict(name=name, data=dict(path=path, split=held))
        tasks += [
            dict(task, kind="retrieval", limit=2000),
            dict(task, kind="captioning", limit=500),
        ]
    if held and "label" in found and facts.test_labels:
        data = dict(path=path, split=held, kind="label")
        tasks.append(dict(kind="zero_shot", name=name, data=data, prompts="photo", limit=5000))
    config = config.change(
        {
            "data.sources": sources,
            "data.prompts": "photo",
            # Else the decoder learns to write "a photo of the ..." in place of captions.
            "loss.caption_labels": len(found) < 2,
            "eval.tasks": tuple(tasks),
        }
    )
    if len(found) == 2:
        return config, (
            f"trains on captions; one row in {_LABEL_SHARE} has a label as its text ('a photo of "
            f"the {facts.classes[0]}'), for the contrastive loss only"
        )
    if found == ("caption",):
        return config, "trains on captions"
    return config, f"trains on labels as texts ('a photo of the {facts.classes[0]}')"


def _fit_memory(
    config: Config,
    machine: Machine,
    bytes_needed: Callable[[Config], float] | None,
    change: Callable[[Config], Config],
) -> tuple[Config, str]:
    """Splits the batch until a step fits: the contrastive loss stays that of the whole batch.

    Raises ValueError where even the smallest part does not fit, or the user's own parts do not.
    """
    if bytes_needed is None:
        return config, ""
    room = 0.8 * machine.memory
    wanted = change(config)
    need = bytes_needed(wanted)
    while need > room:
        parts = 2 * wanted.accumulate_steps
        refused = (
            f"a step needs {need / 2**30:.1f} GiB even for "
            f"{wanted.batch_size // wanted.accumulate_steps} pictures at a time, and "
            f"{machine.platform} has {machine.memory / 2**30:.1f} GiB free; "
        )
        if wanted.batch_size % (parts * machine.devices * wanted.text_parts):
            raise ValueError(
                f"{refused}start from smaller weights, or take another batch_size or machine"
            )
        config = config.change(dict(accumulate_steps=parts, remat="named"))
        wanted = change(config)
        if wanted.accumulate_steps != parts:
            raise ValueError(
                f"{refused}leave out --config.accumulate_steps, so that it can be {parts} or more"
            )
        need = bytes_needed(wanted)
    line = f"memory: {need / 2**30:.1f} of {machine.memory / 2**30:.1f} GiB"
    parts = wanted.accumulate_steps
    return config, line if parts == 1 else f"{line}, the batch in {parts} parts"


def steps_in(minutes: float, seconds_a_step: float, seconds_before: float) -> int:
    """Steps that so many minutes allow, of which seconds_before go to compiling; at least 10."""
    left = max(60 * minutes - seconds_before, 30 * minutes)
    return max(int(left / seconds_a_step), 10)


def with_steps(
    choice: Choice, facts: Facts, minutes: float, seconds_a_step: float, seconds_before: float
) -> Choice:
    """The recipe with the steps that the time allows.

    Args:
        seconds_a_step: as measured.
        seconds_before: of the time, that go to compiling.
    """
    config = choice.config
    by_time = steps_in(minutes, seconds_a_step, seconds_before)
    by_data = max(math.ceil(PASSES * facts.train / config.batch_size), 10)
    steps = min(by_time, by_data)
    config = config.change(
        {
            "steps": steps,
            "optimizer.warmup_steps": min(100, max(1, steps // 10)),
            "checkpoint.every_steps": max(1, min(1000, int(60 / seconds_a_step))),
            "log.every_steps": max(1, min(50, int(5 / seconds_a_step))),
        }
    )
    passes = config.steps * config.batch_size / max(facts.train, 1)
    line = (
        f"steps: {config.steps:,} of {seconds_a_step:.3g} s as measured, {passes:.3g} passes over "
        f"{facts.train:,} pictures"
    )
    if by_data < by_time:
        minutes_needed = by_data * seconds_a_step / 60
        line += (
            f"; more than {PASSES} only learns them by heart, so it takes "
            f"{minutes_needed:.1f} of the {minutes:g} minutes"
        )
    return Choice(config, (*choice.why, line), choice.size)
