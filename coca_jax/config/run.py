"""A run's config: all sections, and the rules that involve several of them."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from annotated_types import Interval
from pydantic import AfterValidator
from pydantic.dataclasses import dataclass

from coca_jax.config import heads, shapes
from coca_jax.config.base import (
    STRICT,
    BatchSize,
    Section,
    Seed,
    Size,
    Steps,
    TextLength,
    option,
)
from coca_jax.config.checkpoint import Checkpoint, Faults
from coca_jax.config.data import Data
from coca_jax.config.evaluation import Eval
from coca_jax.config.heads import Head
from coca_jax.config.log import Log
from coca_jax.config.loss import Loss
from coca_jax.config.mesh import Mesh
from coca_jax.config.model import Model
from coca_jax.config.optimizer import Optimizer


def _stages(value: tuple[tuple[float, Any], ...]) -> tuple[tuple[float, Any], ...]:
    # 0.8, 0.05, 0.05 and 0.1 add up to slightly more than 1.
    if math.fsum(share for share, _ in value) > 1 + 1e-9:
        raise ValueError("give fractions of the steps that add up to at most 1")
    return value


Positive = Annotated[float, Interval(gt=0)]


@dataclass(frozen=True, config=STRICT)
class Config(Section):
    """All keys of a run.

    A Config is valid value by value and section by section. `check` adds the rules that involve
    several sections, and what a run needs to start. It is called where a run starts and not by the
    constructor, because the defaults, the config of an export, and a config that a command builds
    up in several steps need not describe a run.
    """

    seed: Seed = option(0, "Seed of the parameters and of the order of the data.")
    batch_size: BatchSize = option(256, "Examples per step, over all devices and processes.")
    batch_sizes: Annotated[tuple[tuple[Positive, BatchSize], ...], AfterValidator(_stages)] = (
        option((), "Stages before batch_size: ((fraction of the steps, batch size), ...).")
    )
    steps: Steps = option(0, "Number of training steps; 0: use epochs.")
    stage_steps: Steps = option(
        0,
        "Length that the fractions in batch_sizes and image_sizes refer to; 0: all steps. A run "
        "that is trained longer keeps its original length.",
    )
    epochs: Annotated[float, Interval(ge=0, le=1e6)] = option(
        0.0, "Passes over the data (the sum of all sources); 0: use steps."
    )
    remat: Literal["auto", "none", "dots", "named", "full"] = option(
        "auto", "Remat policy; 'auto': 'named' on CPUs, 'none' elsewhere."
    )
    accumulate_steps: Annotated[int, Interval(ge=1, le=65_536)] = option(
        1, "Micro-batches per step (gradient accumulation); the contrastive loss stays exact."
    )
    image_sizes: Annotated[tuple[tuple[Positive, Size], ...], AfterValidator(_stages)] = option(
        (), "Stages before model.image_size: ((fraction of the steps, image size), ...)."
    )
    text_lengths: tuple[TextLength, ...] = option(
        (), "Cut the captions of a batch to the smallest of these lengths that fits."
    )
    text_parts: Annotated[int, Interval(ge=1, le=1024)] = option(
        1, "Split a batch by caption length: the longest 1/text_parts of it runs separately."
    )
    init_from: str = option("", "Run, checkpoint or converted weights to start from.")
    init_parts: Literal["all", "image"] = option(
        "all", "Part of init_from to load; 'image': only the image encoder, of any family."
    )
    init_positions: Literal["extend", "interpolate"] = option(
        "extend",
        "How to load position embeddings for longer texts: add new rows, or interpolate.",
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

    @property
    def frozen_encoder(self) -> bool:
        """Whether no parameter of the image encoder is trained."""
        if self.head.kind:
            return self.optimizer.encoder_learning_rate == 0
        return self.optimizer.image_learning_rate == 0 or self.optimizer.keep_embeddings

    def check(self) -> None:
        """Raises ValueError for the first rule between sections that the config breaks, and for
        what a run lacks to start."""
        if bool(self.steps) == bool(self.epochs):
            both = "; --config.steps=0 leaves the epochs, --config.epochs=0 the steps"
            raise ValueError(
                f"config.steps={self.steps} and config.epochs={self.epochs}; set exactly one"
                + (both if self.steps else "")
            )
        self.check_length(self.steps)
        self._check_image_sizes()
        self._check_family()
        self._check_losses()
        self._check_partial_training()
        if self.text_parts > 1 and not self.text_lengths:
            raise ValueError(
                f"config.text_parts={self.text_parts} needs config.text_lengths. Set (16, 32), say."
            )
        if self.batch_sizes:
            self._require(f"config.batch_sizes={self.batch_sizes}", data__loader=("direct",))
        if self.data.resize == "native":
            self._check_native()
        self.check_sources()
        self._check_head()

    def check_sources(self) -> None:
        """Raises ValueError for a run without data."""
        if not self.data.sources:
            raise ValueError("config.data.sources is empty; name at least one source of data")

    def check_length(self, steps: int) -> None:
        """Raises ValueError for what a run of so many steps (0: not known) never reaches."""
        self.optimizer.check_warmup(steps)
        if self.log.profile_steps[:1] > (steps,) > (0,):
            raise ValueError(
                f"log.profile_steps={self.log.profile_steps} is behind the run's {steps} steps; "
                "name steps of the run"
            )

    def _require(self, reason: str, **wanted: tuple[Any, ...]) -> None:
        self.require(reason, "config.", **wanted)

    def _check_head(self) -> None:
        head, optimizer = self.head, self.optimizer
        kind = heads.head_kind(head.kind)
        if kind is None:
            if optimizer.encoder_learning_rate >= 0:
                raise ValueError(
                    f"config.optimizer.encoder_learning_rate={optimizer.encoder_learning_rate} "
                    "needs a task head (head.kind). Without one set optimizer.learning_rate."
                )
            if not any(self.loss.weights.values()):
                names = ", ".join(f"loss.{name}" for name in self.loss.weights)
                raise ValueError(f"config: {names} are all 0. Set one of them.")
            return
        head.sizes(self.model)
        for key in ("lora_rank", "image_learning_rate", "keep_embeddings"):
            value = getattr(optimizer, key)
            if value != getattr(Optimizer(), key):
                raise ValueError(
                    f"config.optimizer.{key}={value} does not go with head.kind={head.kind!r}. Set "
                    f"{getattr(Optimizer(), key)}; encoder_learning_rate is the rate of all but "
                    "the head."
                )
        if head.weight <= 0 or optimizer.learning_rate <= 0:
            raise ValueError(
                f"config.head.weight={head.weight} and optimizer.learning_rate="
                f"{optimizer.learning_rate} must be above 0, or the head learns nothing."
            )
        kind.check(self)

    def _check_image_sizes(self) -> None:
        own, patch = self.model.image_size, self.model.patch_size
        for _, size in self.image_sizes:
            name = f"config.image_sizes={self.image_sizes}: {size}"
            if not shapes.divides(patch, size):
                raise ValueError(f"{name} is not a multiple of model.patch_size={patch}.")
            if isinstance(size, int) != isinstance(own, int):
                form = "one number" if isinstance(own, int) else "a pair"
                raise ValueError(f"{name}: give {form}, as model.image_size={own}.")
            if any(one > most for one, most in zip(shapes.pair(size), shapes.pair(own))):
                raise ValueError(
                    f"{name} is larger than model.image_size={own}, at which images are read."
                )

    def _check_family(self) -> None:
        """For models without a decoder; a captioner has no sides that are locked as one."""
        reason = f"model.family={self.model.family!r}"
        if self.model.family == "coca":
            self._require(reason, optimizer__text_learning_rate=(-1.0,))
            return
        if self.model.family == "vision":
            raise ValueError(
                f"config.{reason}: an image encoder alone is not trained. Take it into a captioner "
                "with --config=locked_captioner:WEIGHTS."
            )
        self._require(
            f"{reason}, a dual encoder,",
            loss__captioning_weight=(0.0,),
            loss__bag_weight=(0.0,),
            loss__hidden_weight=(0.0,),
            head__kind=("",),
            optimizer__keep_embeddings=(False,),
            data__label_token=(False,),
            data__resize=("squash", "crop", "trim"),
        )
        if not heads.tower_kind(self.model.family).causal:  # its text tower reads the padding
            self._require(reason, text_lengths=((),))
        if any(source.kind == "question" for source in self.data.sources):
            raise ValueError(
                f"config.{reason}: a dual encoder answers no questions. Use sources of "
                "kind='caption' or kind='label'."
            )

    def _check_losses(self) -> None:
        loss, optimizer = self.loss, self.optimizer
        if loss.min_temperature > self.model.temperature and not self.init_from:
            raise ValueError(
                f"config.loss.min_temperature={loss.min_temperature} is above model.temperature="
                f"{self.model.temperature}, where a run starts. Raise that, or lower this."
            )
        if loss.contrastive == "global" and loss.contrastive_weight:
            self._require("loss.contrastive='global'", data__loader=("direct",))
        if loss.teacher_width:
            self._require(f"loss.teacher_width={loss.teacher_width}", data__loader=("direct",))
        kinds = {source.kind for source in self.data.sources}
        if loss.captioning_weight and not loss.caption_labels and kinds == {"label"}:
            raise ValueError(
                f"config.loss.captioning_weight={loss.captioning_weight} has nothing to learn from "
                "sources of kind='label' with loss.caption_labels=False. Set "
                "loss.caption_labels=True, or loss.captioning_weight=0."
            )
        if loss.imitation_weight and loss.teacher_width != self.model.embed_dim:
            raise ValueError(
                f"config.loss.imitation_weight={loss.imitation_weight} compares embeddings of "
                f"model.embed_dim={self.model.embed_dim} with those of loss.teacher_width="
                f"{loss.teacher_width}. Make them equal, or use loss.affinity_weight."
            )
        if loss.hidden_weight:
            reason = f"loss.hidden_weight={loss.hidden_weight}"
            self._require(reason, data__num_frames=(0,), head__kind=("",))
            if not optimizer.ema:
                raise ValueError(
                    f"config.{reason} learns from averaged parameters. Set optimizer.ema=0.996, say."
                )

    def _check_partial_training(self) -> None:
        """For LoRA, frozen parts, cached tokens and weights to start from."""
        loss, optimizer, data = self.loss, self.optimizer, self.data
        if optimizer.lora_rank:
            # These losses have a layer of their own, which LoRA would leave at random.
            self._require(
                f"optimizer.lora_rank={optimizer.lora_rank}",
                loss__min_temperature=(0.0,),
                loss__bag_weight=(0.0,),
                loss__hidden_weight=(0.0,),
            )
        if optimizer.keep_embeddings:
            others = {key: (0.0,) for key in loss.weights if key != "captioning_weight"}
            self._require(
                "optimizer.keep_embeddings=True", **{f"loss__{k}": v for k, v in others.items()}
            )
        if data.features:
            reason = f"data.features={data.features!r}"
            if not self.frozen_encoder:
                raise ValueError(
                    f"config.{reason} caches the tokens of a frozen image encoder. Set optimizer."
                    "image_learning_rate=0 (encoder_learning_rate=0 with a task head), or "
                    "data.features=''."
                )
            self._require(
                reason,
                model__image__patch_dropout=(0.0,),
                image_sizes=((),),
                loss__hidden_weight=(0.0,),
                head__kind=_single_image(),
            )
        if self.model.image.onnx and not self.frozen_encoder:
            raise ValueError(
                f"config.model.image.onnx={self.model.image.onnx!r} is not trained. Set optimizer."
                "image_learning_rate=0 (encoder_learning_rate=0 with a task head)."
            )
        if self.init_parts != "all" and not self.init_from:
            raise ValueError(
                f"config.init_parts={self.init_parts!r} needs init_from, the weights to load it "
                "from."
            )

    def _check_native(self) -> None:
        for key in ("image_size", "patch_size"):
            size = getattr(self.model, key)
            if not isinstance(size, int):
                raise ValueError(
                    f"config.model.{key}={size} does not go with data.resize='native', whose "
                    "images have any shape. Give one number, or data.resize='squash'."
                )
        self._require(
            "data.resize='native'",
            model__image__conv_widths=((),),
            model__image__patch_dropout=(0.0,),
            image_sizes=((),),
            loss__hidden_weight=(0.0,),
            model__pooler__kind=tuple(k for k, kind in heads.POOLERS.items() if kind.pools),
            head__kind=_single_image(),
        )


def _single_image() -> tuple[str, ...]:
    """The kinds of heads that read one image per example."""
    return ("", *(name for name, kind in heads.HEADS.items() if kind.images == 1))


@dataclass(frozen=True, config=STRICT)
class StoredConfig(Config):
    """A config as it is stored with weights, and what their run found out.

    Next to an export only `model`, the head, and of `data` `resize`, `num_frames` and
    `label_token` are known; the rest is as by default.
    """

    class_names: tuple[str, ...] = option((), "Classes of the head, in the order of its outputs.")
    vocabulary_checksum: str = option("", "sha256 of the tokenizer's file; '': not known.")
    tokenizer: str = option("", "Tokenizer's file in the folder of an export.")
