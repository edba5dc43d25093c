"""A tokenizer.json of Hugging Face as a vocabulary."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Sequence

from coca_jax.data.vocabulary.base import LABEL_SYMBOL, Vocabulary
from coca_jax.runtime import extras


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
        ids_to_eos = list(itertools.takewhile(lambda i: i != self.eos_id, rest))
        return self._tokenizer.decode(ids_to_eos, skip_special_tokens=True)
