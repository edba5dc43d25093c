"""The byte-pair tokenizer of CLIP and open_clip: lower-cased text to ids and back."""

from __future__ import annotations

import functools
import gzip
import hashlib
import heapq
import html
import json
import os
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Sequence

from coca_jax.data.sources import files
from coca_jax.data.vocabulary.base import Vocabulary

FILE_NAME = "bpe_simple_vocab_16e6.txt.gz"  # CLIP's, 49,408 ids; here as open_clip ships it
SPECIAL = ("<start_of_text>", "<end_of_text>")
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
MAX_MERGES = 49152 - 256 - 2  # the file holds more; CLIP uses these
HEADER = "bpe_simple_vocab"
WORD_END = "</w>"
MAX_BYTES = 64 << 20  # of merges; CLIP's file has 3 million, a large tokenizer.json 30


class ClipBpe(Vocabulary):
    """CLIP's tokenizer from its merges file (gzip; a first line, then a merge a line).

    Padding is id 0, which is also the token "!": as in open_clip, `valid` is false wherever the id
    is 0, inside a caption too.

    Raises:
        ValueError: `data` is not such a file.
    """

    label_id = None
    pad_id = hidden_id = 0

    def __init__(self, data: bytes):
        self.data = data
        self.checksum = hashlib.sha256(data).hexdigest()
        merges = parse_merges(data)
        symbols = list(_byte_symbols().values())
        symbols += [symbol + WORD_END for symbol in symbols]
        symbols += [first + second for first, second in merges]
        symbols += SPECIAL
        self._ids = {symbol: index for index, symbol in enumerate(symbols)}
        self._symbols = symbols
        self._ranks = {merge: rank for rank, merge in enumerate(merges)}
        self._bytes = {symbol: byte for byte, symbol in _byte_symbols().items()}
        self.size = len(symbols)
        self.bos_id, self.eos_id = self.size - 2, self.size - 1
        self.unk_id = self.pad_id  # never produced: every byte has a symbol
        self._word_ids = functools.lru_cache(maxsize=1 << 16)(self._encode_word)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without begin and end; the text is cleaned and lower-cased first."""
        return [[i for word in split(clean(text)) for i in self._word_ids(word)] for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids: stops at the end symbol, drops begin; words are separated by spaces."""
        text = ""
        for token in ids:
            if token == self.eos_id:
                break
            if token != self.bos_id:
                text += self._symbols[int(token)]
        data = bytearray(self._bytes[symbol] for symbol in text)
        return data.decode("utf-8", errors="replace").replace(WORD_END, " ").strip()

    def _encode_word(self, word: str) -> tuple[int, ...]:
        if word in SPECIAL:
            return (self._ids[word],)
        symbols = _byte_symbols()
        pieces = [symbols[byte] for byte in word.encode("utf-8")]
        pieces[-1] += WORD_END
        return tuple(self._ids[piece] for piece in _merged(pieces, self._ranks))


def parse_merges(data: bytes) -> list[tuple[str, str]]:
    """The merges of a file, best first, as many as CLIP uses.

    Raises:
        ValueError: not a gzip file of merges.
    """
    try:
        unpacker = zlib.decompressobj(wbits=31)  # of gzip
        unpacked = unpacker.decompress(data, MAX_BYTES + 1)
        if len(unpacked) > MAX_BYTES or not unpacker.eof:
            raise ValueError(f"cut short, or more than {MAX_BYTES} bytes of merges")
        lines = unpacked.decode("utf-8").split("\n")[1 : MAX_MERGES + 1]
    except (ValueError, zlib.error) as error:
        raise ValueError(f"vocabulary: not a gzip file of byte-pair merges ({error})") from None
    merges = [tuple(line.split()) for line in lines if line]
    if not merges or any(len(merge) != 2 for merge in merges):
        raise ValueError("vocabulary: not byte-pair merges, two symbols a line")
    known = set(_byte_symbols().values())
    for symbol in (symbol for merge in merges for symbol in merge):
        if not known.issuperset(symbol):
            raise ValueError(f"vocabulary: {symbol[:40]!r} is no symbol of bytes, as merges join")
    return merges  # type: ignore[return-value]


def find_merges(beside: str | os.PathLike[str], given: str = "") -> bytes:
    """The merges file: `given`, or in the folder `beside` (the file itself, or a Hugging Face
    tokenizer.json), or CLIP's own, which comes with this package.

    Raises:
        FileNotFoundError: no such file as `given`.
        ValueError: the file found is not one.
    """
    if given:
        data = files.read_bounded(given, MAX_BYTES)
        return (
            _from_tokenizer_json(data, given) if given.endswith(".json") else _checked(data, given)
        )
    for name in (FILE_NAME, "vocabulary.bpe.gz", "tokenizer.json"):
        path = os.path.join(beside, name)
        if os.path.isfile(path):
            return find_merges(beside, path)
    return files.read_bounded(os.path.join(os.path.dirname(__file__), FILE_NAME), MAX_BYTES)


def clean(text: str) -> str:
    """open_clip's cleaning for this vocabulary: `mend`, and lower case. Raises as `mend`."""
    return mend(text).lower()


def mend(text: str) -> str:
    """open_clip's repair of mojibake and HTML entities, with single spaces.

    Raises:
        ValueError: the text needs repair by ftfy, which is not installed. Printable ASCII without
            '&' is never changed by it and does not need it.
    """
    if not (text.isascii() and text.isprintable() and "&" not in text):
        try:
            import ftfy
        except ImportError:
            raise ValueError(
                f"the text {text[:40]!r} needs the package ftfy for open_clip's cleaning: "
                "pip install ftfy"
            ) from None
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


def split(text: str) -> Iterator[str]:
    """Words of a cleaned text: special symbols, contractions, runs of letters, single digits, runs
    of anything else but spaces. What is a letter is Unicode's, in Python's version of it."""
    folded = text.replace("\u017f", "s")  # the one letter that CLIP's pattern takes for an s
    at = 0
    while at < len(text):
        for symbol in SPECIAL + CONTRACTIONS:
            if folded.startswith(symbol, at):
                end = at + len(symbol)
                break
        else:
            kind, end = _kind(text[at]), at + 1
            if kind in "LO":
                while end < len(text) and _kind(text[end]) == kind:
                    end += 1
            if kind == "S":
                at = end
                continue
        yield text[at:end]
        at = end


@functools.lru_cache(maxsize=1 << 16)
def _kind(character: str) -> str:
    """'L' letter, 'N' number, 'S' space, 'O' other."""
    # The iota subscript is a mark whose upper case is a letter; CLIP's pattern skips it.
    if character.isspace() or character == "\u0345":
        return "S"
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "O"


@functools.lru_cache(maxsize=1)
def _byte_symbols() -> dict[int, str]:
    """A printable character for each byte, in the order of CLIP's ids: printable Latin-1 stands for
    itself, the other bytes are characters from U+0100 on."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {b: chr(b) for b in own} | {b: chr(256 + n) for n, b in enumerate(others)}


def _merged(pieces: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """The pieces of a word after all merges: in each round those of the best pair that there is,
    from left to right. A heap of places keeps a word of n bytes to n log n steps: strangers'
    captions have words of thousands of letters, which took ten seconds with a look at all pairs
    each round."""
    size = len(pieces)
    words: list[str | None] = list(pieces)  # None: merged into the one before
    behind, before = list(range(1, size + 1)), list(range(-1, size - 1))

    def rank(at: int) -> int | None:
        if at < 0 or words[at] is None or behind[at] == size:
            return None
        return ranks.get((words[at], words[behind[at]]))  # type: ignore[arg-type]

    heap = [(found, at) for at in range(size) if (found := rank(at)) is not None]
    heapq.heapify(heap)
    while heap:
        best, changed = heap[0][0], set()
        while heap and heap[0][0] == best:
            at = heapq.heappop(heap)[1]
            if rank(at) != best:
                continue  # one of the two has been merged since
            gone = behind[at]
            words[at], words[gone] = f"{words[at]}{words[gone]}", None
            behind[at] = behind[gone]
            if behind[at] < size:
                before[behind[at]] = at
            changed |= {at, before[at]}
        for at in changed:
            if (found := rank(at)) is not None:
                heapq.heappush(heap, (found, at))
    return [word for word in words if word is not None]


def _checked(data: bytes, path: str) -> bytes:
    try:
        parse_merges(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return data


def _from_tokenizer_json(data: bytes, path: str) -> bytes:
    """The merges of a Hugging Face tokenizer.json in the form of CLIP's file.

    Raises:
        ValueError: it is not CLIP's tokenizer: other merges, or ids in another order.
    """
    try:
        model = json.loads(data)["model"]
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        ids = dict(model["vocab"])
        file = packed(merges, "\n")  # so as ever: its checksum is that of the vocabulary
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path}: not a tokenizer.json of byte-pair merges: {type(error).__name__}: {error}"
        ) from None
    symbols = ClipBpe(file)._symbols[: -len(SPECIAL)]
    differ = [symbol for index, symbol in enumerate(symbols) if ids.get(symbol) != index]
    if differ:
        raise ValueError(f"{path}: not CLIP's tokenizer: {differ[0]!r} has another id")
    return file


def packed(merges: Iterable[Sequence[str]], end: str = "") -> bytes:
    """Merges, best first, as a file of CLIP's form: the same ones always give the same bytes. end:
    behind the last; a line feed there is a merge more to open_clip, which so counts other ids."""
    lines = [f'"{HEADER}"', *(" ".join(merge) for merge in merges)]
    return gzip.compress(("\n".join(lines) + end).encode(), mtime=0)
