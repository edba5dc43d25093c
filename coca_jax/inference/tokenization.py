"""Texts -> token ids as the programs take them, and captions back from what a decode gave."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from coca_jax.config import shapes
from coca_jax.data.vocabulary import Vocabulary


class Cuts:
    """Which texts of a call were cut. rows: whether, of each in the order in which they were read;
    max_len: what they were cut to."""

    def __init__(self) -> None:
        self.rows: list[bool] = []
        self.max_len = 0


# Of the call that is going on.
_cuts: contextvars.ContextVar[Cuts | None] = contextvars.ContextVar("cuts", default=None)


@contextlib.contextmanager
def noting_cuts() -> Iterator[Cuts]:
    """Which of the texts that are read within are cut; calls within do not warn of them."""
    found = Cuts()
    before = _cuts.set(found)
    try:
        yield found
    finally:
        _cuts.reset(before)


@contextlib.contextmanager
def warn_truncated() -> Iterator[None]:
    """Warns, once and at the end, where texts were cut within; of calls within a call the outermost
    warns. To stand over a method."""
    if _cuts.get() is not None:
        yield
        return
    with noting_cuts() as found:
        try:
            yield
        finally:
            if any(found.rows):
                warnings.warn(
                    f"{sum(found.rows)} of {len(found.rows)} texts are cut: they have more tokens "
                    f"than model.text.max_len={found.max_len} leaves room for",
                    stacklevel=4,  # whoever called the method
                )


def note_cuts(cut: Iterable[bool], max_len: int) -> None:
    """Tells the call that is going on which of some texts were cut, to `max_len` tokens."""
    if (found := _cuts.get()) is not None:
        found.rows += map(bool, cut)
        found.max_len = max_len


def check(texts: Sequence[Any], name: str = "texts", kinds: tuple[type, ...] = (str,)) -> None:
    """Raises ValueError naming the first that is none of the `kinds`, or that no file can hold."""
    for number, text in enumerate(texts):
        if not isinstance(text, kinds):
            raise ValueError(f"{name}[{number}]={text!r}: give a str")
        try:
            isinstance(text, str) and (text.isascii() or text.encode())
        except UnicodeEncodeError:
            raise ValueError(
                f"{name}[{number}]={text!r} holds half of a character (a surrogate); leave it out"
            ) from None


def listed(texts: Any, kinds: tuple[type, ...] = (str,)) -> list[Any]:
    """Texts as a list; one alone counts as a list of one. Raises ValueError as `check`."""
    if isinstance(texts, kinds):
        texts = [texts]
    elif not isinstance(texts, Iterable):
        raise ValueError(f"texts={texts!r}: give a str, or a list of them")
    texts = list(texts)
    check(texts, kinds=kinds)
    return texts


def tokenize(
    vocabulary: Vocabulary, texts: Sequence[str], max_len: int, labels: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and validity [N, L], L the smallest multiple of 16 that leaves a place of padding
    (open_clip's shifted mask reads it) or max_len. labels: with the symbol before label texts."""
    marks = [True] * len(texts) if labels else None
    tokens, valid = vocabulary.encode_batch(texts, max_len, marks)
    full = np.flatnonzero((tokens[:, -2:] != vocabulary.pad_id).any(1))  # or fit to the last token
    ids = vocabulary.encode_many([texts[int(row)] for row in full])
    room = max_len - (3 if labels else 2)
    cut = np.zeros(len(texts), bool)
    cut[full] = [len(one) > room for one in ids]
    note_cuts(cut, max_len)
    return trimmed(tokens, valid)


def trimmed(tokens: np.ndarray, valid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and validity [N, max_len], or less -> [N, L], L as in `tokenize`."""
    max_len = tokens.shape[1]
    longest = max(int(shapes.lengths(valid).max(initial=0)), 1)
    length = min(-(-(longest + 1) // 16) * 16, max_len)
    return tokens[:, :length], valid[:, :length]


def checked_ids(tokens: np.ndarray, name: str, count: int) -> np.ndarray:
    """The tokens as int32. Raises ValueError for others than whole numbers from 0 and below
    `count`, in whose place the program would read another row of the table."""
    if tokens.size and tokens.dtype.kind not in "iu":
        raise ValueError(f"{name} are {tokens.dtype}: give whole numbers, the ids of tokens")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < count:
        raise ValueError(
            f"{name} holds {tokens.min()}..{tokens.max()}; ids go from 0 to {count - 1}"
        )
    return tokens.astype(np.int32)


def known_rows(
    vocabulary: Vocabulary, ids: Sequence[Sequence[int]], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and validity [N, length] of texts whose ids are known, begin symbol first."""
    tokens = np.full((len(ids), length), vocabulary.pad_id, np.int32)
    for i, row in enumerate(ids):
        tokens[i, : len(row)] = row
    return tokens, vocabulary.valid(tokens, np.array([len(row) for row in ids]))


def questions(
    vocabulary: Vocabulary, texts: Sequence[str], max_len: int
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [N, L] of questions, L a multiple of 16 or max_len, and their lengths [N]."""
    ids = [vocabulary.encode_question(text, max_len) for text in texts]
    most = max(map(len, ids), default=0)
    full = [place for place, row in enumerate(ids) if len(row) == most]
    whole = vocabulary.encode_many([texts[place] for place in full])
    cut = np.zeros(len(texts), bool)
    cut[full] = [len(row) >= most for row in whole]
    note_cuts(cut, max_len)
    lengths = np.array([len(row) for row in ids], np.int32)
    length = min(-(-int(lengths.max()) // 16) * 16, max_len)
    tokens = np.full((len(ids), length), vocabulary.pad_id, np.int32)
    for row, known in zip(tokens, ids):
        row[: len(known)] = known
    return tokens, lengths


def validity(vocabulary: Vocabulary, tokens: np.ndarray) -> np.ndarray:
    """bool [N, L] of tokens int32 [N, L]: true up to and with the first end symbol; with CLIP's
    tokenizer, as in open_clip, at every token that is not the padding id."""
    if vocabulary.hidden_id is not None:
        return tokens != vocabulary.hidden_id
    ended = np.cumsum(tokens == vocabulary.eos_id, axis=1)
    return np.pad(ended, ((0, 0), (1, 0)))[:, :-1] == 0


class Prompts(NamedTuple):
    """How captions begin. ids: of each, begin symbol first; tokens: int32 [size, P], the same
    right-aligned, P a power of two, rows beyond them the begin symbol alone; lengths: int32
    [size]."""

    ids: list[list[int]]
    tokens: np.ndarray
    lengths: np.ndarray


def one_each(given: str | Sequence[str], count: int) -> list[str]:
    """A prompt for each of `count` images. Raises ValueError unless one for all is given, or as
    many as there are images, and as `check`."""
    if isinstance(given, str):
        check([given], "prompts")
        return [given] * count
    if not isinstance(given, Iterable):
        raise ValueError(f"prompts={given!r}: give a str for all images, or a list of them")
    given = list(given)
    if len(given) != count:
        raise ValueError(f"{len(given)} prompts for {count} images; give one for all, or one each")
    check(given, "prompts")
    return given


def check_room(vocabulary: Vocabulary, texts: Sequence[str], max_len: int, least: int) -> None:
    """Raises ValueError naming the first prompt behind which a model of max_len writes no token, or
    fewer than `least`: before the first of many images is read."""
    known = list(dict.fromkeys(texts))
    given = [text for text in known if text]
    ids_of = dict(zip(given, vocabulary.encode_many(given))) if given else {}
    for text in known:
        ids = ids_of.get(text, ())
        room = max_len - 1 - len(ids)
        if room < 1:
            named = f"{text[:60]!r}{'...' * (len(text) > 60)}"
            raise ValueError(
                f"prompt {named}: {len(ids)} tokens, and the model writes {max_len} in all, with "
                "begin and end (model.text.max_len); shorten it"
            )
        if room < least:
            raise ValueError(
                f"min_new_tokens={least}: behind a prompt of {len(ids)} tokens the model writes "
                f"{room} (model.text.max_len={max_len}); lower it"
            )


def prompts(vocabulary: Vocabulary, texts: Sequence[str], size: int) -> Prompts:
    """The prompts of a batch of `size` rows, at least as many as texts."""
    known_texts = sorted(set(texts))
    by_text = {
        text: [vocabulary.bos_id, *ids]
        for text, ids in zip(known_texts, vocabulary.encode_many(known_texts))
    }
    ids = [by_text[text] for text in texts]
    slots = 1 << (max(len(row) for row in ids) - 1).bit_length()
    tokens = np.full((size, slots), vocabulary.bos_id, np.int32)
    lengths = np.ones(size, np.int32)
    for row, known in enumerate(ids):
        tokens[row, slots - len(known) :] = known
        lengths[row] = len(known)
    return Prompts(ids, tokens, lengths)


@dataclasses.dataclass(frozen=True)
class Caption:
    """text: prompt included, without blanks at its end; log_prob: of the new tokens under the
    model, in nats; num_tokens: how many those are, the end symbol included; finished: whether the
    end symbol came; tokens: ids of prompt and new tokens, begin symbol first."""

    text: str
    log_prob: float
    num_tokens: int
    finished: bool
    tokens: tuple[int, ...] = ()


def captions(
    vocabulary: Vocabulary, prompt_ids: list[list[int]], decoded: Any, by_log_prob: bool
) -> list[list[Caption]]:
    """The captions of each image, most probable first where asked, else in the decode's order.
    Beams that found no more have no token and are left out; one stays where there is no other.

    prompt_ids: of each image, begin symbol first. decoded: `generation.driver.Captions`.
    """
    tokens, lengths, log_probs = (np.asarray(x) for x in decoded)
    written = []
    for row, known in enumerate(prompt_ids):
        found = [
            Caption(
                text=vocabulary.decode(known[1:] + new[:n].tolist()).rstrip(),
                log_prob=float(log_prob),
                num_tokens=int(n),
                finished=bool(n) and int(new[n - 1]) == vocabulary.eos_id,
                tokens=(*known, *new[:n].tolist()),
            )
            for place, (new, n, log_prob) in enumerate(
                zip(tokens[row], lengths[row], log_probs[row])
            )
            if n or not place
        ]
        if by_log_prob:
            found.sort(key=lambda caption: -caption.log_prob)
        written.append(found)
    return written


def without_halves(text: str) -> str:
    """A decoded text without bytes that are no character (U+FFFD there), in which one that was
    drawn or cut may end: data with such texts count as damaged."""
    return " ".join(text.replace("\ufffd", "").split()) if "\ufffd" in text else text
