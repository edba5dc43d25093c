import gzip
import itertools
import json
import pathlib
import random
import unicodedata

import numpy as np
import open_clip_cases as cases
import pytest

from coca_jax.data import vocabulary as vocabulary_room
from coca_jax.data.vocabulary import clip_bpe
from coca_jax.data.vocabulary.clip_bpe import ClipBpe

GOLDEN = pathlib.Path(__file__).parent / "golden/open_clip.npz"


@pytest.fixture(scope="module")
def vocabulary():
    return ClipBpe(cases.small_merges())


def test_ids_equal_open_clip(vocabulary):
    pytest.importorskip("ftfy")
    golden = np.load(GOLDEN)["tokens"]
    tokens, valid = vocabulary.encode_batch(cases.TEXTS, golden.shape[1])
    np.testing.assert_array_equal(tokens, golden)
    np.testing.assert_array_equal(valid, golden != 0)
    assert tokens.dtype == np.int32 and tokens[-1, -1] == vocabulary.eos_id


def test_sizes_and_special_ids(vocabulary):
    assert vocabulary.size == 512 + len(cases.MERGES) + 2
    assert (vocabulary.bos_id, vocabulary.eos_id) == (vocabulary.size - 2, vocabulary.size - 1)
    assert vocabulary.pad_id == 0 and vocabulary.label_id is None
    assert vocabulary.encode("!!")[0] == 0  # the first byte symbol is also the padding
    assert vocabulary.encode("the dog") == [512 + 2, 512 + 11]


def test_decode_undoes_encode(vocabulary):
    ids = [vocabulary.bos_id, *vocabulary.encode("A photo, of the DOG!"), vocabulary.eos_id, 5]
    assert vocabulary.decode(ids) == "a photo , of the dog !"
    assert vocabulary.decode([]) == ""


def test_a_label_symbol_is_refused(vocabulary):
    with pytest.raises(ValueError, match="label_token"):
        vocabulary.encode_batch(["a"], 8, [True])


def test_text_that_needs_ftfy_says_so_without_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ftfy", None)
    assert clip_bpe.clean("  Plain ASCII, <b>!  ") == "plain ascii, <b>!"
    for text in ("caf\u00e9", "a &amp; b", "a\tb\x00"):
        with pytest.raises(ValueError, match="pip install ftfy"):
            clip_bpe.clean(text)


def test_finding_the_merges(tmp_path, vocabulary):
    given = tmp_path / "given.gz"
    given.write_bytes(cases.small_merges())
    assert clip_bpe.find_merges(tmp_path / "empty", str(given)) == cases.small_merges()
    beside = tmp_path / "beside"
    beside.mkdir()
    ids = {symbol: i for i, symbol in enumerate(vocabulary._symbols[:-2])}
    ids |= {"<|startoftext|>": vocabulary.bos_id, "<|endoftext|>": vocabulary.eos_id}
    for merges in (cases.MERGES, [m.split() for m in cases.MERGES]):
        model = dict(type="BPE", vocab=ids, merges=merges)
        (beside / "tokenizer.json").write_text(json.dumps(dict(model=model)))
        found = ClipBpe(clip_bpe.find_merges(beside))
        assert found._symbols == vocabulary._symbols
    ids["th"] = 3
    (beside / "tokenizer.json").write_text(json.dumps(dict(model=model)))
    with pytest.raises(ValueError, match="'th' has another id"):
        clip_bpe.find_merges(beside)
    (beside / clip_bpe.FILE_NAME).write_bytes(b"not gzip")
    with pytest.raises(ValueError, match="not a gzip file"):
        clip_bpe.find_merges(beside)


@pytest.mark.parametrize(
    "text, message",
    [
        ("header\na b\nth \u4e2d\n", "'\u4e2d' is no symbol of bytes"),
        ("header\na b c\n", "two symbols a line"),
        ("header\n", "two symbols a line"),
        ("x" * (clip_bpe.MAX_BYTES + 1), "more than"),
    ],
)
def test_merges_that_are_none(text, message):
    with pytest.raises(ValueError, match=message):
        clip_bpe.parse_merges(gzip.compress(text.encode(), compresslevel=1))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 5000,
        "[]",
        '{"model": 1}',
        '{"model": {"merges": [1], "vocab": {}}}',
        '{"model": {"merges": [["a"]], "vocab": {}}}',
        '{"model": {"merges": [["a", 1]], "vocab": {}}}',
        '{"model": {"merges": [["a", "b"]], "vocab": [1]}}',
        '{"model": {"merges": [["a", "\\ud800"]], "vocab": {}}}',
    ],
)
def test_a_tokenizer_json_that_is_none(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="tokenizer.json: not a|two symbols a line"):
        clip_bpe.find_merges(tmp_path)


def test_a_merges_file_that_is_none_is_named(tmp_path):
    file = tmp_path / clip_bpe.FILE_NAME
    for data in (b"\x1f\x8b no", gzip.compress("#v\n\u2603 \u2603\n".encode())):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=f"^{file}: vocabulary: "):
            clip_bpe.find_merges(tmp_path)


def test_clips_own_merges_come_with_the_package(tmp_path):
    found = vocabulary_room.load(clip_bpe.__file__.replace("clip_bpe.py", clip_bpe.FILE_NAME))
    assert found.data == clip_bpe.find_merges(tmp_path)
    assert (found.size, found.bos_id, found.eos_id) == (49408, 49406, 49407)
    assert found.encode("a photo of a cat") == [320, 1125, 539, 320, 2368]  # as CLIP's
    assert found.decode(found.encode("It's 2 cats!")) == "it 's 2 cats !"
    with pytest.raises(FileNotFoundError, match="none.gz"):
        clip_bpe.find_merges(tmp_path, str(tmp_path / "none.gz"))


@pytest.mark.torch
def test_ids_equal_open_clip_with_its_own_merges():
    open_clip = pytest.importorskip("open_clip")
    ours = ClipBpe(clip_bpe.find_merges("."))
    theirs = open_clip.get_tokenizer("coca_ViT-B-32")
    assert (ours.size, ours.bos_id, ours.eos_id) == (49408, 49406, 49407)
    rng = random.Random(0)
    texts = [*cases.TEXTS, "word " * 100, "a" * 500]
    for _ in range(1000):
        ranges = [(32, 126), (32, 126), (0, 0x24F), (0, 0x2FFF), (0xE000, 0x1F9FF)]
        text = "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(1, 30)))
        # Characters newer than Python's Unicode tables may be classed otherwise.
        texts.append("".join(c for c in text if unicodedata.category(c) != "Cn"))
    for _ in range(1000):
        alphabet = "abcdefg'! <>&;_-.0123STREVLMD"
        texts.append("".join(rng.choice(alphabet) for _ in range(rng.randint(0, 40))))
    tokens, valid = ours.encode_batch(texts, theirs.context_length)
    np.testing.assert_array_equal(tokens, theirs(texts).numpy())
    assert (valid == (tokens != 0)).all()


def _merged_by_definition(pieces, ranks):
    """Byte-pair merging as it is defined (Sennrich et al. 2016, Algorithm 1): in each round all of
    the best pair there is."""
    while True:
        pairs = [pair for pair in zip(pieces, pieces[1:]) if pair in ranks]
        if not pairs:
            return pieces
        best = min(pairs, key=ranks.get)
        merged, at = [], 0
        while at < len(pieces):
            both = tuple(pieces[at : at + 2]) == best
            merged.append("".join(best) if both else pieces[at])
            at += 2 if both else 1
        pieces = merged


def test_merging_is_what_it_is_defined_as_and_quick_for_words_of_any_length():
    rng = random.Random(0)
    for _ in range(400):
        symbols, merges = list("abc"), []
        for _ in range(rng.randrange(12)):
            merges.append((rng.choice(symbols), rng.choice(symbols)))
            symbols.append("".join(merges[-1]))
        rng.shuffle(merges)  # a file of a stranger's may use a symbol before it is made
        ranks = {pair: number for number, pair in enumerate(merges)}
        word = rng.choices("abc", k=rng.randrange(1, 40))
        assert clip_bpe._merged(word, ranks) == _merged_by_definition(word, ranks)
    letters = "abcdefghijklmnopqrstuvwxyz"
    ranks = {pair: n for n, pair in enumerate(itertools.product(letters, repeat=2))}
    looked_up = 0

    class Counted(dict):
        def get(self, pair):
            nonlocal looked_up
            looked_up += 1
            return super().get(pair)

    word = rng.choices(letters, k=10_000)
    clip_bpe._merged(word, Counted(ranks))
    assert looked_up < 6 * len(word)  # with a look at all pairs in each round: 500 times each
