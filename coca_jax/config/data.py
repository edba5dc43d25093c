"""The training data and how it is read: `config.data`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from annotated_types import Interval
from pydantic import model_validator
from pydantic.dataclasses import dataclass

from coca_jax.config.base import STRICT, Section, Share, option, read

PLACES = ("path", "builtin", "tfds", "seqio")  # a source has one of these keys
# Keys that only sources of some places, or of one kind, read.
_OF_PLACES = {
    "module": ("seqio",),
    "data_dir": ("tfds",),
    "objects": ("builtin",),
    "scenery": ("builtin",),
    "image_field": ("path", "tfds", "seqio"),
}
_OF_KINDS = {
    "captions": "caption",
    "synthetic": "caption",
    "prompts": "label",
    "questions": "question",
    "answers": "question",
}
Kind = Literal["caption", "label", "question"]
KINDS: tuple[str, ...] = get_args(Kind)  # of supervision, see data/supervision.py
Count = Annotated[int, Interval(ge=0, le=4096)]


@dataclass(frozen=True, config=STRICT)
class Entry(Section):
    """One source of data: an entry of `config.data.sources`."""

    path: str = option("", "Folder that `prepare` wrote, or data that can be read in place.")
    builtin: str = option("", "'scenes': synthetic scenes, drawn while they are read.")
    tfds: str = option("", "TFDS dataset, prepared in the array_record format.")
    seqio: str = option("", "Registered seqio Task.")
    module: str = option("", "Module that registers the seqio Task.")
    data_dir: str = option("", "Folder of the prepared TFDS dataset; '': TFDS's default.")
    split: str = option("", "Split to read; '': train in training, test in evaluation.")
    kind: Kind = option(
        "caption",
        "What the source trains: captions, class names, or questions (each text is one, and the "
        "labels answer it).",
    )
    weight: Annotated[float, Interval(gt=0, le=1e38)] = option(
        1.0, "Share of each batch, relative to the other sources."
    )
    limit: Annotated[int, Interval(ge=0, le=1 << 62)] = option(
        0, "Read at most this many records; 0: all."
    )
    where: Mapping[str, Any] = option(
        {},
        "Read only records with these values: {field: value or list of values}, with fields of "
        "`extra`, or 'label' or 'text'.",
    )
    image_field: str = option("", "Field of the image, for tfds, seqio and data read in place.")
    text_field: str = option("", "Field to read as text: of `extra`, or of a tfds or seqio record.")
    label_field: str = option("", "Field to read as label, as text_field.")
    captions: Literal["sampled", "all", "scored"] = option(
        "sampled",
        "'sampled': one caption of an image per visit. 'all': each caption is its own example. "
        "'scored': one caption that `recaption` wrote per visit, sampled by its score.",
    )
    synthetic: Share = option(
        0.5, "Probability of a `recaption` caption instead of an original one (captions='scored')."
    )
    prompts: str = option("", "Prompts for label texts; '': data.prompts.")
    questions: str = option(
        "", "Field of `extra` with the list of an image's questions, as {question, answer}."
    )
    answers: tuple[str, ...] = option((), "Read only questions with these answers; (): all.")
    objects: tuple[Annotated[int, Interval(ge=1, le=4)], ...] = option(
        (1, 2, 3, 4), "Numbers of objects in a synthetic scene."
    )
    scenery: Literal["plain", "varied", "unseen"] = option(
        "plain",
        "Backgrounds of synthetic scenes: four plain ones, more of them in changing light, or only "
        "ones that the other two never show.",
    )

    @classmethod
    def of(cls, entry: Entry | Mapping[str, Any] | str, name: str = "source") -> Entry:
        """An entry as users write it: a dict, or the path of prepared data.

        Raises ValueError for an unknown key or a value that is not allowed; `name` is what the
        message calls the entry.
        """
        return cls(path=entry) if isinstance(entry, str) else read(cls, entry, name)

    @property
    def place(self) -> str:
        """The one of PLACES that the entry has; '' if it has none."""
        return next((key for key in PLACES if getattr(self, key)), "")

    def check_place(self, name: str) -> None:
        """Raises ValueError for a key that data of this place ignore; `name` is what the message
        calls the entry."""
        given = self.to_dict()
        for key, places in _OF_PLACES.items():
            if key in given and self.place and self.place not in places:
                raise ValueError(
                    f"{name}.{key}={given[key]!r} is for data by {' or '.join(places)}, but these "
                    f"are by {self.place}={given[self.place]!r}. Leave it out."
                )

    def check_training(self, name: str) -> None:
        """As check_place, and for a key that a training source of this kind ignores."""
        self.check_place(name)
        given = self.to_dict()
        for key, kind in _OF_KINDS.items():
            if key in given and self.kind != kind:
                raise ValueError(
                    f"{name}.{key}={given[key]!r} is for kind={kind!r}, but this is kind="
                    f"{self.kind!r}. Leave it out, or set that kind."
                )
        if self.captions == "scored" and self.place not in ("", "path"):
            raise ValueError(
                f"{name}.captions='scored' reads what `recaption` wrote, data by path, but these "
                f"are by {self.place}={given[self.place]!r}. Leave it out."
            )
        if "synthetic" in given and self.captions != "scored":
            raise ValueError(
                f"{name}.synthetic={self.synthetic} is for captions='scored', but this is captions="
                f"{self.captions!r}. Leave it out, or set that."
            )

    def to_dict(self) -> dict[str, Any]:
        """Kind and weight, and the values that differ from the default."""
        given, default = super().to_dict(), Section.to_dict(Entry())
        return {k: v for k, v in given.items() if k in ("kind", "weight") or v != default[k]}


@dataclass(frozen=True, config=STRICT)
class Data(Section):
    """The training data and how it is read."""

    sources: tuple[Entry, ...] = option((), "Sources of training data, mixed by weight.")
    vocabulary: str = option("", "Tokenizer file; '': trained on the run's own text.")
    vocabulary_kind: Literal["auto", "unigram", "bpe"] = option(
        "auto",
        "Kind of a trained tokenizer; 'auto': unigram, unless there is too little text for it and "
        "bpe gives fewer tokens.",
    )
    label_token: bool = option(False, "Put a reserved symbol before label texts.")
    prompts: str = option(
        "varied", "Prompts for label texts: a set of data/prompts.py, or a file with one per line."
    )
    augment: Literal["none", "crop", "inception", "drawing", "randaugment"] = option(
        "none", "Augmentation of training images, see docs/data.md."
    )
    randaugment: tuple[
        Annotated[int, Interval(ge=1, le=16)], Annotated[float, Interval(ge=0, le=30)]
    ] = option((2, 10.0), "Number of operations of RandAugment, and their magnitude.")
    augmentations: Annotated[int, Interval(ge=0, le=65_536)] = option(
        0, "Number of fixed augmentations per image, one per visit; 0: a new one at each visit."
    )
    flip: bool = option(False, "Flip images left to right at random.")
    resize: Literal["squash", "crop", "trim", "native"] = option(
        "squash",
        "'squash': ignore the aspect ratio. 'crop': fit the shortest side and crop the center. "
        "'trim': remove plain margins, as around drawings, then squash. 'native': keep the aspect "
        "ratio, with at most max_patches patches.",
    )
    max_patches: Annotated[int, Interval(ge=0, le=65_025)] = option(
        0, "Maximum number of patches with resize='native'; 0: those of a square image."
    )
    fast_resize: bool = option(False, "Decode and resize JPEGs faster, still antialiased.")
    num_frames: Count = option(0, "Frames per clip, sampled uniformly; 0: images.")
    frame_jitter: bool = option(
        False, "Sample a frame anywhere in its segment of the clip, not in the middle."
    )
    max_bad_fraction: Share = option(
        0.05,
        "Maximum fraction of damaged images among those read so far (at least 100); the run stops "
        "above it.",
    )
    num_threads: Count = option(0, "Number of decoding threads; 0: one per core.")
    features: str = option(
        "",
        "Folder that caches the tokens of a frozen image encoder (one process); '': no cache.",
    )
    features_gib: Annotated[float, Interval(gt=0, le=1e9)] = option(
        100.0, "Maximum size of the cache per source, in GiB."
    )
    loader: Literal["direct", "seqio"] = option(
        "direct", "'seqio' needs the extra 'seqio' and gives equal batches."
    )

    @property
    def varies(self) -> bool:
        """Whether an image, or a clip, differs at each visit."""
        return self.augment != "none" or self.flip or bool(self.num_frames and self.frame_jitter)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for number, entry in enumerate(self.sources):
            entry.check_training(f"sources[{number}]")
        if self.frame_jitter and not self.num_frames:
            raise ValueError(
                "frame_jitter=True is for clips, but data.num_frames=0. Set num_frames, or False."
            )
        if self.augmentations:
            self.require(f"data.augmentations={self.augmentations}", loader=("direct",))
        if self.resize == "trim":
            # A random crop would cut into what an image without margins shows.
            self.require("data.resize='trim'", augment=("none", "drawing", "randaugment"))
        if self.resize == "native":
            self.require(
                "data.resize='native'",
                augment=("none", "crop", "inception"),
                num_frames=(0,),
                loader=("direct",),
                features=("",),
            )
        elif self.max_patches:
            raise ValueError(f"max_patches={self.max_patches} is for data.resize='native'. Set 0.")
        if self.features:
            self.require(f"data.features={self.features!r}", loader=("direct",))
            if self.varies and not self.augmentations:
                raise ValueError(
                    f"features={self.features!r} caches each augmented image, but data."
                    "augmentations=0 draws a new augmentation at each visit. Set it to 4, say, or "
                    "data.augment='none' and data.flip=False."
                )
        return self
