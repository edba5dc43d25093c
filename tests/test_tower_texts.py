"""Texts of towers in transformers' layout, by the tokenizer's files beside the weights: ids and
embeddings are those of transformers' own tokenizers and models."""

import numpy as np
import pytest
from quick_conversion import conversions_are_forks  # noqa: F401
from test_openvision import write_xlm
from test_towers import TEXTS, TOWER, VISION, randomise, unit

import coca_jax
from coca_jax.data import vocabulary

torch = pytest.importorskip("torch", reason="needs the extra 'parity'")
transformers = pytest.importorskip("transformers", reason="needs the extra 'parity'")
sentencepiece = pytest.importorskip("sentencepiece")
pytestmark = pytest.mark.torch

SENTENCES = [*TEXTS, "a photo of two dogs in a park, it is a photo of a cat in a park"]
IMAGES = VISION | dict(image_size=32, patch_size=8)


def siglip(folder):
    """A random SigLIP with its own kind of pieces: no begin symbol, padding is the end symbol."""
    text = VISION | dict(vocab_size=330, max_position_embeddings=16, projection_size=48)
    config = transformers.SiglipConfig(vision_config=IMAGES, text_config=text)
    randomise(transformers.SiglipModel(config)).save_pretrained(folder)
    vocabulary.train(SENTENCES * 9, 310, str(folder / "spiece.model"), 0)
    transformers.SiglipTokenizer(str(folder / "spiece.model")).save_pretrained(folder)
    return dict(padding="max_length", max_length=16)


def siglip_2(folder):
    """A random SigLIP 2 of one resolution with Gemma's kind of pieces, lower case alone."""
    text = VISION | dict(vocab_size=300, max_position_embeddings=16, projection_size=48)
    config = transformers.SiglipConfig(vision_config=IMAGES, text_config=text)
    randomise(transformers.SiglipModel(config)).save_pretrained(folder)
    names = dict(pad="<pad>", eos="<eos>", bos="<bos>", unk="<unk>")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text.lower() for text in SENTENCES] * 9),
        model_prefix=str(folder / "gemma"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
        **{f"{name}_id": number for number, name in enumerate(names)},
        **{f"{name}_piece": piece for name, piece in names.items()},
    )
    (folder / "gemma.vocab").unlink()
    transformers.GemmaTokenizerFast(
        vocab_file=str(folder / "gemma.model"),
        padding_side="right",
        add_bos_token=False,
        add_eos_token=True,
    ).save_pretrained(folder)
    return dict(padding="max_length", max_length=16)


def metaclip_2(folder):
    """A random MetaCLIP 2 with XLM-V's kind of pieces."""
    text = TOWER | dict(vocab_size=40, max_position_embeddings=16, eos_token_id=2)
    config = transformers.MetaClip2Config(vision_config=IMAGES, text_config=text, projection_dim=24)
    randomise(transformers.MetaClip2Model(config)).save_pretrained(folder)
    write_xlm(folder)
    return dict(padding="max_length", max_length=16)


@pytest.mark.parametrize("make", [siglip, siglip_2, metaclip_2], ids=lambda make: make.__name__)
def test_ids_and_embeddings_of_texts_equal_those_of_transformers(make, tmp_path):
    how = make(tmp_path)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    original = transformers.AutoModel.from_pretrained(tmp_path).eval()
    texts = [text.lower() for text in SENTENCES] if make is siglip_2 else SENTENCES
    wanted = np.array(words(texts, truncation=True, **how).input_ids)
    model = coca_jax.load(str(tmp_path))
    with pytest.warns(UserWarning, match="1 of 2 texts are cut: .*max_len=16"):
        model.encode_text(["a", "dog " * 30])
    tokens, valid = model._tokenize(SENTENCES)
    np.testing.assert_array_equal(tokens, wanted[:, : tokens.shape[1]])
    assert valid[-1].all() and not valid[2].all()  # one is cut, one is padded
    with torch.no_grad():
        embeddings = original.get_text_features(torch.from_numpy(wanted))
    np.testing.assert_allclose(model.encode_text(SENTENCES), unit(embeddings), atol=1e-5)


def test_texts_of_siglip_2_keep_their_punctuation(tmp_path):
    siglip_2(tmp_path)
    model = coca_jax.load(str(tmp_path))
    assert model.config.model.clean == "lower"
    ids = model._tokenize(["Two dogs, in a park!"])[0][0]
    assert model.vocabulary.decode(ids) == "two dogs, in a park!"
    assert model.vocabulary.pad_id == 0 and ids[-1] == 0
