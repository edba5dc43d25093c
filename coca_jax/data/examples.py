"""The rows that one source gives to a batch, and what stands in for those that cannot be read."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging

from coca_jax.config import Config, heads
from coca_jax.data import teachers, tower_texts
from coca_jax.data.feature_cache import Tokens
from coca_jax.data.mixture import Mixture
from coca_jax.data.pixels import Pixels
from coca_jax.data.quarantine import Bad, Quarantine, undecodable
from coca_jax.data.sources.records import Record
from coca_jax.data.sources.source import UNREAD, Problem, Source, read_all, read_one
from coca_jax.data.texts import Draw, Tokenizer
from coca_jax.data.vocabulary import Vocabulary

_MOST_TRIES = 500  # examples that are tried in the place of one


class Examples:
    """What source `number` of a mixture gives, by the place in its endless stream.

    Args:
        mixture: the training data.
        number: of the source.
        config: of the run.
        vocabulary: of the run.
        pixels: decodes its images.
        class_names: of the task head, in the order of its outputs; () without one.
        quarantine: of the run.

    Attributes:
        source: the source.
        number: of it.
        pixels: decodes its images.
        quarantine: the examples that cannot be used.
        max_len: tokens that a text may have.
        reads_text: whether anything that trains reads the texts.

    Raises:
        ValueError: data.label_token is set and the vocabulary has no such symbol.
    """

    def __init__(
        self,
        mixture: Mixture,
        number: int,
        config: Config,
        vocabulary: Vocabulary,
        pixels: Pixels | Tokens,
        class_names: Sequence[str],
        quarantine: Quarantine,
    ):
        if config.data.label_token and vocabulary.label_id is None:
            raise ValueError("data.label_token: this vocabulary has no symbol for it; set false")
        self.source, self.number = mixture.sources[number], number
        self._mixture, self.pixels = mixture, pixels
        self._kind = self.source.kind
        self._classes = {name: place for place, name in enumerate(class_names)}
        self._head = config.head.kind
        self._skip_unknown = config.head.unknown == "skip"
        self.teacher_width = config.loss.teacher_width
        self.quarantine = quarantine
        self.max_len, self.reads_text = config.model.text.max_len, _reads_text(config)
        encode = functools.partial(
            self._kind.encode,
            vocabulary,
            max_len=self.max_len,
            label_token=config.data.label_token,
        )
        if config.model.family != "coca":
            encode = functools.partial(
                tower_texts.encode, vocabulary=vocabulary, model=config.model
            )
        self._tokenize = Tokenizer(encode)

    def at(self, positions: np.ndarray) -> Part:
        """The examples at these positions, int64 [n], of the source's stream."""
        indices = self._mixture.indices(self.number, positions)
        records, unread = read_all(self.source, indices)
        for row, index in enumerate(indices.tolist()):
            if found := self.quarantine.find(self.number, index):
                # Decided once: also where the file has been repaired since.
                self.quarantine.compare(self.source.name, found, records[row], row in unread)
                records[row], unread[row] = UNREAD, Problem(found.reason, found.detail)
        return Part(self, self._mixture.draw(self.number, positions), indices, records, unread)

    def check_pairs(self, records: Sequence[Record]) -> None:
        """Raises ValueError naming the first record that is no pair where pairs are wanted."""
        if self.pixels.pairs:
            for record in records:
                if not record.second and record is not UNREAD:
                    raise ValueError(
                        f"data source {self.source.name}: {record.key!r} has one image and "
                        f"head.kind={self._head!r} takes two; prepare the data with "
                        "--image_field=FIRST,SECOND"
                    )

    def texts(self, part: Part) -> tuple[list[str], list[str]]:
        """The text that each row trains on, and what tells equal ones."""
        return self._kind.choose(part.records, self._classes, part.draw)

    def tokens(self, chosen: Sequence[str], same: Sequence[str]) -> dict[str, np.ndarray]:
        """The fields of a batch that are made of what `texts` gave."""
        return self._tokenize(chosen, same)

    def marks(self, part: Part) -> dict[str, np.ndarray]:
        """The fields of a batch that are made of neither text nor pixels.

        Raises:
            ValueError: the first record that has no label among the classes of the head.
        """
        class_id = self._kind.classes_of(part.records, self._classes, part.draw)
        if self._classes and self._kind.has_classes and not self._skip_unknown:
            for record, number in zip(part.records, class_id.tolist()):
                if number < 0 and record is not UNREAD:
                    raise ValueError(
                        f"data source {self.source.name}: {record.key!r} has "
                        f"{list(record.labels)}, not among the {len(self._classes)} classes of the "
                        "head; name it in head.classes, leave the record out, or set "
                        "head.unknown='skip'"
                    )
        count = len(part.records)
        return dict(
            is_label=np.full(count, self._kind.is_label),
            class_id=class_id,
            source=np.full(count, self.number, np.int32),
            index=part.indices.copy(),
        )

    def stand_in(self, part: Part, row: int) -> np.ndarray:
        """Replaces a row of `part` that cannot be used by the example that stands at the same place
        of the source's order in the next epoch, or of that which is sound in the epoch after it:
        a function of the data and the row's place, the same on all hosts and after each resume.

        What stood behind it in its own epoch would often be in the same batch already.

        Returns:
            The pixels of the row.

        Raises:
            ValueError: hundreds of examples in a row cannot be used.
        """
        place = Draw(part.draw.seed, part.draw.source, part.draw.positions[row : row + 1])
        size = len(self.source)
        for epoch in range(1, _MOST_TRIES):
            positions = place.positions + epoch * size
            index = int(self._mixture.indices(self.number, positions)[0])
            if index in part.bad or self.quarantine.find(self.number, index):
                continue
            record, problem = read_one(self.source, index)
            if not problem:
                self.check_pairs([record])
                plan = self.pixels.plan([record], place, np.array([index]))
                pixels, failed = self.pixels.render([record], plan)
                if not failed:
                    part.records[row], part.indices[row] = record, index
                    return pixels[0]
                problem = undecodable(record, failed[0])
            part.bad[index] = Bad(record.key, *problem)
        self.quarantine.add(self.number, part.bad)
        first = self.quarantine.of_source(self.number)[0]
        raise ValueError(
            f"data source {self.source.name}: {_MOST_TRIES} examples in a row cannot be used; "
            f"first: {first.line()}. {self.quarantine.where()}"
        )


class Part:
    """Rows of one source in a batch, before their images are decoded.

    Attributes:
        draw: their random choices.
        indices: int64 [n], which record each is.
        records: n of them.
        plan: how each image is decoded (Pixels.plan).
        bad: {index: which and why} of the records that could not be used so far.
    """

    def __init__(
        self,
        examples: Examples,
        draw: Draw,
        indices: np.ndarray,
        records: list[Record],
        unread: Mapping[int, Problem],
    ):
        self._examples = examples
        self.draw, self.indices, self.records = draw, indices, records
        examples.check_pairs(records)
        self.plan = examples.pixels.plan(records, draw, indices)
        self._unread = unread
        self.bad: dict[int, Bad] = {}

    def replace(self, row: int, why: str) -> np.ndarray:
        """Puts a good record in the place of one that does not decode; its pixels."""
        index, record = int(self.indices[row]), self.records[row]
        self.bad[index] = Bad(record.key, *(self._unread.get(row) or undecodable(record, why)))
        return self._examples.stand_in(self, row)

    def fields(self) -> dict[str, np.ndarray]:
        """All fields of a batch but the pixels. Raises ValueError as `Examples.marks` does."""
        examples = self._examples
        chosen, same = examples.texts(self)
        found = examples.tokens(chosen, same) | examples.marks(self)
        if examples.teacher_width:
            found |= teachers.embeddings(self.records, chosen, examples.teacher_width)
        return found


def _reads_text(config: Config) -> bool:
    """Whether the task head or a loss reads texts; hidden patches alone are of the image."""
    head, weights = heads.head_kind(config.head.kind), config.loss.to_dict()
    of_texts = (weights[k] for k in weights if k.endswith("_weight") and k != "hidden_weight")
    return bool(head and head.reads_text) or any(of_texts)


class Lengths:
    """Looks whether many of a source's first texts are as long as a text may be: most of those were
    longer and lost their end, which no loss shows.

    Args:
        name: of the source.
        max_len: tokens that a text may have, begin and end included.
    """

    FIRST, SHARE = 512, 0.05  # texts to look at; as many of them are no chance

    def __init__(self, name: str, max_len: int):
        self._name, self._max_len = name, max_len
        self._seen = self._full = 0

    def add(self, rows: int, full: int) -> None:
        """Counts a batch's rows of the source, and those that have all of the tokens; says it in
        the log, once, where they are many."""
        if self._seen >= self.FIRST:
            return
        self._seen, self._full = self._seen + rows, self._full + full
        if self._seen >= self.FIRST and self._full > self.SHARE * self._seen:
            logging.warning(
                "%s: %d of the first %d texts fill all model.text.max_len=%d tokens, and what is "
                "longer loses its end; raise it to learn them whole",
                *(self._name, self._full, self._seen, self._max_len),
            )


class Tally:
    """Counts what a source has shown, batch after batch, and ends a run of damaged data.

    Args:
        source: the source.
        quarantine: of the run, with what was found of this source before this start.
        number: of the source.
        max_fraction: of the images read that may be damaged.
        seen: images that were read before this start, by all processes.
    """

    FIRST = 100  # images, before which nothing is judged

    def __init__(
        self, source: Source, quarantine: Quarantine, number: int, max_fraction: float, seen: int
    ):
        self._source, self._quarantine, self._number = source, quarantine, number
        self._max_fraction, self._seen = max_fraction, seen

    def add(self, rows: int, bad: Mapping[int, Bad]) -> None:
        """Counts a batch's rows of the source, and names its new bad ones in the log.

        Raises:
            ValueError: more than the tolerated share of the images read are damaged.
        """
        for found in self._quarantine.add(self._number, bad):
            logging.warning("%s: skipping %s", self._source.name, found.line())
        self._seen += rows + len(bad)
        size, rows_bad = len(self._source), self._quarantine.of_source(self._number)
        read = min(size, self._seen)
        if read < min(self.FIRST, size) or len(rows_bad) <= self._max_fraction * read:
            return
        reasons = Counter(found.reason for found in rows_bad)
        counts = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
        raise ValueError(
            f"data source {self._source.name}: {len(rows_bad)} of the {read} images read so far "
            f"cannot be used ({counts}), more than data.max_bad_fraction={self._max_fraction:g}; "
            f"first: {rows_bad[0].line()}. {self._quarantine.where()} Repair or remove them, or "
            "raise data.max_bad_fraction; the run resumes"
        )
