"""SentencePiece vocabularies (Kudo and Richardson 2018): read, or trained on a run's texts."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable, Sequence

import sentencepiece
from absl import logging

from coca_jax.data.vocabulary.base import LABEL_SYMBOL, Vocabulary

KINDS = ("auto", "unigram", "bpe")  # which `train` makes


class SentencePiece(Vocabulary):
    """A SentencePiece model that has begin and end symbols."""

    def __init__(self, data: bytes):
        self.data = data
        self.checksum = hashlib.sha256(data).hexdigest()
        self._model = sentencepiece.SentencePieceProcessor()
        self._model.LoadFromSerializedProto(data)
        self.size = self._model.vocab_size()
        self.eos_id, self.unk_id = self._model.eos_id(), self._model.unk_id()
        self.pad_id = max(self._model.pad_id(), 0)
        self.bos_id = self._model.bos_id()
        if self.eos_id < 0:
            raise ValueError("vocabulary: this SentencePiece model has no end symbol")
        if self.bos_id < 0:  # T5's models have none; as there, padding begins the text
            self.bos_id = self.pad_id
        label = self._model.piece_to_id(LABEL_SYMBOL)
        self.label_id = None if label == self.unk_id else label
        self._special = {self.pad_id, self.bos_id, self.unk_id, self.label_id}

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return self._model.encode(list(texts), out_type=int, num_threads=1)

    def decode(self, ids: Iterable[int]) -> str:
        pieces = []
        for token in ids:
            if token == self.eos_id:
                break
            if int(token) not in self._special:
                pieces.append(int(token))
        return self._model.decode(pieces)


def train(
    texts: Iterable[str],
    size: int,
    path: str | os.PathLike[str],
    seed: int = 0,
    kind: str = "unigram",
) -> Vocabulary:
    """Trains a SentencePiece vocabulary with byte fallback and writes it.

    Ids 0 to 4 are padding, end, unknown, begin and the label symbol. Text too small for `size`
    pieces gives fewer.

    kind: 'unigram' (Kudo 2018), or 'bpe' (Sennrich et al. 2016), which also makes pieces of words
        that occur once or twice: of few texts it leaves fewer tokens. 'auto': unigram, unless the
        texts are too few for it, so that it finds fewer pieces than are wanted, and bpe leaves
        fewer tokens a text.

    Raises:
        ValueError: `size` leaves no room for the bytes and symbols or for the characters of the
            texts, or there is no text; an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"vocabulary of kind {kind!r}: choose {', '.join(KINDS)}")
    if size < 300:
        raise ValueError(f"vocabulary size {size}: 256 bytes and the symbols need at least 300")
    sentences = [" ".join(text.split()) for text in texts]
    sentences = [text for text in sentences if text]
    if not sentences:
        raise ValueError("vocabulary: no text to train on; does the data have captions or labels?")
    vocabulary = SentencePiece(
        _trained(sentences, size, seed, "bpe" if kind == "bpe" else "unigram")
    )
    if kind == "auto" and vocabulary.size < size:
        vocabulary = _of_few(sentences, size, seed, vocabulary)
    vocabulary.save(path)
    return vocabulary


def _of_few(sentences: list[str], size: int, seed: int, unigram: SentencePiece) -> SentencePiece:
    """Of texts too few for unigram's wanted pieces: that vocabulary, or a bpe one where it leaves
    fewer tokens a text."""
    different = sorted(set(sentences))
    bpe = SentencePiece(_trained(sentences, size, seed, "bpe"))
    tokens = {
        name: sum(map(len, one.encode_many(different))) / len(different)
        for name, one in (("unigram", unigram), ("bpe", bpe))
    }
    logging.info(
        "vocabulary: %d different texts give unigram %d of %d pieces and %.2f tokens a text, bpe "
        "%d and %.2f: the fewer tokens are taken",
        *(len(different), unigram.size, size, tokens["unigram"], bpe.size, tokens["bpe"]),
    )
    return bpe if tokens["bpe"] < tokens["unigram"] else unigram


def _trained(sentences: list[str], size: int, seed: int, kind: str) -> bytes:
    """A SentencePiece model of a kind; the same for equal arguments."""
    sentencepiece.set_random_generator_seed(seed)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type=kind,
            vocab_size=size,
            hard_vocab_limit=False,
            byte_fallback=True,
            character_coverage=0.9995,
            max_sentence_length=100_000,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=3,
            control_symbols=[LABEL_SYMBOL],
            num_threads=1,  # more of them change the result
            minloglevel=2,
        )
    except RuntimeError as error:  # its one exception for all that goes wrong
        asked = re.search(r"required_chars. (\d+) vs (\d+)", str(error))
        if asked:
            raise ValueError(
                f"vocabulary size {size} is too small for the characters of these texts; give "
                f"{asked[2]} or more (model.text.vocab_size; --size of `prepare vocabulary`)"
            ) from None
        raise ValueError(f"vocabulary of {size} pieces cannot be trained: {error}") from None
    return model.getvalue()
