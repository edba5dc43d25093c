"""What a run trains on, and how it is read: `config.data`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from coca_jax.config.fields import (  # fmt: skip
    FLAG,
    MAPPING,
    RANDAUGMENT,
    SOURCES,
    TEXT,
    TEXTS,
    Section,
    choice,
    key,
    number,
    read,
    several,
    whole,
)

PLACES = ("path", "builtin", "tfds", "seqio")  # keys of an entry, which has one of them
# What of an entry only data of some places, or of one kind, read.
_OF_PLACES = {
    "module": ("seqio",),
    "data_dir": ("tfds",),
    "objects": ("builtin",),
    "scenery": ("builtin",),
    "image_field": ("path", "tfds", "seqio"),
}
KINDS = ("caption", "label", "question")  # of supervision, see data/supervision.py
_OF_KINDS = {
    "captions": "caption",
    "synthetic": "caption",
    "prompts": "label",
    "questions": "question",
    "answers": "question",
}


@dataclasses.dataclass(frozen=True)
class Entry(Section):
    """An entry of `config.data.sources`: one of path, builtin, tfds, seqio, and what to take."""

    path: str = key("", TEXT, "what `prepare` wrote, or data that can be read in place")
    builtin: str = key("", TEXT, "'scenes': drawn as they are read")
    tfds: str = key("", TEXT, "a TFDS data set that is prepared in the format array_record")
    seqio: str = key("", TEXT, "a registered seqio Task")
    module: str = key("", TEXT, "of seqio: the module that registers the Task")
    data_dir: str = key("", TEXT, "of tfds: where it is prepared; '': where TFDS looks")
    split: str = key("", TEXT, "'': train in training, test in evaluation")
    kind: str = key(
        "caption",
        choice(*KINDS),
        "what trains: texts, class names, or each text as a question that the labels answer",
    )
    weight: float = key(
        1.0, number(0, 1e38, above=True), "its share of a batch, against the other sources"
    )
    limit: int = key(0, whole(0, 1 << 62, "records"), "only the first so many; 0: all")
    where: Mapping[str, Any] = key(
        {},
        MAPPING,
        "{field: value or list of values} that records have in `extra`, or as 'label' or 'text'",
    )
    image_field: str = key("", TEXT, "the field of the image, of tfds, seqio and data in place")
    text_field: str = key("", TEXT, "field of `extra` (tfds, seqio: of the data) to take as text")
    label_field: str = key("", TEXT, "the same, to take as label")
    captions: str = key(
        "sampled",
        choice("sampled", "all", "scored"),
        "one of an image's captions at each visit, each as an example of its own, or of what "
        "`recaption` wrote one at each visit by its score",
    )
    synthetic: float = key(
        0.5, number(0, 1), "captions='scored': how often a caption is taken, not an original text"
    )
    prompts: str = key("", TEXT, "of label texts; '': data.prompts")
    questions: str = key(
        "", TEXT, "field of `extra` that lists an image's questions as {question, answer}"
    )
    answers: tuple[str, ...] = key((), TEXTS, "only questions with one of these; (): all")
    objects: tuple[int, ...] = key(
        (1, 2, 3, 4), several(whole(1, 4)), "of scenes: how many objects one may have"
    )
    scenery: str = key(
        "plain",
        choice("plain", "varied", "unseen"),
        "of scenes: four backgrounds, others too in changing light, or those that these never show",
    )

    @classmethod
    def of(cls, entry: Entry | Mapping[str, Any] | str, name: str = "source") -> Entry:
        """An entry as users write it: a dict, or the path of prepared data.

        Raises ValueError for a key that there is not, and a value that cannot be; `name` is what
        the message calls the entry.
        """
        if isinstance(entry, str):
            return cls(path=entry)
        return entry if isinstance(entry, Entry) else read(cls, entry, name)

    def check_place(self, name: str) -> None:
        """Raises ValueError for a key that data of this place do not read; `name` is what the
        message calls the entry."""
        told = self.to_dict()
        place = next((given for given in PLACES if given in told), "")
        for one, places in _OF_PLACES.items():
            if one in told and place and place not in places:
                raise ValueError(
                    f"{name}: {one}={told[one]!r} is of data by {' or '.join(places)}, and these "
                    f"are by {place}={told[place]!r}; leave it out"
                )

    def check_read(self, name: str) -> None:
        """The same for a source that is trained on, and for a key that its kind does not read, or a
        value that its data cannot have."""
        self.check_place(name)
        told = self.to_dict()
        for one, kind in _OF_KINDS.items():
            if one in told and self.kind != kind:
                raise ValueError(
                    f"{name}: {one}={told[one]!r} is of kind={kind!r}, and this is kind="
                    f"{self.kind!r}; leave it out, or set that kind"
                )
        place = next((given for given in PLACES if given in told), "")
        if self.captions == "scored" and place not in ("", "path"):
            raise ValueError(
                f"{name}: captions='scored' is of what `recaption` wrote, data by path, and these "
                f"are by {place}={told[place]!r}; leave it out"
            )
        if "synthetic" in told and self.captions != "scored":
            raise ValueError(
                f"{name}: synthetic={self.synthetic} is of captions='scored', and captions="
                f"{self.captions!r}; leave it out, or set that"
            )

    def to_dict(self) -> dict[str, Any]:
        """The keys that say something: kind and weight, and what is not as by default."""
        given, default = super().to_dict(), Section.to_dict(Entry())
        return {k: v for k, v in given.items() if k in ("kind", "weight") or v != default[k]}


@dataclasses.dataclass(frozen=True)
class Data(Section):
    """What a run trains on, and how it is read."""

    sources: tuple[Entry, ...] = key((), SOURCES, "what to train on, by weight in each batch")
    vocabulary: str = key("", TEXT, "a tokenizer file; '': trained on the run's own text")
    vocabulary_kind: str = key(
        "auto",
        choice("auto", "unigram", "bpe"),
        "of a trained one; 'auto': unigram, and of texts too few for it what leaves fewer tokens",
    )
    label_token: bool = key(False, FLAG, "a reserved symbol before label texts")
    prompts: str = key(
        "varied", TEXT, "of label texts: a set of data/prompts.py, or a text file, one a line"
    )
    augment: str = key(
        "none",
        choice("none", "crop", "inception", "drawing", "randaugment"),
        "of training images, see docs/data.md",
    )
    randaugment: tuple[int, float] = key(
        (2, 10), RANDAUGMENT, "its operations one after another, their magnitude 0 to 30"
    )
    augmentations: int = key(
        0,
        whole(0, 65_536, "augmentations"),
        "of an image, drawn once, of which each visit takes one; 0: a new one at each visit",
    )
    flip: bool = key(False, FLAG, "random left-right flip")
    resize: str = key(
        "squash",
        choice("squash", "crop", "trim", "native"),
        "evaluation and plain resize; 'crop': the shortest side fits, the rest goes; 'trim': plain "
        "margins go, as around drawings; 'native': images keep their aspect ratio, in as many "
        "patches as fit max_patches",
    )
    max_patches: int = key(
        0, whole(0, 65_025, "patches"), "of resize='native'; 0: as many as a square image has"
    )
    fast_resize: bool = key(False, FLAG, "cheaper JPEG decoding and resize, still antialiased")
    num_frames: int = key(0, whole(0, 4096, "frames"), "of clips, sampled uniformly; 0: images")
    frame_jitter: bool = key(
        False, FLAG, "sample anywhere in each segment of a clip, not its middle"
    )
    max_bad_fraction: float = key(
        0.05, number(0, 1), "Largest share of damaged images among those read (at least 100)."
    )
    num_threads: int = key(0, whole(0, 4096, "threads"), "that decode; 0: one per core")
    features: str = key(
        "",
        TEXT,
        "a folder that keeps the tokens of a frozen image encoder, of one process; '': computed "
        "each time",
    )
    features_gib: float = key(
        100.0, number(0, 1e9, "GiB", above=True), "of each source that may be kept there"
    )
    loader: str = key(
        "direct", choice("direct", "seqio"), "'seqio' needs the extra 'seqio'; equal batches"
    )
