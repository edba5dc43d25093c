"""What every vocabulary offers: text to token ids and back."""

from __future__ import annotations

import abc
import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from absl import logging

from coca_jax.runtime import storage

LABEL_SYMBOL = "<label>"


class Vocabulary(abc.ABC):
    """What every vocabulary offers.

    Attributes:
        size: number of ids; a model needs at least as many.
        pad_id, bos_id, eos_id, unk_id: reserved ids.
        label_id: the symbol before label texts, or None where the vocabulary has none to spare.
        hidden_id: an id that is not valid wherever it stands in a caption, or None.
        checksum: sha256 of the file, hexadecimal: binds a checkpoint to its vocabulary.
    """

    size: int
    pad_id: int
    bos_id: int
    eos_id: int
    unk_id: int
    label_id: int | None
    hidden_id: int | None = None
    checksum: str
    data: bytes

    @abc.abstractmethod
    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without begin and end."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids: stops at the end symbol, drops the other special symbols."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without begin and end."""
        return self.encode_many([text])[0]

    def encode_batch(
        self, texts: Sequence[str], max_len: int, is_label: Sequence[bool] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Texts as rows [bos, (label), text..., eos, pad...]; a long text is cut, eos stays.

        Args:
            texts: N texts.
            max_len: L, at least 3.
            is_label: which rows get the label symbol after bos; None: none of them.

        Returns:
            tokens int32 [N, L]; valid bool [N, L], true from bos to eos, but where an id is hidden.

        Raises:
            ValueError: the label symbol is asked for and the vocabulary has none.
        """
        if is_label is not None and any(is_label) and self.label_id is None:
            raise ValueError("data.label_token: this vocabulary has no symbol for it; set false")
        if max_len < 3:
            raise ValueError(f"max_len {max_len}: begin, end and a token need at least 3")
        tokens = np.full((len(texts), max_len), self.pad_id, np.int32)
        lengths = np.zeros(len(texts), np.int64)
        for row, ids in enumerate(self.encode_many(texts)):
            head = [self.bos_id]
            if is_label is not None and is_label[row]:
                head.append(self.label_id)  # type: ignore[arg-type]
            full = head + ids[: max_len - len(head) - 1] + [self.eos_id]
            tokens[row, : len(full)] = full
            lengths[row] = len(full)
        return tokens, self.valid(tokens, lengths)

    def encode_question(self, question: str, max_len: int) -> list[int]:
        """Begin symbol and question, cut so that an answer of max_len / 8 tokens fits behind it,
        with its end symbol at least 3."""
        return [self.bos_id, *self.encode(question)][: max_len - max(3, max_len // 8)]

    def encode_answers(
        self, questions: Sequence[str], answers: Sequence[str], max_len: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows [bos, question..., answer..., eos, pad...], each part encoded by itself, so that
        the row begins as the question alone does.

        Returns:
            tokens int32 [N, L]; valid bool [N, L]; length of the part before the answer, int32 [N].
        """
        tokens = np.full((len(questions), max_len), self.pad_id, np.int32)
        lengths, prompts = (np.zeros(len(questions), np.int32) for _ in range(2))
        for row, answer in enumerate(self.encode_many(answers)):
            prompt = self.encode_question(questions[row], max_len)
            full = prompt + answer + [self.eos_id]
            if len(full) > max_len:
                logging.log_first_n(
                    logging.WARNING,
                    "model.text.max_len=%d cuts the answer %r to %r: %d tokens are wanted",
                    *(3, max_len, answers[row], questions[row], len(full)),
                )
                full = full[: max_len - 1] + [self.eos_id]
            tokens[row, : len(full)] = full
            lengths[row], prompts[row] = len(full), len(prompt)
        return tokens, self.valid(tokens, lengths), prompts

    def valid(self, tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """bool [N, L] of rows [N, L] with texts of these lengths [N]: true in them, but where an id
        is hidden."""
        there = np.arange(tokens.shape[1]) < lengths[:, None]
        return there if self.hidden_id is None else there & (tokens != self.hidden_id)

    def __reduce__(self) -> tuple[Any, ...]:
        """As `pickle` takes it, for another process: made anew of its file's bytes."""
        return type(self), (self.data,)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file that it was loaded from, byte for byte, at once or not at all."""
        storage.write_bytes(path, self.data)
