"""Vocabularies: reserved ids, rows of a batch, any text there and back."""

import io
import itertools
import random
import threading
import time
import types

import numpy as np
import pytest
import sentencepiece
from conftest import tiny

from coca_jax.config import typed
from coca_jax.data import vocabulary
from coca_jax.interop import export_format
from coca_jax.runtime import activity
from coca_jax.training import recipes, run_vocabulary

TEXTS = [f"a {colour} {thing}" for colour in ("red", "blue") for thing in ("cat", "dog", "bird")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "vocabulary.model"
    return vocabulary.train(TEXTS * 20, 400, path), path


def test_reserved_ids(trained):
    found, _ = trained
    assert (found.pad_id, found.eos_id, found.unk_id, found.bos_id, found.label_id) == tuple(
        range(5)
    )
    assert 261 < found.size <= 400


def test_any_text_survives(trained):
    found, _ = trained
    for text in ("a red cat", "Grüße, 猫 and 🐈", "x" * 50):
        assert found.decode(found.encode(text)) == text


def test_batch_rows(trained):
    found, _ = trained
    tokens, valid = found.encode_batch(["a red cat", "x" * 50], 16, [False, True])
    ids = found.encode("a red cat")
    assert tokens[0, : len(ids) + 2].tolist() == [3, *ids, 1]
    assert valid[0].sum() == len(ids) + 2 and (tokens[0][~valid[0]] == 0).all()
    assert tokens[1, :2].tolist() == [3, 4] and tokens[1, -1] == 1 and valid[1].all()
    assert found.decode(tokens[0]) == "a red cat"


def test_load_gives_the_same(trained):
    found, path = trained
    again = vocabulary.load(path)
    assert again.checksum == found.checksum and again.encode(TEXTS[0]) == found.encode(TEXTS[0])


def test_training_is_deterministic(trained, tmp_path):
    assert vocabulary.train(TEXTS * 20, 400, tmp_path / "v").checksum == trained[0].checksum


def test_the_trainer_is_chosen_by_the_data(tmp_path):
    """Words that occur once starve unigram; of many texts it finds all pieces, and is taken."""
    rng = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in "aeiou"]
    names = ["".join(rng.choices(syllables, k=5)) + " face" for _ in range(150)]
    found = {}
    for kind in vocabulary.KINDS:
        one = vocabulary.train(names, 900, tmp_path / kind, kind=kind)
        found[kind] = sum(map(len, one.encode_many(names))) / len(names), one
    assert found["unigram"][1].size < 900
    assert found["bpe"][0] < 0.8 * found["unigram"][0]
    assert found["auto"][1].checksum == found["bpe"][1].checksum
    plenty = [" ".join(rng.choices(names, k=8)) for _ in range(400)]
    checksums = {
        kind: vocabulary.train(plenty, 400, tmp_path / kind, kind=kind).checksum
        for kind in vocabulary.KINDS
    }
    assert checksums["auto"] == checksums["unigram"] != checksums["bpe"]
    with pytest.raises(ValueError, match="kind 'word': choose auto, unigram, bpe"):
        vocabulary.train(names, 400, tmp_path / "v", kind="word")


def test_errors(trained, tmp_path):
    with pytest.raises(ValueError, match="at least 300"):
        vocabulary.train(TEXTS, 100, tmp_path / "v")
    with pytest.raises(ValueError, match="no text"):
        vocabulary.train(["", "  "], 400, tmp_path / "v")
    with pytest.raises(FileNotFoundError):
        vocabulary.load(tmp_path / "absent")
    (tmp_path / "junk").write_bytes(b"junk that is no model")
    with pytest.raises(ValueError, match="neither"):
        vocabulary.load(tmp_path / "junk")
    with pytest.raises(ValueError, match="max_len"):
        trained[0].encode_batch(["a"], 2)


def test_a_process_that_waits_for_the_vocabulary_does_so_whatever_the_clock_says(
    trained, tmp_path, monkeypatch
):
    clock = itertools.count(time.time(), 7200.0)  # it is set on by two hours at each look
    monkeypatch.setattr(time, "time", lambda: next(clock))
    made = tmp_path / run_vocabulary.VOCABULARY_FILE
    writer = threading.Timer(0.3, trained[0].save, [str(made)])
    writer.start()
    config = typed(recipes.load("tiny")).change({"model.text.vocab_size": trained[0].size})
    found = run_vocabulary.load_or_train(config, str(tmp_path), process_index=1)
    writer.join()
    assert found.checksum == trained[0].checksum


def test_a_process_waits_for_a_vocabulary_whose_texts_take_hours_to_read(
    trained, tmp_path, monkeypatch
):
    clock, made = itertools.count(0.0, 5 * 3600.0), tmp_path / run_vocabulary.VOCABULARY_FILE
    stand_in = types.SimpleNamespace(
        monotonic=lambda: next(clock), sleep=lambda _: trained[0].save(str(made))
    )
    monkeypatch.setattr(activity, "time", stand_in)
    config = typed(recipes.load("tiny")).change({"model.text.vocab_size": trained[0].size})
    found = run_vocabulary.load_or_train(config, str(tmp_path), process_index=1)
    assert found.checksum == trained[0].checksum


def _byte_level(special):
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra 'hf'")
    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet
    )
    found.train_from_iterator(TEXTS * 20, trainer)
    return found


def test_tokenizer_json_with_begin_and_end(tmp_path):
    made = _byte_level(["<s>", "<pad>", "</s>", "<unk>", "<label>"])
    made.enable_truncation(2)  # settings of the file that would spoil training texts
    made.enable_padding(length=9)
    made.save(str(tmp_path / "tokenizer.json"))
    found = vocabulary.load(tmp_path / "tokenizer.json")
    ids = (found.bos_id, found.pad_id, found.eos_id, found.unk_id, found.label_id)
    assert ids == (0, 1, 2, 3, 4) and found.size == made.get_vocab_size()
    for text in ("a red cat", "Grüße, 猫 and 🐈", "x" * 50):
        assert found.decode(found.encode(text)) == text
    tokens, valid = found.encode_batch(["a red cat", "a blue dog"], 12, [True, False])
    assert tokens[0, :2].tolist() == [0, 4] and tokens[0][valid[0]][-1] == 2
    assert set(tokens[0][~valid[0]].tolist()) == {1}
    assert [found.decode(row) for row in tokens] == ["a red cat", "a blue dog"]
    found.save(tmp_path / "copy")
    assert vocabulary.load(tmp_path / "copy").checksum == found.checksum


def test_tokenizer_json_with_one_symbol_for_begin_and_end(tmp_path):
    _byte_level(["<|endoftext|>"]).save(str(tmp_path / "tokenizer.json"))
    found = vocabulary.load(tmp_path / "tokenizer.json")
    assert found.bos_id == found.eos_id == 0 and found.label_id is None
    tokens, _ = found.encode_batch(["a red cat"], 12)
    assert found.decode(tokens[0]) == "a red cat"
    _byte_level(["<x>"]).save(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="no end symbol"):
        vocabulary.load(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json"):
        vocabulary.load(tmp_path / "bad.json")


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        (dict(model_type="bpe"), (1, 2)),  # SentencePiece's own defaults: no padding symbol
        (dict(bos_id=-1, pad_id=0, eos_id=1, unk_id=2), (0, 1)),  # as T5's
        (dict(model_type="char", pad_id=3), (1, 2)),
    ],
)
def test_any_sentencepiece_file(tmp_path, options, ids):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXTS * 20),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    (tmp_path / "spm.model").write_bytes(model.getvalue())
    found = vocabulary.load(tmp_path / "spm.model")
    assert (found.bos_id, found.eos_id) == ids and found.label_id is None
    tokens, valid = found.encode_batch(["a red cat"], 16)
    assert tokens[0, 0] == ids[0] and tokens[0][valid[0]][-1] == ids[1]
    assert found.decode(tokens[0]) == "a red cat"


def test_weights_of_another_vocabulary_are_told(tmp_path, caplog):
    texts = [f"a {word} number {i}" for word in ("cat", "dog") for i in range(60)]
    (tmp_path / "weights").mkdir()
    vocabulary.train(texts, 300, str(tmp_path / "weights/vocabulary.model"), 0)
    vocabulary.train([text[::-1] for text in texts], 300, str(tmp_path / "other.model"), 0)
    config = tiny(**{"model.text.vocab_size": 320, "init_from": str(tmp_path / "weights")})

    def told(number, **changes):
        caplog.clear()
        changed = config.change({"data.vocabulary": str(tmp_path / "other.model")} | changes)
        run_vocabulary.load_or_train(changed, str(tmp_path / f"run{number}"))
        return [one.getMessage() for one in caplog.records if "init_from" in one.getMessage()]

    (line,) = told(0)
    assert f"other.model is not {tmp_path}/weights/vocabulary.model, with which" in line
    assert not told(1, **{"data.vocabulary": str(tmp_path / "weights/vocabulary.model")})
    assert not told(2, init_parts="image")


@pytest.mark.parametrize("hub", [False, True])
def test_a_run_takes_the_vocabulary_of_its_weights(trained, tmp_path, hub):
    """In the layout of the hub its file has another name."""
    words, path = trained
    place, params = str(tmp_path / "weights"), {"x": np.zeros(2, np.float32)}
    config = tiny(**{"model.text.vocab_size": words.size, "init_from": place})
    given = {"model": config.model.to_dict()}
    export_format.write_export(place, params, given, path, hub=hub)
    found = run_vocabulary.load_or_train(config, str(tmp_path / "run"))
    assert found.checksum == words.checksum
    source = dict(builtin="scenes", split="train", kind="caption", limit=40)
    changes = {"init_parts": "image", "model.text.vocab_size": 320, "data.sources": (source,)}
    alone = typed(recipes.load("tiny")).change({"init_from": place} | changes)
    of_its_own = run_vocabulary.load_or_train(alone, str(tmp_path / "alone"))
    assert of_its_own.checksum != words.checksum and of_its_own.size <= 320


def test_weights_without_their_vocabulary_are_refused(trained, tmp_path):
    (tmp_path / "weights").mkdir()
    config = tiny(**{"model.text.vocab_size": 400, "init_from": str(tmp_path / "weights")})
    with pytest.raises(ValueError, match="weights has no vocabulary beside its weights"):
        run_vocabulary.load_or_train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run/vocabulary.model").exists()
    named = config.change({"data.vocabulary": str(trained[1])})
    found = run_vocabulary.load_or_train(named, str(tmp_path / "run"))
    assert found.checksum == trained[0].checksum
