"""Text to token ids and back, for the tokenizers that a model may come with. No TensorFlow."""

from __future__ import annotations

import abc
import hashlib
import io
import itertools
import os
import re
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece
from absl import logging

from coca_jax import extras, storage
from coca_jax.data import files

LABEL_SYMBOL = "<label>"
KINDS = ("unigram", "bpe")  # of SentencePiece, which `train` makes
MAX_BYTES = 256 << 20  # of a vocabulary's file


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
            tokens int32 [N, L]; valid bool [N, L], true from bos to eos.

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
        return tokens, np.arange(max_len)[None, :] < lengths[:, None]

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
        return tokens, np.arange(max_len)[None, :] < lengths[:, None], prompts

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file that it was loaded from, byte for byte, at once or not at all."""
        storage.write_bytes(path, self.data)


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
        kept = []
        for token in ids:
            if token == self.eos_id:
                break
            if int(token) not in self._special:
                kept.append(int(token))
        return self._model.decode(kept)


class HfTokenizer(Vocabulary):
    """A tokenizer.json of Hugging Face. Needs the package `tokenizers`.

    Raises:
        ValueError: the package is missing, or the file is no tokenizer with begin and end symbols.
    """

    _BEGIN = ("<s>", "<|startoftext|>", "[CLS]", "<bos>", "<|begin_of_text|>", "<start_of_text>")
    _END = ("</s>", "<|endoftext|>", "[SEP]", "<eos>", "<|end_of_text|>", "<end_of_text>")
    _PAD = ("<pad>", "[PAD]", "<|pad|>")
    _UNKNOWN = ("<unk>", "[UNK]")

    def __init__(self, data: bytes):
        try:
            import tokenizers
        except ImportError:
            raise ValueError(f"a tokenizer.json needs tokenizers: {extras.remedy('hf')}") from None
        self.data = data
        self.checksum = hashlib.sha256(data).hexdigest()
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(data.decode())
            self._tokenizer.no_padding()
            self._tokenizer.no_truncation()
            ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
            self._tokenizer.encode("a word", add_special_tokens=False)
        except BaseException as error:  # its own type; a panic of its library is no Exception
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            raise ValueError(f"tokenizer.json: {error}") from None
        self.size = max(ids, default=-1) + 1  # the ids of some files have gaps
        end = self._find(self._END)
        if end is None:
            raise ValueError(f"tokenizer.json: no end symbol (one of {', '.join(self._END)})")
        self.eos_id = end
        self.bos_id = self._find(self._BEGIN, end)
        self.pad_id = self._find(self._PAD, 0)
        self.unk_id = self._find(self._UNKNOWN, self.pad_id)
        self.label_id = self._find((LABEL_SYMBOL,))

    def _find(self, symbols: Sequence[str], default: int | None = None) -> int:
        found = (self._tokenizer.token_to_id(symbol) for symbol in symbols)
        return next((i for i in found if i is not None), default)  # type: ignore[return-value]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def decode(self, ids: Iterable[int]) -> str:
        rest = [int(i) for i in ids]
        if rest[:1] == [self.bos_id]:  # may be the end symbol as well
            rest = rest[1:]
        kept = list(itertools.takewhile(lambda i: i != self.eos_id, rest))
        return self._tokenizer.decode(kept, skip_special_tokens=True)


def load(path: str | os.PathLike[str]) -> Vocabulary:
    """Loads a vocabulary; the content of the file says which kind it is.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a vocabulary that is known.
    """
    data = files.read_bounded(os.fspath(path), MAX_BYTES)
    if data[:2] == b"\x1f\x8b":
        from coca_jax.interop.clip_bpe import ClipBpe

        return ClipBpe(data)
    if data[:1] == b"{":
        return HfTokenizer(data)
    try:
        return SentencePiece(data)
    except RuntimeError:
        raise ValueError(
            f"vocabulary {os.fspath(path)}: neither a SentencePiece model, a tokenizer.json nor "
            "CLIP's merges (.txt.gz)"
        ) from None


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
        that occur once or twice: of few texts it leaves fewer tokens.

    Raises:
        ValueError: `size` leaves no room for the bytes and symbols or for the characters of the
            texts, or there is no text; an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"vocabulary of kind {kind!r}: choose {' or '.join(KINDS)}")
    if size < 300:
        raise ValueError(f"vocabulary size {size}: 256 bytes and the symbols need at least 300")
    sentences = [" ".join(text.split()) for text in texts]
    sentences = [text for text in sentences if text]
    if not sentences:
        raise ValueError("vocabulary: no text to train on; does the data have captions or labels?")
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
                f"vocabulary size {size} is too small for the characters of these texts; set "
                f"model.text.vocab_size={asked[2]} or more"
            ) from None
        raise ValueError(f"vocabulary of {size} pieces cannot be trained: {error}") from None
    vocabulary = SentencePiece(model.getvalue())
    vocabulary.save(path)
    return vocabulary
