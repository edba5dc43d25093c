"""What some data are: how many pictures, captions and labels, how large, how long, how often.

One pass over the data, reading every picture's bytes and header and decoding a few of them.
"""

from __future__ import annotations

import collections
import dataclasses
import heapq
import math
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coca_jax import inference
from coca_jax.checkpoints import manager
from coca_jax.config import Config, Model, StoredConfig, shapes
from coca_jax.data import dedup, images, quarantine
from coca_jax.data.sources.items import Item
from coca_jax.inference import export_folder
from coca_jax.interop import export_format, hub, weights_files
from coca_jax.models import coca
from coca_jax.ops.cpu_kernels import build
from coca_jax.runtime import device_memory, machine, progress, storage

_DECODED = 96  # pictures whose pixels are looked at
_TEXTS = 200_000  # captions that are kept to measure
# Least share of equal neighbors before the background of a drawing. Medians: Twitter's emoji 0.53,
# Google's 0.29, screenshots 0.29; photographs on white 0.10, Fashion-MNIST 0.04.
_FLAT = 0.1


@dataclasses.dataclass(frozen=True)
class Facts:
    """What is known of some data before anything is chosen for them.

    Attributes:
        train, test: examples to train on, and held out.
        captions, labels: how many of `train` have a caption, a label.
        test_captions, test_labels: how many of `test`.
        distinct_captions: of all, each counted once.
        words: of a caption, (median, 95%, most).
        distinct_words: of all captions and labels.
        characters: distinct ones in them.
        classes: names, by number of examples.
        largest_class: its share of the labelled examples.
        width, height: medians, in pixels; 0 where no picture could be read.
        aspect: of the long side to the short one, median and 95%.
        drawn: whether the pictures are drawings, icons or screens more than photographs.
        repeated: pictures whose bytes occur before.
        left_out: reason -> number of examples that cannot be used.
        first_problem: details of the first example with the most common reason.
        fields: names of other fields of the data.
        tokens: of a text as trained on with begin and end, (75%, 99%, most); (0, 0, 0): not known.
    """

    train: int
    test: int = 0
    captions: int = 0
    labels: int = 0
    test_captions: int = 0
    test_labels: int = 0
    distinct_captions: int = 0
    words: tuple[int, int, int] = (0, 0, 0)
    distinct_words: int = 0
    characters: int = 0
    classes: tuple[str, ...] = ()
    largest_class: float = 0.0
    width: int = 0
    height: int = 0
    aspect: tuple[float, float] = (1.0, 1.0)
    drawn: bool = False
    repeated: int = 0
    left_out: tuple[tuple[str, int], ...] = ()
    first_problem: str = ""
    fields: tuple[str, ...] = ()
    tokens: tuple[int, int, int] = (0, 0, 0)

    @property
    def problems(self) -> str:
        """`left_out` in words: '3 unreadable_image, 1 missing_text'."""
        return ", ".join(f"{count} {reason}" for reason, count in self.left_out)


class Scan:
    """Goes through the items of some data once.

    Attributes: facts (all examples count as `train`), and places, float64 [n], where the bytes of
    each usable picture put it for a holdout (`checks.place`).
    """

    def __init__(self, items: Iterable[Item], *, show: str = "", total: int | None = None):
        self._texts: list[str] = []
        self._sizes: list[tuple[int, int]] = []
        self._classes: collections.Counter[str] = collections.Counter()
        self._problems: collections.Counter[str] = collections.Counter()
        self._first: dict[str, str] = {}  # of each problem: what it says of its first example
        self._fields: collections.Counter[str] = collections.Counter()
        self._seen: set[bytes] = set()
        self._sample: list[tuple[float, bytes]] = []  # a heap of those with the lowest place
        self._captions = self._labels = self._repeated = 0
        places: list[float] = []
        with progress.Bar(total, "pictures", show, shown=bool(show)) as bar:
            for item in items:
                if self._add(item):
                    places.append(quarantine.place(item.image, item.drawn.holdouts))
                bar.update()
        self.places = np.asarray(places)
        self.facts = self._facts()

    def _add(self, item: Item) -> bool:
        """Counts an item; False for one that cannot be used."""
        self._fields.update(item.extra.keys())
        problem = item.problem or ("" if item.image else "empty_image")
        if not problem:
            try:
                self._sizes.append(images.open_image(item.image).size)
            except ValueError:
                problem = "unreadable_image"
        if not problem and not item.texts and not item.labels:
            problem = "missing_text"
        if problem:
            self._problems[problem] += 1
            self._first.setdefault(problem, item.detail)
            return False
        self._captions += bool(item.texts)
        self._labels += bool(item.labels)
        self._classes.update(item.labels)
        if len(self._texts) < _TEXTS:
            self._texts.extend(item.texts)
        digest = dedup.content_hash(item.image)
        self._repeated += digest in self._seen
        self._seen.add(digest)
        entry = (-quarantine.place(item.image), item.image)
        if len(self._sample) < _DECODED:
            heapq.heappush(self._sample, entry)
        else:
            heapq.heappushpop(self._sample, entry)
        return True

    def _facts(self) -> Facts:
        sides = np.asarray(self._sizes or [(0, 0)], np.float64)
        aspect = sides.max(1) / np.maximum(sides.min(1), 1)
        words = [len(text.split()) for text in self._texts] or [0]
        names = [name for name, _ in self._classes.most_common()]
        known = collections.Counter(
            word for text in (*self._texts, *names) for word in text.lower().split()
        )
        return Facts(
            train=len(self._sizes) - self._problems["missing_text"],
            captions=self._captions,
            labels=self._labels,
            distinct_captions=len(set(self._texts)),
            words=tuple(int(x) for x in np.quantile(words, (0.5, 0.95, 1.0))),  # type: ignore
            distinct_words=len(known),
            characters=len(set().union(*known) if known else ()),
            classes=tuple(names),
            largest_class=max(self._classes.values(), default=0) / max(self._labels, 1),
            width=int(np.median(sides[:, 0])),
            height=int(np.median(sides[:, 1])),
            aspect=(float(np.median(aspect)), float(np.quantile(aspect, 0.95))),
            drawn=drawn([data for _, data in self._sample]),
            repeated=self._repeated,
            left_out=tuple(self._problems.most_common()),
            first_problem=self._first[max(self._problems, key=self._problems.__getitem__)]
            if self._problems
            else "",
            fields=tuple(name for name, _ in self._fields.most_common(12)),
        )


def drawn(pictures: Sequence[bytes]) -> bool:
    """Whether most pictures are drawn: transparent, or flat with a plain background.

    A background of exactly one color on a quarter of the image was filled. What lies before it
    tells drawings from photographs of objects on white, which have noise and shades everywhere.
    """
    votes = []
    for data in pictures:
        try:
            pixels = images.decode_rgba(data)
        except ValueError:
            continue
        if pixels.shape[-1] == 4 and (pixels[..., 3] < 128).mean() > 0.05:
            votes.append(True)
            continue
        colors = pixels[..., :3].astype(np.uint32)
        codes = (colors[..., 0] << 16) | (colors[..., 1] << 8) | colors[..., 2]  # [H, W]
        values, counts = np.unique(codes[::2, ::2], return_counts=True)
        filled = counts.max() > 0.25 * counts.sum()
        front = codes != values[counts.argmax()]
        pairs = front[:, 1:] & front[:, :-1]  # neighbors that both lie before the background
        equal = (codes[:, 1:] == codes[:, :-1]) & pairs
        votes.append(bool(filled and equal.sum() >= _FLAT * pairs.sum()))
    return bool(votes) and float(np.mean(votes)) > 0.5


def with_counts(facts: Facts, train: dict[str, Any], test: dict[str, Any]) -> Facts:
    """The facts with what an import wrote: entries of a manifest's splits."""
    out = collections.Counter(train["quarantined"]) + collections.Counter(test["quarantined"])
    return dataclasses.replace(
        facts,
        train=train["count"],
        captions=train["with_text"],
        labels=train["with_label"],
        test=test["count"],
        test_captions=test["with_text"],
        test_labels=test["with_label"],
        left_out=tuple(out.most_common()),
    )


def holdout(places: np.ndarray) -> float:
    """The share of the range of places to hold out of a data set whose pictures have these.

    A tenth of the distinct pictures, up to 1,000; a twentieth of those beyond 20,000, up to 5,000;
    8 at least. Equal pictures have one place, so all of them go. Raises ValueError for one picture
    alone, however often.
    """
    distinct = np.unique(places)
    if len(distinct) < 2:
        raise ValueError(
            f"all {len(places):,} pictures are the same one: there is nothing to tell apart and "
            "nothing to hold out; give different pictures"
        )
    count = min(max(8, len(distinct) // 10), 1000)
    count = min(max(count, len(distinct) // 20), 5000)
    count = min(count, len(distinct) - 1)
    return float((distinct[count - 1] + distinct[count]) / 2)


# What this machine is: its devices, their memory, and how fast they multiply.


@dataclasses.dataclass(frozen=True)
class Machine:
    """Attributes:
    platform: 'cpu', 'gpu' or 'tpu'.
    devices: how many of them.
    memory: bytes that a step may take on one of them.
    flops: floating-point operations a second of XLA's matrix products, over all of them.
    cores: processors that this process may use.
    dtype: in which models train fastest here, 'float32' or 'bfloat16'.
    """

    platform: str
    devices: int
    memory: float
    flops: float
    cores: int
    dtype: str


def look() -> Machine:
    """This machine, measured for about half a second."""
    devices = jax.local_devices()
    alone = devices[0].platform == "cpu"  # one of them has all cores
    dtype = "bfloat16" if multiplies_bfloat16(devices[0]) else "float32"
    return Machine(
        platform=devices[0].platform,
        devices=len(devices),
        memory=float(device_memory.available()),
        flops=matrix_flops(dtype) * (1 if alone else len(devices)),
        cores=machine.count(),
        dtype=dtype,
    )


def multiplies_bfloat16(device: Any) -> bool:
    """Whether a device has products in bfloat16: TPUs, NVIDIA's GPUs from Ampere on (compute
    capability 8.0), AMD's, and of CPUs those that say so."""
    if device.platform == "cpu":
        return build.multiplies_bfloat16()
    known = re.match(r"(\d+)\.\d", str(getattr(device, "compute_capability", "")))
    return not known or int(known[1]) >= 8


def matrix_flops(dtype: str, seconds: float = 0.4) -> float:
    """Operations a second of XLA's products of matrices on one device: 1,024 x 1,024 in float32 on
    a CPU, 8,192 x 8,192 in `dtype` elsewhere."""
    on_cpu = jax.local_devices()[0].platform == "cpu"
    side = 1024 if on_cpu else 8192
    x = jnp.ones((side, side), jnp.float32 if on_cpu else dtype)
    product = jax.jit(lambda a: a @ a)
    product(x).block_until_ready()
    count, start = 0, time.perf_counter()
    while (taken := time.perf_counter() - start) < seconds:
        product(x).block_until_ready()
        count += 1
    return 2 * side**3 * count / taken


# Sizes of models that `fit` chooses from, what each is worth and what it costs.


EFFICIENCY = 0.3  # of the machine's matrix products, that a train step of a small model reaches
# On CPUs those are of float32. In bfloat16, where a processor multiplies it, a step was 1.6 (AMD
# Zen 4) to 1.9 times (Intel with AMX) as fast; XLA's product of two matrices alone was not.
HALVES = 1.5


@dataclasses.dataclass(frozen=True)
class Size:
    """A size of model, and what it takes to be worth its cost.

    Attributes:
        name: for people.
        image_size, patch_size: in pixels.
        stem: channels and residual blocks of the convolutional stem's stages; (): plain patches.
        width, depth, unimodal, multimodal, heads, queries: as in config.model, for both towers.
        pieces: of the vocabulary at most.
        pictures, pairs: to train on, and seen in all, from which on this size is chosen.
    """

    name: str
    image_size: int
    patch_size: int
    stem: tuple[tuple[int, int], ...]
    width: int
    depth: int
    unimodal: int
    multimodal: int
    heads: int
    queries: int
    pieces: int
    pictures: int = 0
    pairs: int = 0


_STEM = ((32, 0), (64, 1), (128, 0))
SIZES = (
    Size("tiny pictures", 28, 4, ((32, 0), (64, 1)), 96, 1, 1, 1, 3, 8, 2048),
    Size("small", 48, 8, _STEM, 160, 1, 2, 1, 4, 16, 4096),
    Size("medium", 96, 16, (*_STEM, (256, 0)), 256, 2, 3, 2, 4, 32, 8192, 5_000, 400_000),
    Size("large", 160, 16, (*_STEM, (256, 1)), 512, 6, 4, 4, 8, 64, 16_384, 100_000, 3_000_000),
    Size("base", 224, 16, (), 768, 12, 6, 6, 12, 256, 32_768, 1_000_000, 20_000_000),
)


def sizes_for(facts: Facts, machine: Machine, minutes: float) -> list[Size]:
    """The sizes that suit the pictures, and of which the machine sees enough pairs in the time;
    the largest first, never empty."""
    side = min(facts.width, facts.height) or 224
    if side <= 32:
        fitted = 4 * max(4, -(-side // 4))
        return [dataclasses.replace(SIZES[0], image_size=fitted)]
    found = [SIZES[1]]
    for size in SIZES[2:]:
        enough = facts.train >= size.pictures and side >= size.image_size // 2
        if enough and affordable(size, facts, machine, minutes) >= size.pairs:
            found.append(size)
    return found[::-1]


def affordable(size: Size, facts: Facts, machine: Machine, minutes: float) -> float:
    """About how many pairs the machine sees in the time, by arithmetic alone."""
    length = facts.tokens[1] or 16
    return 60 * minutes * step_flops(machine) / flops_a_pair(size, length)


def step_flops(machine: Machine) -> float:
    """Operations a second that a train step reaches, about."""
    halves = machine.platform == "cpu" and machine.dtype == "bfloat16"
    return machine.flops * EFFICIENCY * (HALVES if halves else 1)


def flops_a_pair(size: Size, length: int) -> float:
    """Operations of a train step for one picture and one text of `length` tokens: twice the
    multiplications of the forward pass, and again twice that for the gradient."""
    side, channels, total = size.image_size, 3, 0.0
    for width, blocks in size.stem:
        side //= 2
        total += side**2 * 9 * (channels * width + 2 * blocks * width**2)
        channels = width
    tokens, width = (size.image_size // size.patch_size) ** 2, size.width
    if not size.stem:
        total += tokens * size.patch_size**2 * 3 * width
    total += size.depth * tokens * (12 * width**2 + 2 * tokens * width)
    total += (size.unimodal * 12 + size.multimodal * 14) * length * width**2
    total += (size.multimodal + 1) * 2 * size.queries * width**2
    total += length * size.pieces * width
    return 3 * 2 * total


def vocabulary_size(facts: Facts, size: Size) -> int:
    """Ids of a byte-pair vocabulary for the texts: a piece for most of the words that occur.

    256 bytes, the symbols, twice the characters and one and a half times the words; the trainer
    stops by itself where nothing is left to join.
    """
    wanted = 300 + 2 * facts.characters + int(1.5 * facts.distinct_words)
    return max(320, min(-(-wanted // 32) * 32, size.pieces))


# From facts to a recipe: a pure function of what the data, the machine and the time are.
#
# A light convolutional stem, Muon, equal texts as positives, captions twice the weight and a
# byte-pair vocabulary were chosen because they learned most in equal minutes on the emoji drawings.
# Sizes above 'small' follow from arithmetic and were not trained. docs/own_data.md has what was seen.


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


def training_facts(facts: Facts) -> Facts:
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
    check_facts(facts)
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


def check_facts(facts: Facts) -> None:
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
        f"parameters, {shapes.words(config.model.image_size)} px, {machine.dtype}, fine-tuned "
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
    tiny = max(shapes.pair(config.model.image_size)) <= 32
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


# Weights to start from: found by a path or a name, and what a choice needs to know of them.


def check_weights(path: str) -> None:
    """Raises ValueError or FileNotFoundError for weights that `read` would refuse, as far as that
    is known without downloading or converting them."""
    if hub.is_name(path):
        hub.resolve(path)  # refuses an unknown tag
        if not path.startswith((hub.PREFIX, "coca_")):
            raise _no_decoder(path)
    elif not storage.reach(storage.place(storage.from_home(path))):
        raise FileNotFoundError(
            f"--init_from={path}: does not exist. Give a run, an export, a file of open_clip's "
            "weights, hf-hub:OWNER/NAME or a model name such as "
            "coca_ViT-B-32:laion2b_s13b_b90k."
        )
    elif _is_ours(path):
        _check_model(_config(path), path)


def read(path: str, into: str, say: Callable[[str], None] = print) -> Weights:
    """What `path` holds: a run, an export, or anything else that `coca_jax.load` takes. The last
    (open_clip's weights, and everything that is not in a local folder) is written to the folder
    `into` as an export, from which training can start.

    Raises as `check` and `coca_jax.load` do.
    """
    check_weights(path)
    place = hub.local(storage.from_home(path))
    if not _is_ours(place):
        say(f"--init_from={path}: converting it into {into}")
        model = inference.load(place, narrow=False)
        _check_model(model.config, path)
        export_folder.write(model, into)
        place = into
    config = _config(place)
    _check_model(config, path)
    if export_format.is_export(place):
        words = export_format.vocabulary_path(place)
    else:
        words = str(manager.find_step(place)[0].parent / "vocabulary.model")
    shapes = jax.eval_shape(lambda: coca.init(coca.build(config.model), jax.random.key(0)))
    return Weights(
        path=os.path.abspath(place),
        name=path,
        model=config.model,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(shapes)),
        resize=config.data.resize,
        label_token=config.data.label_token,
        vocabulary=str(pathlib.Path(words).absolute()),
    )


def _is_ours(path: str) -> bool:
    """Whether it is a local folder of a run or an export, from which training starts as it is."""
    if not os.path.isdir(path):
        return False
    foreign = any(os.path.exists(os.path.join(path, name)) for name in weights_files.FOREIGN)
    return export_format.is_export(path) or not foreign


def _config(path: str) -> StoredConfig:
    if export_format.is_export(path):
        return export_format.read_config(path)
    export_format.refuse_half(path)
    weights_files.refuse_shards(path)
    return manager.load_config(path)


def _check_model(config: Config, path: str) -> None:
    if config.model.family != "coca":
        raise _no_decoder(path)
    if config.data.resize == "native":
        raise ValueError(
            f"--init_from={path}: its images keep their aspect ratio, which fit does not support. "
            "Train with coca-jax train --config.init_from, or give weights of square images."
        )


def _no_decoder(path: str) -> ValueError:
    return ValueError(
        f"--init_from={path}: this model has an image and a text tower but no decoder. Such models "
        "can be loaded to encode, search and classify, but not fine-tuned yet. Give a CoCa model, "
        "such as coca_ViT-B-32:laion2b_s13b_b90k."
    )
