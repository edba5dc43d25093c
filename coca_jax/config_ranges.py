"""What each value of a configuration may be: ranges and units, in one place.

`check` looks at every value by itself, before any work; what several values must agree on is
checked where they meet (run_config.check, models.coca.validate).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from coca_jax.data import augment
from coca_jax.models import heads
from coca_jax.ops import reference


class Rule(NamedTuple):
    """What a value may be: a test, and the words for it that follow 'give'."""

    holds: Callable[[Any], bool]
    words: str


def _is_number(value: Any) -> bool:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, (Mapping, ConfigDict))  # a ConfigDict is no Mapping to Python


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def whole(low: int, high: int, what: str = "", or_else: tuple[int, str] | None = None) -> Rule:
    """A whole number from low to high; or_else: another one, and what it stands for."""
    words = f"a whole number{f' of {what}' if what else ''}, {low:,} to {high:,}"
    if or_else:
        words += f", or {or_else[0]} ({or_else[1]})"
    others = (or_else[0],) if or_else else ()
    return Rule(lambda v: _is_whole(v) and (low <= v <= high or v in others), words)


def number(
    low: float, high: float, what: str = "", above: bool = False, below: bool = False
) -> Rule:
    """A finite number from low to high; above, below: the end itself is not in the range."""
    ends = f"{'above ' if above else 'from '}{low:g} {'to below' if below else 'to'} {high:g}"
    return Rule(
        lambda v: (
            _is_number(v)
            and (low < v if above else low <= v)
            and (v < high if below else v <= high)
        ),
        f"a number {ends}{f', {what}' if what else ''}",
    )


def choice(*values: str) -> Rule:
    """One of some names."""
    return Rule(lambda v: v in values, f"one of {', '.join(map(repr, values))}")


def several(rule: Rule, count: int | None = None) -> Rule:
    """A tuple of values of a kind."""
    return Rule(
        lambda v: _is_sequence(v) and count in (None, len(v)) and all(map(rule.holds, v)),
        f"{'a tuple' if count is None else count}, each {rule.words}",
    )


def _image_sizes(value: Any) -> bool:
    """((share of the steps, size), ...): shares above 0 that leave some for the model's size."""
    if not _is_sequence(value) or not all(_is_sequence(pair) and len(pair) == 2 for pair in value):
        return False
    shares = [share for share, _ in value]
    good = all(_is_number(share) and share > 0 for share in shares) and sum(shares) <= 1
    return good and all(SIZE.holds(size) for _, size in value)


def _sources(value: Any) -> bool:
    """Mappings whose weight and limit, where there are any, are numbers of use."""
    if not _is_sequence(value) or not all(_is_mapping(entry) for entry in value):
        return False
    weights = [entry.get("weight", 1.0) for entry in value]
    limits = [entry.get("limit") or 1 for entry in value]
    return all(_is_number(w) and w > 0 for w in weights) and all(
        _is_whole(limit) and limit > 0 for limit in limits
    )


FLAG = Rule(lambda v: isinstance(v, bool), "True or False")
TEXT = Rule(lambda v: isinstance(v, str), "a text")
LIST = Rule(_is_sequence, "a tuple")
SIZE = whole(1, 16_384, "pixels")
WIDTH = whole(1, 65_536)
HEADS = whole(1, 4096)
DEPTH = whole(1, 1024, "layers")
CHUNK = whole(0, 1 << 31)
STEPS = whole(0, 1_000_000_000, "steps")
INTERVAL = whole(1, 1_000_000_000, "steps")
SHARE = number(0, 1, below=True)
WEIGHT = number(0, 1e38)
RATE = number(0, 1, "of the parameters' own size a step")

RULES: dict[str, Rule] = {
    "seed": whole(0, (1 << 63) - 1),
    "batch_size": whole(1, 1 << 24, "examples"),
    "steps": STEPS,
    "epochs": number(0, 1e6, "passes over the data"),
    "remat": choice("none", "dots", "named", "full"),
    "accumulate_steps": whole(1, 65_536, "micro-batches"),
    "image_sizes": Rule(
        _image_sizes,
        "pairs (share of the steps, size in pixels), such as ((0.3, 128),), whose shares are above "
        "0 and add up to 1 at most",
    ),
    "text_lengths": several(whole(1, 65_536, "tokens")),
    "text_parts": whole(1, 1024),
    "init_from": TEXT,
    "model.image_size": SIZE,
    "model.patch_size": SIZE,
    "model.embed_dim": WIDTH,
    "model.dtype": choice("float32", "bfloat16", "float64"),
    "model.image_mean": several(number(-10, 10), 3),
    "model.image_std": several(number(0, 10, above=True), 3),
    "model.temperature": number(0, 100, "as 0.07", above=True),
    "model.implementation": choice("auto", "xla", "reference"),
    "model.qk_norm": FLAG,
    "model.activation": choice(*reference.ACTIVATIONS),
    "model.image.width": WIDTH,
    "model.image.depth": DEPTH,
    "model.image.mlp_dim": whole(1, 1 << 20),
    "model.image.num_heads": HEADS,
    "model.image.patch_dropout": SHARE,
    "model.image.conv_widths": several(WIDTH),
    "model.image.conv_depths": several(whole(0, 1024, "blocks")),
    "model.image.class_token": FLAG,
    "model.image.pre_norm": FLAG,
    "model.image.final_norm": FLAG,
    "model.image.patch_bias": FLAG,
    "model.text.width": WIDTH,
    "model.text.unimodal_depth": DEPTH,
    "model.text.multimodal_depth": DEPTH,
    "model.text.mlp_dim": whole(1, 1 << 20),
    "model.text.num_heads": HEADS,
    "model.text.vocab_size": whole(1, 1 << 24, "tokens"),
    "model.text.max_len": whole(3, 65_536, "tokens"),
    "model.text.tie_embeddings": FLAG,
    "model.text.head_bias": FLAG,
    "model.text.cls_mask": choice("exact", "shifted"),
    "model.text.cross": choice("paper", "open_clip"),
    "model.text.multimodal_heads": HEADS,
    "model.text.multimodal_mlp_dim": whole(1, 1 << 20),
    "model.pooler.kind": choice("cascade", "parallel", "open_clip"),
    "model.pooler.num_queries": WIDTH,
    "model.pooler.num_heads": HEADS,
    "model.pooler.query_std": number(0, 100),
    "model.pooler.project": FLAG,
    "head.kind": choice("", *heads.KINDS),
    "head.num_queries": WIDTH,
    "head.width": whole(0, 65_536),
    "head.num_heads": whole(0, 4096),
    "head.classes": TEXT,
    "head.unknown": choice("refuse", "skip"),
    "head.weight": WEIGHT,
    "head.label_smoothing": SHARE,
    "loss.contrastive_weight": WEIGHT,
    "loss.captioning_weight": WEIGHT,
    "loss.contrastive": choice("softmax", "sigmoid"),
    "loss.reduction": choice("sum", "mean"),
    "loss.contrastive_chunk": CHUNK,
    "loss.caption_chunk": CHUNK,
    "loss.z_loss": number(0, 1),
    "loss.label_smoothing": SHARE,
    "loss.duplicate_texts": choice("negatives", "ignore", "positives"),
    "optimizer.name": choice("adafactor", "adamw", "muon"),
    "optimizer.learning_rate": RATE,
    "optimizer.encoder_learning_rate": Rule(
        lambda v: _is_number(v) and (v == -1 or 0 <= v <= 1), f"{RATE.words}, or -1 (the same)"
    ),
    "optimizer.layer_decay": number(0, 1, "1 being none", above=True),
    "optimizer.warmup_steps": STEPS,
    "optimizer.schedule": choice("linear", "cosine", "constant"),
    "optimizer.weight_decay": number(0, 10),
    "optimizer.beta1": SHARE,
    "optimizer.beta2": SHARE,
    "optimizer.clip_norm": number(0, 1e6, "0 being no clipping"),
    "optimizer.ema": SHARE,
    "mesh.data": whole(1, 1 << 20, "devices", (-1, "those that are left")),
    "mesh.fsdp": whole(1, 1 << 20, "devices", (-1, "those that are left")),
    "mesh.tensor": whole(1, 1 << 20, "devices", (-1, "those that are left")),
    "data.sources": Rule(
        _sources,
        "dicts, such as ({'path': 'data/mine', 'weight': 1.0},), weights and limits above 0",
    ),
    "data.vocabulary": TEXT,
    "data.label_token": FLAG,
    "data.prompts": TEXT,
    "data.augment": choice(*augment.MODES),
    "data.randaugment": Rule(
        lambda v: _is_sequence(v) and len(v) == 2 and _is_whole(v[0]) and 1 <= v[0] <= 16
        and _is_number(v[1]) and 0 <= v[1] <= 30,
        "(operations 1 to 16, magnitude 0 to 30), such as (2, 10)",
    ),
    "data.flip": FLAG,
    "data.resize": choice("squash", "crop"),
    "data.fast_resize": FLAG,
    "data.num_frames": whole(0, 4096, "frames"),
    "data.frame_jitter": FLAG,
    "data.max_bad_fraction": number(0, 1),
    "data.num_threads": whole(0, 4096, "threads"),
    "data.loader": choice("direct", "seqio"),
    "checkpoint.every_steps": INTERVAL,
    "checkpoint.keep": whole(1, 1_000_000, "checkpoints"),
    "checkpoint.max_skipped": whole(0, 1_000_000_000, "steps, 0 being no limit"),
    "eval.every_steps": STEPS,
    "eval.tasks": LIST,
    "log.every_steps": INTERVAL,
    "log.profile_steps": Rule(
        lambda v: _is_sequence(v) and len(v) in (0, 2) and all(map(STEPS.holds, v)),
        "(first step, last step), or () for no profile",
    ),
}  # fmt: skip


def check(config: Mapping[str, Any], name: str = "config", part: str = "") -> None:
    """Looks at every value that has a rule.

    Args:
        config: a configuration, or a part of one.
        name: what messages call it.
        part: where that part is in a configuration, as 'model'; '' for a whole one.

    Raises:
        ValueError: naming the first value that cannot be, and what can.
    """
    for key, value in config.items():
        path = f"{part}.{key}" if part else key
        if _is_mapping(value):
            check(value, f"{name}.{key}", path)
        elif path in RULES and not RULES[path].holds(value):
            shown = repr(value)
            shown = shown if len(shown) <= 200 else shown[:197] + "..."
            raise ValueError(f"{name}.{key}={shown}: give {RULES[path].words}")
