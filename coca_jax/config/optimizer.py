"""The optimizer and its learning rates: `config.optimizer`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from annotated_types import Interval
from pydantic import AfterValidator, model_validator
from pydantic.dataclasses import dataclass

from coca_jax.config.base import (
    STRICT,
    Fraction,
    PositiveShare,
    Section,
    Share,
    Steps,
    option,
)


def _rate_or_same(value: float) -> float:
    if value != -1 and not 0 <= value <= 1:
        raise ValueError("give a number from 0 to 1, or -1 for the same as learning_rate")
    return value


RateOrSame = Annotated[float, AfterValidator(_rate_or_same)]


@dataclass(frozen=True, config=STRICT)
class Optimizer(Section):
    """The update rule and its learning rates."""

    name: Literal["adafactor", "adamw", "muon"] = option("adafactor", "Update rule.")
    learning_rate: Share = option(8e-4, "Peak learning rate; that of the head if there is one.")
    encoder_learning_rate: RateOrSame = option(
        -1.0, "Learning rate of everything but the task head; 0: frozen, -1: as learning_rate."
    )
    image_learning_rate: RateOrSame = option(
        -1.0,
        "Learning rate of the image encoder, without a task head; 0: frozen, -1: as learning_rate. "
        "Of dual encoders: of everything up to the image embedding.",
    )
    text_learning_rate: RateOrSame = option(
        -1.0,
        "Learning rate of everything up to the text embedding, of dual encoders; 0: frozen, -1: as "
        "learning_rate.",
    )
    projection_rate: Share = option(
        1.0,
        "Factor on the learning rate of the two projections into the contrastive space; 0: frozen.",
    )
    layer_decay: PositiveShare = option(1.0, "Factor on the learning rate per layer below the top.")
    warmup_steps: Steps = option(0, "Steps over which the learning rate rises from 0.")
    schedule: Literal["linear", "cosine", "constant", "wsd"] = option(
        "linear",
        "Learning rate after warm-up; 'wsd': constant, then linear decay. All but 'constant' end "
        "at 0.",
    )
    decay_share: PositiveShare = option(0.2, "Fraction of the steps in which 'wsd' decays.")
    weight_decay: Annotated[float, Interval(ge=0, le=10)] = option(
        0.01, "Decoupled weight decay of matrices."
    )
    beta1: Fraction = option(0.9, "Decay of the first moment; Muon's matrices use 0.95.")
    beta2: Fraction = option(0.999, "Decay of the second moment.")
    clip_norm: Annotated[float, Interval(ge=0, le=1e6)] = option(
        1.0, "Maximum global norm of the gradients; 0: no clipping."
    )
    ema: Fraction = option(
        0.0,
        "Decay of the averaged parameters used in evaluation, at step s at most (1 + s) / "
        "(10 + s); 0: none.",
    )
    average_share: Fraction = option(
        0.0, "Average the parameters of this last fraction of the steps, instead of ema; 0: none."
    )
    l2_to_start: Annotated[float, Interval(ge=0, le=10)] = option(
        0.0, "Decoupled decay towards the initial weights instead of 0."
    )
    keep_embeddings: bool = option(
        False, "Freeze all parameters that embeddings depend on; train only the captioning part."
    )
    lora_rank: Annotated[int, Interval(ge=0, le=4096)] = option(
        0, "Rank of LoRA adapters, trained with adamw; 0: train all parameters."
    )
    lora: Literal["qv", "all"] = option(
        "qv", "Kernels that LoRA adapts: queries and values, or all of attention and MLPs."
    )
    lora_alpha: Annotated[float, Interval(gt=0, le=1e4)] = option(
        16.0, "Scale of LoRA adapters: lora_alpha / lora_rank."
    )

    def check_warmup(self, steps: int) -> None:
        """Raises ValueError if a run of so many steps (0: not known) ends before its warm-up."""
        if self.warmup_steps >= steps > 0 and self.warmup_steps:
            raise ValueError(
                f"optimizer.warmup_steps={self.warmup_steps} is not below the run's {steps} steps; "
                "shorten it"
            )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.ema and self.average_share:
            raise ValueError(
                f"ema={self.ema} and optimizer.average_share={self.average_share} are two "
                "averages. Set one of them."
            )
        for name in ("image_learning_rate", "text_learning_rate"):
            if getattr(self, name) > 0 and not self.learning_rate:
                raise ValueError(
                    f"{name}={getattr(self, name)} is a share of optimizer.learning_rate=0. Set "
                    "both above 0."
                )
        if self.image_learning_rate == 0 and self.text_learning_rate == 0:
            raise ValueError(
                "image_learning_rate=0 and optimizer.text_learning_rate=0 leave nothing but the "
                "temperature to train. Set one of them to -1."
            )
        if self.keep_embeddings:
            self.require(
                "optimizer.keep_embeddings=True",
                lora_rank=(0,),
                image_learning_rate=(-1.0,),
                projection_rate=(1.0,),
            )
        if self.lora_rank:
            self.require(
                f"optimizer.lora_rank={self.lora_rank}",
                name=("adamw",),
                image_learning_rate=(-1.0,),
                text_learning_rate=(-1.0,),
                layer_decay=(1.0,),
                projection_rate=(1.0,),
                l2_to_start=(0.0,),
            )
        return self
