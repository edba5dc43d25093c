"""What a task head pools (paper, Section 3.3 and 4.2), and what that asks of a run.

A head has one kind (`config.head.kind`). This file alone parses that name; all else asks the kind.
A new kind is a class here.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import ClassVar, Literal

from pydantic.dataclasses import dataclass

from coca_jax.config.base import (
    STRICT,
    Channels,
    Fraction,
    OwnChannels,
    OwnHeads,
    Section,
    Weight,
    option,
)

if typing.TYPE_CHECKING:
    from coca_jax.config import Config, Model


@dataclasses.dataclass(frozen=True)  # modules that hold equal kinds are equal
class HeadKind:
    """A kind of task head.

    Attributes:
        name: in config.head.kind.
        about: what it classifies, behind the name in the key's description.
        images: that an example has; of several each is pooled alone, and the classifier sees them
            side by side.
        reads_text: whether it pools the decoder's outputs over the text beside an image; else the
            tokens of the image encoder.
        example: a call of a loaded model that gives the classes' probabilities, for a model card.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    example: ClassVar[str]
    images: ClassVar[int] = 1
    reads_text: ClassVar[bool] = False

    @property
    def shares_pass(self) -> bool:
        """Whether the pass over image and caption that the other losses take serves it too. The
        decoder is causal: its states at a question know nothing of the answer behind it."""
        return self.images == 1

    def check(self, config: Config) -> None:
        """Raises ValueError for a run that cannot train such a head: name, value, remedy."""


class Classification(HeadKind):
    """The class of an image, or of a clip's frames."""

    name, about = "classification", "of images"
    example = 'model.classify(["cat.jpg"])'


class Answer(HeadKind):
    """The answer to a question about an image (paper: VQA, SNLI-VE)."""

    name, about, reads_text = "answer", "to questions", True
    example = 'model.classify(["cat.jpg"], ["what is on the sofa?"])'

    def check(self, config: Config) -> None:
        """Questions are no captions to match images with."""
        if config.loss.contrastive_weight:
            raise ValueError(
                "head.kind='answer' has questions as texts, which match no image; set "
                "loss.contrastive_weight=0"
            )


class Pair(HeadKind):
    """Whether a statement holds for two images (paper: NLVR2)."""

    name, about, images, reads_text = "pair", "of images and a text", 2, True
    example = 'model.classify([("left.jpg", "right.jpg")], ["both show a cat"])'

    def check(self, config: Config) -> None:
        """Nothing is trained beside it, and its images are neither augmented nor clips."""
        others = {k: v for k, v in config.loss.to_dict().items() if k.endswith("_weight") and v}
        if others:
            given = ", ".join(f"loss.{name}={value}" for name, value in others.items())
            raise ValueError(
                f"head.kind='pair' has no caption to train beside it ({given}); set "
                f"{' and '.join(f'loss.{name}=0' for name in others)}"
            )
        data = config.data
        if data.augment != "none" or data.flip:
            raise ValueError(
                f"head.kind='pair' with data.augment={data.augment!r}, flip={data.flip}: pairs are "
                "not augmented, since left and right may matter; set 'none' and False"
            )
        if data.num_frames:
            raise ValueError(
                f"head.kind='pair' with data.num_frames={data.num_frames}: pairs are of images; "
                "set it to 0"
            )


HEADS: dict[str, type[HeadKind]] = {kind.name: kind for kind in (Classification, Answer, Pair)}


def head_kind(name: str) -> HeadKind | None:
    """The kind that config.head.kind names; None for '', a run without a task head.

    Raises:
        ValueError: there is no such kind.
    """
    if not name:
        return None
    if name not in HEADS:
        raise ValueError(f"head.kind={name!r}; choose from {', '.join(HEADS)}, or '' for none")
    return HEADS[name]()


@dataclass(frozen=True, config=STRICT)
class Head(Section):
    """The task head: an attentional pooler and a classifier."""

    kind: Literal["", "classification", "answer", "pair"] = option(
        "",
        "Kind of the classifier; '': no head. "
        + " ".join(f"{kind.name!r}: {kind.about}." for kind in HEADS.values()),
    )
    num_queries: Channels = option(1, "Number of queries of the head's pooler.")
    width: OwnChannels = option(0, "Width of the head's pooler; 0: that of the decoder.")
    num_heads: OwnHeads = option(
        0, "Number of attention heads of the head's pooler; 0: as model.pooler."
    )
    classes: str = option("", "Text file with one class per line; '': the class names of the data.")
    unknown: Literal["refuse", "skip"] = option(
        "refuse", "What to do with examples whose label is not among the classes."
    )
    weight: Weight = option(1.0, "Weight of the head's loss, in addition to those of `loss`.")
    label_smoothing: Fraction = option(0.0, "Label smoothing of the head's loss.")

    def sizes(self, model: Model) -> tuple[int, int]:
        """(width, attention heads) of the head's pooler, with the model's in place of 0.

        Raises ValueError if the heads do not divide the width.
        """
        width, num_heads = self.width or model.text.width, self.num_heads or model.pooler.num_heads
        if width % num_heads:
            raise ValueError(
                f"head.num_heads={num_heads} does not divide head.width={width} (0 stands for the "
                "model's). Choose a divisor."
            )
        return width, num_heads


# How the image embedding and the tokens that the decoder sees are pooled (paper, Section 3.2).
#
# A model has one kind (`config.model.pooler.kind`). This file alone parses that name; all else asks
# the kind.


@dataclasses.dataclass(frozen=True)  # modules that hold equal kinds are equal
class PoolerKind:
    """A kind of pooling.

    Attributes:
        name: in config.model.pooler.kind.
        second_pooler: whether a pooler of its own makes the embedding; else the first query of the
            only one does.
        in_cascade: whether the second pooler reads what the first one found; else the encoder.
        pools: whether there is any pooler; else the class token is the embedding and the decoder
            sees the encoder's tokens of patches.
    """

    name: ClassVar[str]
    second_pooler: ClassVar[bool] = True
    in_cascade: ClassVar[bool] = False
    pools: ClassVar[bool] = True

    @property
    def by_query(self) -> bool:
        """Whether the first query of the only pooler makes the embedding."""
        return self.pools and not self.second_pooler

    @property
    def of_captions(self) -> bool:
        """Whether captions alone depend on the first pooler: the second one reads the encoder."""
        return self.second_pooler and not self.in_cascade

    def num_seen(self, num_queries: int) -> int:
        """Of so many queries, those whose tokens the decoder sees."""
        return num_queries - self.by_query


class Cascade(PoolerKind):
    """The contrastive pooler reads the generative one's output: the paper's."""

    name, in_cascade = "cascade", True


class Parallel(PoolerKind):
    """Both read the encoder."""

    name = "parallel"


class OpenClip(PoolerKind):
    """One pooler, whose first query is the image embedding: open_clip's older models."""

    name, second_pooler = "open_clip", False


class Without(PoolerKind):
    """No pooler: open_clip's models without attentional_pool, such as its coca_base."""

    name, second_pooler, pools = "none", False, False


POOLERS: dict[str, type[PoolerKind]] = {
    kind.name: kind for kind in (Cascade, Parallel, OpenClip, Without)
}


def pooler_kind(name: str) -> PoolerKind:
    """The kind that config.model.pooler.kind names. Raises ValueError where there is none."""
    if name not in POOLERS:
        raise ValueError(f"model.pooler.kind={name!r}; choose from {', '.join(POOLERS)}")
    return POOLERS[name]()


# What tells the families of image and text towers apart (`config.model.family`).
#
# This file alone parses that name; all else asks the kind. The family 'coca' is none of them: it has
# a decoder.


CLASS, MEAN, QUERY = "class", "mean", "query"


@dataclasses.dataclass(frozen=True)  # modules that hold equal kinds are equal
class TowerKind:
    """A family of towers.

    Attributes:
        name: in config.model.family.
        about: whose weights they are.
        causal: whether a text's token sees only itself and what is before, and the end symbol's
            state is the text's; else all see each other, and the state at the last place is.
        text_bias: whether the projection behind a text's state has a bias.
        pool: what of the image's tokens is the image: CLASS, the class token behind a norm; MEAN,
            the mean of the others behind a norm; QUERY, what one learned query finds.
        projection: whether one leads from there to the embedding, ...
        image_bias: ... and whether it has a bias.
        begins, ends: whether a text has a begin and an end symbol.
        cleaned: whether texts are put in lower case, and more (config.model.clean).
    """

    name: str
    about: str
    causal: bool
    text_bias: bool
    pool: str
    projection: bool = True
    image_bias: bool = False
    begins: bool = True
    ends: bool = True
    cleaned: bool = False


TOWERS: dict[str, TowerKind] = {
    kind.name: kind
    for kind in (
        TowerKind("clip", "CLIP, MetaCLIP", True, False, CLASS),
        TowerKind(
            *("siglip", "SigLIP", False, True, QUERY), projection=False, begins=False, cleaned=True
        ),
        TowerKind("pe", "Perception Encoder core", True, False, QUERY, image_bias=True),
        TowerKind("openvision", "OpenVision, CLIPA", False, False, MEAN, ends=False),
    )
}


def tower_kind(name: str) -> TowerKind:
    """The kind that config.model.family names. Raises ValueError where it is none of towers."""
    if name not in TOWERS:
        raise ValueError(f"model.family={name!r}: of towers only {', '.join(TOWERS)}")
    return TOWERS[name]
