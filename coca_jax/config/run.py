"""A run's configuration: `Config`, and the sections of its training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from coca_jax.config.data import Data
from coca_jax.config.fields import (  # fmt: skip
    DEVICES,
    EXAMPLES,
    FLAG,
    INTERVAL,
    MAPPINGS,
    RAMP,
    RATE,
    SEED,
    SHARE,
    SPAN,
    STAGES,
    STEPS,
    TEXT,
    TEXTS,
    WEIGHT,
    Rule,
    Section,
    choice,
    is_number,
    key,
    number,
    several,
    whole,
)
from coca_jax.config.model import Head, Model
from coca_jax.config.shapes import Size


@dataclasses.dataclass(frozen=True)
class Loss(Section):
    """The losses and how they are computed."""

    contrastive_weight: float = key(1.0, WEIGHT, "of the contrastive loss in the sum")
    captioning_weight: float = key(2.0, WEIGHT, "of the captioning loss in the sum")
    caption_labels: bool = key(
        True,
        FLAG,
        "Compute the captioning loss on rows of label sources, too, as in the paper. False trains "
        "the decoder on captions only; label rows still have the contrastive loss.",
    )
    bag_weight: float = key(
        0.0, WEIGHT, "of the loss of a text's tokens in any order, from the image encoder alone"
    )
    hidden_weight: float = key(
        0.0, WEIGHT, "of the loss of hidden patches' tokens, as the averaged model (ema) sees them"
    )
    hidden_share: float = key(
        0.5, number(0, 1, above=True, below=True), "of the patches that are hidden for it"
    )
    affinity_weight: float = key(
        0.0,
        WEIGHT,
        "of a teacher's similarities, by embeddings that `recaption` wrote into the data",
    )
    imitation_weight: float = key(
        0.0, WEIGHT, "of those embeddings themselves; needs a model.embed_dim of their width"
    )
    teacher_width: int = key(
        0, whole(0, 65_536, "numbers"), "width of those embeddings, where one of both is set"
    )
    teacher_scale: float = key(
        100.0, number(0, 1000, above=True), "factor on the teacher's cosines before its softmax"
    )
    contrastive: str = key(
        "softmax",
        choice("softmax", "sigmoid", "global"),
        "its form; 'global': softmax against all examples, by means kept of each (SogCLR)",
    )
    min_temperature: float = key(
        0.0,
        number(0, 100, "0 being no bound"),
        "the temperature of the similarities is learned, but falls no lower; 0: no bound",
    )
    global_rate: float = key(
        0.6, number(0, 1, above=True), "of 'global': the share of a batch in an example's mean"
    )
    global_examples: int = key(
        0, whole(0, (1 << 31) - 1, "examples"), "of 'global': how many; 0: those of the data"
    )
    reduction: str = key("sum", choice("sum", "mean"), "of the two directions: sum (paper, Eq. 2)")
    contrastive_chunk: int = key(
        0, whole(0, 1 << 31, "columns"), "columns per tile of the similarity matrix; 0: one tile"
    )
    caption_chunk: int = key(
        0, whole(0, 1 << 31, "tokens"), "tokens per chunk of the softmax layer; 0: all at once"
    )
    z_loss: float = key(0.0, number(0, 1), "weight of log-sum-exp squared in the captioning loss")
    label_smoothing: float = key(0.0, SHARE, "of the captioning loss")
    duplicate_texts: str = key(
        "negatives",
        choice("negatives", "ignore", "positives"),
        "what equal texts of a batch are to each other: negatives in the paper",
    )


@dataclasses.dataclass(frozen=True)
class Optimizer(Section):
    """The update rule and its rates."""

    name: str = key("adafactor", choice("adafactor", "adamw", "muon"), "the update rule")
    learning_rate: float = key(8e-4, RATE, "with a head: that of the head")
    encoder_learning_rate: float = key(
        -1.0,
        Rule(
            lambda v: is_number(v) and (v == -1 or 0 <= v <= 1), f"{RATE.words}, or -1 (the same)"
        ),
        "of all but the head; 0: frozen, -1: as learning_rate",
    )
    image_learning_rate: float = key(
        -1.0,
        Rule(
            lambda v: is_number(v) and (v == -1 or 0 <= v <= 1), f"{RATE.words}, or -1 (the same)"
        ),
        "of the image encoder, without a head; 0: frozen, -1: as learning_rate",
    )
    projection_rate: float = key(
        1.0,
        number(0, 1),
        "share of the rate that the two projections into the joint space have; 0: they stay",
    )
    layer_decay: float = key(
        1.0,
        number(0, 1, "1 being none", above=True),
        "factor on the rate for each layer below the top",
    )
    warmup_steps: int = key(0, STEPS, "over which the rate rises from 0")
    schedule: str = key(
        "linear",
        choice("linear", "cosine", "constant", "wsd"),
        "after warm-up; 'wsd': constant, then down; all but 'constant' end at 0",
    )
    decay_share: float = key(
        0.2, number(0, 1, "of the steps", above=True), "last part of 'wsd', in which the rate falls"
    )
    weight_decay: float = key(0.01, number(0, 10), "decoupled, on matrices only")
    beta1: float = key(0.9, SHARE, "decay of the mean of gradients; kernels under Muon have 0.95")
    beta2: float = key(0.999, SHARE, "decay of the mean of their squares")
    clip_norm: float = key(
        1.0, number(0, 1e6, "0 being no clipping"), "global gradient norm; 0: no clipping"
    )
    ema: float = key(
        0.0,
        SHARE,
        "decay of the averaged parameters used in evaluation, at step s at most (1 + s) / "
        "(10 + s); 0: none",
    )
    average_share: float = key(
        0.0, SHARE, "last part of the steps whose parameters' mean is used in place of ema; 0: none"
    )
    l2_to_start: float = key(
        0.0, number(0, 10), "decoupled decay towards where the run started, not towards 0"
    )
    keep_embeddings: bool = key(
        False, FLAG, "trains only what captions alone depend on: retrieval stays bit for bit"
    )
    lora_rank: int = key(
        0,
        whole(0, 4096, "columns"),
        "trains changes of kernels of this rank alone, with adamw; 0: all as it is",
    )
    lora: str = key(
        "qv", choice("qv", "all"), "which: queries' and values', or all of attention and MLPs"
    )
    lora_alpha: float = key(
        16.0, number(0, 1e4, "as 16", above=True), "a change's factor x lora_rank"
    )


@dataclasses.dataclass(frozen=True)
class Mesh(Section):
    """The devices along each axis."""

    data: int = key(-1, DEVICES, "parts of the batch, each with all parameters")
    fsdp: int = key(1, DEVICES, "parts of the batch, with the parameters shared out between them")
    tensor: int = key(1, DEVICES, "parts of each layer")


@dataclasses.dataclass(frozen=True)
class Checkpoint(Section):
    """When the run saves."""

    every: str = key(
        "steps",
        choice("steps", "auto")._replace(words="'steps', and how many in every_steps, or 'auto'"),
        "auto: as often as the time of a save and mean_hours_between_failures say (Daly 2006)",
    )
    every_steps: int = key(1000, INTERVAL, "between saves, for every='steps'")
    mean_hours_between_failures: float = key(
        24.0, number(0, 1e6, "hours", above=True), "of the whole run, for every='auto'"
    )
    keep: int = key(3, whole(1, 1_000_000, "checkpoints"), "the newest ones")
    best: str = key(
        "",
        TEXT,
        "a score, as retrieval/NAME/mean_recall: the step where it was best stays besides",
    )
    max_skipped: int = key(
        50,
        whole(0, 1_000_000_000, "steps, 0 being no limit"),
        "steps in a row without finite gradients that end the run; 0: none",
    )


@dataclasses.dataclass(frozen=True)
class Faults(Section):
    """What a run does about hangs, bad numbers and devices that compute wrongly."""

    hang_minutes: float = key(
        20.0,
        number(0, 1e6, "minutes, 0 being no bound"),
        "without a step before a run is ended to start again; 0: never",
    )
    spike_deviations: float = key(
        0.0,
        number(0, 1000, "standard deviations, 0 being off"),
        "above its running mean, three steps in a row, the loss has spiked: the run goes back",
    )
    spike_batches: int = key(
        64, whole(1, 1_000_000, "batches"), "up to a spike, which are then left out"
    )
    compare_every_steps: int = key(
        0,
        whole(0, 1_000_000_000, "steps, 0 being never"),
        "and before each save: checksums of what several devices hold alike",
    )


# Kinds of tasks, and the score of each, that `eval.guard` watches.
GUARDED = dict(retrieval="mean_recall", zero_shot="top1")


@dataclasses.dataclass(frozen=True)
class Eval(Section):
    """What a run evaluates."""

    every_steps: int = key(0, STEPS, "0: at the end alone")
    guard: str = key(
        "",
        choice("", "warn", "stop"),
        "whether retrieval and zero-shot of `tasks` are compared with those before the first step",
    )
    most_lost: float = key(0.1, SHARE, "share of such a score that may go before the guard speaks")
    tasks: tuple[Mapping[str, Any], ...] = key(
        (), MAPPINGS, "dicts of kind, name, data and what the kind takes; also run at the end"
    )


@dataclasses.dataclass(frozen=True)
class Log(Section):
    """What a run writes about itself."""

    every_steps: int = key(10, INTERVAL, "between logged steps")
    profile_steps: tuple[int, ...] = key((), SPAN, "first and last step of a profile")
    trackers: tuple[str, ...] = key(
        ("tensorboard",),
        several(choice("tensorboard", "wandb", "trackio")),
        "where metrics go besides metrics.jsonl; each is an extra",
    )


@dataclasses.dataclass(frozen=True)
class Config(Section):
    """Every key of a run, with its default."""

    seed: int = key(0, SEED, "of the parameters and the order of the data")
    batch_size: int = key(256, EXAMPLES, "pairs a step, over all devices and processes")
    batch_sizes: tuple[tuple[float, int], ...] = key(
        (), RAMP, "((share of the steps, batch size), ...) before batch_size"
    )
    steps: int = key(0, STEPS, "of the optimizer; 0: use epochs")
    stage_steps: int = key(
        0,
        STEPS,
        "length that the shares in batch_sizes and image_sizes refer to; 0: all steps. A run that "
        "is trained longer keeps the length that it started with",
    )
    epochs: float = key(
        0.0,
        number(0, 1e6, "passes over the data"),
        "passes over the data (the sum of all sources); 0: use steps",
    )
    remat: str = key(
        "auto",
        choice("auto", "none", "dots", "named", "full"),
        "what the backward pass recomputes; 'auto': 'named' on a CPU, 'none' elsewhere",
    )
    accumulate_steps: int = key(
        1, whole(1, 65_536, "micro-batches"), "per step; the contrastive loss stays exact"
    )
    image_sizes: tuple[tuple[float, Size], ...] = key(
        (), STAGES, "((share of the steps, image size), ...) before the model's own size"
    )
    text_lengths: tuple[int, ...] = key(
        (),
        several(whole(3, 65_536, "tokens")),
        "captions of a batch are cut to the smallest of these that fits ...",
    )
    text_parts: int = key(
        1,
        whole(1, 1024, "parts"),
        "... and with n > 1 the longest n-th of them runs apart from the others",
    )
    init_from: str = key("", TEXT, "a run, checkpoint or converted weights to start from")
    init_parts: str = key(
        "all",
        choice("all", "image"),
        "what of those weights is taken; 'image': the image encoder alone, of any family",
    )
    init_positions: str = key(
        "extend",
        choice("extend", "interpolate"),
        "of texts longer than those weights know: new rows behind, or those that are there, spread",
    )
    model: Model = Model()
    head: Head = Head()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    mesh: Mesh = Mesh()
    data: Data = Data()
    checkpoint: Checkpoint = Checkpoint()
    faults: Faults = Faults()
    eval: Eval = Eval()
    log: Log = Log()


@dataclasses.dataclass(frozen=True)
class StoredConfig(Config):
    """A configuration as it stands beside weights, with what their run found out.

    Beside an export only `model`, the head, and of `data` `resize`, `num_frames` and `label_token`
    are known; the rest is as by default.
    """

    # Runs of before the bound had any, of which JAX took the lower 32 bits.
    seed: int = key(0, whole(0, (1 << 63) - 1), "of the run")
    class_names: tuple[str, ...] = key((), TEXTS, "of the task head, in the order of its outputs")
    vocabulary_checksum: str = key("", TEXT, "sha256 of the tokenizer's file; '': not known")
    tokenizer: str = key("", TEXT, "of an export: the tokenizer's file in its folder")
