"""The losses: `config.loss`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from annotated_types import Interval
from pydantic import model_validator
from pydantic.dataclasses import dataclass

from coca_jax.config.base import (
    STRICT,
    Fraction,
    OwnChannels,
    PositiveShare,
    Section,
    Share,
    Weight,
    option,
)

Chunk = Annotated[int, Interval(ge=0, le=1 << 31)]


@dataclass(frozen=True, config=STRICT)
class Loss(Section):
    """The losses and how they are computed."""

    contrastive_weight: Weight = option(1.0, "Weight of the contrastive loss.")
    captioning_weight: Weight = option(2.0, "Weight of the captioning loss.")
    caption_labels: bool = option(
        True,
        "Compute the captioning loss on rows of label sources, too, as in the paper. False trains "
        "the decoder on captions only; label rows still have the contrastive loss.",
    )
    bag_weight: Weight = option(
        0.0, "Weight of a bag-of-words loss: the image encoder alone predicts a text's tokens."
    )
    hidden_weight: Weight = option(
        0.0,
        "Weight of the masked-patch loss: predict the tokens that the averaged model (ema) gives "
        "masked patches.",
    )
    hidden_share: Annotated[float, Interval(gt=0, lt=1)] = option(
        0.5, "Fraction of patches that the masked-patch loss masks."
    )
    affinity_weight: Weight = option(
        0.0,
        "Weight of distilling a teacher's similarities, from embeddings that `recaption` stored.",
    )
    imitation_weight: Weight = option(
        0.0, "Weight of distilling the teacher's embeddings; model.embed_dim must be their width."
    )
    teacher_width: OwnChannels = option(
        0, "Width of the teacher's embeddings; 0: without distillation."
    )
    teacher_scale: Annotated[float, Interval(gt=0, le=1000)] = option(
        100.0, "Logit scale of the teacher's cosine similarities."
    )
    contrastive: Literal["softmax", "sigmoid", "global"] = option(
        "softmax",
        "Form of the contrastive loss; 'global': softmax against all examples, with running means "
        "of each (SogCLR).",
    )
    min_temperature: Annotated[float, Interval(ge=0, le=100)] = option(
        0.0, "Lower bound of the learned temperature; 0: none."
    )
    global_rate: PositiveShare = option(
        0.6, "Weight of the current batch in the running means of 'global'."
    )
    global_examples: Annotated[int, Interval(ge=0, lt=1 << 31)] = option(
        0, "Number of examples of 'global'; 0: those of the data."
    )
    reduction: Literal["sum", "mean"] = option(
        "sum", "Reduction over the two directions of the contrastive loss (paper, Eq. 2: sum)."
    )
    contrastive_chunk: Chunk = option(
        0,
        "Columns per tile of the similarity matrix, rounded to a divisor of the batch size; 0: as "
        "many as fit into 64 MiB on each device.",
    )
    caption_chunk: Chunk = option(0, "Tokens per chunk of the lm_head; 0: all at once.")
    z_loss: Share = option(0.0, "Weight of the squared log-sum-exp in the captioning loss.")
    label_smoothing: Fraction = option(0.0, "Label smoothing of the captioning loss.")
    duplicate_texts: Literal["negatives", "ignore", "positives"] = option(
        "negatives", "How equal texts in a batch are compared; the paper's: as negatives."
    )

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each loss, by key."""
        return {key: value for key, value in self.to_dict().items() if key.endswith("_weight")}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.contrastive == "sigmoid":  # it has a single direction
            self.require("loss.contrastive='sigmoid'", reduction=("sum",))
        if self.contrastive == "global" and self.contrastive_weight:
            self.require(
                "loss.contrastive='global'",
                duplicate_texts=("negatives", "ignore"),
            )
            if self.global_examples == 1:
                raise ValueError(
                    "global_examples=1 leaves nothing to compare with. Give 2 or more."
                )
        if bool(self.affinity_weight or self.imitation_weight) != bool(self.teacher_width):
            raise ValueError(
                f"teacher_width={self.teacher_width} does not go with loss.affinity_weight="
                f"{self.affinity_weight} and loss.imitation_weight={self.imitation_weight}. Set "
                "one of the weights, and the width of the embeddings that `recaption --embeddings` "
                "wrote, or none of them."
            )
        return self
