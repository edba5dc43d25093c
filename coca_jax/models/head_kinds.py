"""What a task head pools (paper, Section 3.3 and 4.2), and what that asks of a run.

A head has one kind (`config.head.kind`). This file alone parses that name; all else asks the kind.
A new kind is a class here.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from coca_jax.config import Config  # which names these kinds


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


KINDS: dict[str, type[HeadKind]] = {kind.name: kind for kind in (Classification, Answer, Pair)}


def of(name: str) -> HeadKind | None:
    """The kind that config.head.kind names; None for '', a run without a task head.

    Raises:
        ValueError: there is no such kind.
    """
    if not name:
        return None
    if name not in KINDS:
        raise ValueError(f"head.kind={name!r}; choose from {', '.join(KINDS)}, or '' for none")
    return KINDS[name]()
