"""Vocabularies: reserved ids, rows of a batch, any text there and back."""

import pytest

from coca_jax.data import vocabulary

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
