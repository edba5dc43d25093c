"""OpenVision and CLIPA in open_clip's layout, and MetaCLIP 2's there: files with random weights and
a tokenizer.json, against open_clip."""

import json

import numpy as np
import pytest
from quick_conversion import conversions_are_forks  # noqa: F401
from test_towers import PHOTOS, TEXTS, pixels_of, randomise, unit

import coca_jax
from coca_jax.cli import convert

torch = pytest.importorskip("torch", reason="needs the extra 'parity'")
transformers = pytest.importorskip("transformers", reason="needs the extra 'parity'")
open_clip = pytest.importorskip("open_clip", reason="needs the extra 'parity'")
tokenizers = pytest.importorskip("tokenizers", reason="needs the extra 'parity'")
pytestmark = pytest.mark.torch

WORDS = ["a", "photo", "of", "cat", "two", "dogs", "in", "park", "it", "##s", "dog", ",", "!"]
LONG = "a photo of two dogs in a park, " * 4
# A curly quote of UTF-8 read as Windows-1252, one as it is, an entity, spaces.
TO_MEND = ["a dog\u00e2\u20ac\u2122s park", "it\u2019s a  cat", "cats &amp;amp; dogs\t"]
VISION = dict(image_size=32, layers=2, width=48, patch_size=8, head_width=12)
TEXT = dict(context_length=20, vocab_size=40, width=40, heads=4, layers=2)
# As the public files have them, but for the sizes.
BERT = dict(
    hf_tokenizer_name="bert-base-uncased",
    tokenizer_kwargs=dict(strip_sep_token=True),
    pool_type="last",
    no_causal_mask=True,
)
OPENVISION = dict(
    embed_dim=24,
    vision_cfg=VISION
    | dict(no_ln_pre=True, pool_type="avg", final_ln_after_pool=True, norm_kwargs=dict(eps=1e-6)),
    text_cfg=TEXT | BERT | dict(act_kwargs=dict(approximate="tanh"), norm_kwargs=dict(eps=1e-6)),
)
CLIPA = dict(
    embed_dim=24,
    vision_cfg=VISION | dict(no_ln_pre=True, pool_type="avg", final_ln_after_pool=True),
    text_cfg=TEXT | BERT,
)
SQUASHED = dict(
    mean=[0.485, 0.456, 0.406],
    std=[0.229, 0.224, 0.225],
    interpolation="bilinear",
    resize_mode="squash",
)


def write_bert(folder):
    """BERT's kind of tokenizer in a folder, as its `save_pretrained` writes it."""
    words = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    wordpiece = tokenizers.BertWordPieceTokenizer(vocab=words, lowercase=True)
    transformers.BertTokenizerFast(tokenizer_object=wordpiece._tokenizer).save_pretrained(folder)


def write_xlm(folder):
    """XLM-V's kind of tokenizer in a folder: pieces, <s> before a text and </s> behind it."""
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=38, special_tokens=["<s>", "<pad>", "</s>", "<unk>"], unk_token="<unk>"
    )
    made = tokenizers.Tokenizer(tokenizers.models.Unigram())
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.decoder = tokenizers.decoders.Metaspace()
    made.train_from_iterator([*TEXTS, LONG], trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    transformers.XLMRobertaTokenizerFast(tokenizer_object=made).save_pretrained(folder)


def in_open_clip(folder, cfg, write, preprocess=None):
    """(a random model of open_clip, its own tokens of texts); both are in the folder."""
    model = randomise(open_clip.CLIP(**cfg))
    folder.mkdir()
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    whole = dict(model_cfg=cfg) | (dict(preprocess_cfg=preprocess) if preprocess else {})
    (folder / "open_clip_config.json").write_text(json.dumps(whole))
    write(folder)
    return model, open_clip.tokenizer.HFTokenizer(
        str(folder),
        context_length=cfg["text_cfg"]["context_length"],
        **cfg["text_cfg"].get("tokenizer_kwargs", {}),
    )


@pytest.mark.parametrize("cfg", [OPENVISION, CLIPA], ids=["OpenVision", "CLIPA"])
def test_pixels_and_texts_give_the_embeddings_of_open_clip(cfg, tmp_path):
    original, words = in_open_clip(tmp_path / "weights", cfg, write_bert, SQUASHED)
    config, layout = convert.from_open_clip(str(tmp_path / "weights"), str(tmp_path / "out"))
    assert len(layout.tensors()) == len(original.state_dict())
    assert config["model"]["family"] == "openvision"
    assert config["preprocess"]["resize"] == "squash"
    model = coca_jax.load(str(tmp_path / "out"))
    texts = [*TEXTS, LONG]
    tokens, valid = model._tokenize(texts)
    np.testing.assert_array_equal(tokens, words(texts))
    np.testing.assert_array_equal(model._tokenize(TO_MEND)[0], words(TO_MEND))
    assert tokens[-1, -1] == 0 and valid.sum(1).tolist() == [6, 8, 2, 8, 19]
    with torch.no_grad():
        images = original.encode_image(pixels_of(model))
        wanted = original.encode_text(words(texts))
    np.testing.assert_allclose(model.encode_image(PHOTOS), unit(images), atol=1e-5)
    np.testing.assert_allclose(model.encode_text(texts), unit(wanted), atol=1e-5)
    np.testing.assert_allclose(model.params["log_scale"]["value"], original.logit_scale.item())


def test_metaclip_2_of_open_clip_is_pooled_at_its_tokenizers_end(tmp_path):
    cfg = dict(embed_dim=24, quick_gelu=True, vision_cfg=VISION)
    cfg["text_cfg"] = TEXT | dict(
        hf_tokenizer_name="facebook/xlm-v-base", pool_type="eos", eos_id=2
    )
    original, words = in_open_clip(tmp_path / "weights", cfg, write_xlm)
    model = coca_jax.load(str(tmp_path / "weights"))
    texts = [*TEXTS, LONG]
    tokens, valid = model._tokenize(texts)
    wanted = words(texts).numpy()
    np.testing.assert_array_equal(tokens[valid], wanted[:, : tokens.shape[1]][valid])
    mended, sees = model._tokenize(TO_MEND)
    np.testing.assert_array_equal(mended[sees], words(TO_MEND).numpy()[:, : mended.shape[1]][sees])
    assert (wanted == 1).sum() == (~valid).sum() + 4 * (20 - tokens.shape[1])
    with torch.no_grad():
        embeddings = original.encode_text(torch.from_numpy(wanted))
    np.testing.assert_allclose(model.encode_text(texts), unit(embeddings), atol=1e-5)
    file = tmp_path / "weights" / "open_clip_config.json"
    cfg["text_cfg"]["eos_id"] = 3
    file.write_text(json.dumps(dict(model_cfg=cfg)))
    with pytest.raises(ValueError, match="pooled at the id 3, and this tokenizer ends them with 2"):
        convert.from_open_clip(str(tmp_path / "weights"), str(tmp_path / "other"))


@pytest.mark.parametrize(
    "part,key,value,said",
    [
        ("vision_cfg", "final_ln_after_pool", False, "vision_cfg.final_ln_after_pool=False"),
        ("vision_cfg", "pool_type", "none", "vision_cfg.pool_type='none'"),
        ("text_cfg", "pool_type", "first", "text_cfg.pool_type='first'"),
        ("text_cfg", "no_causal_mask", False, "text_cfg.no_causal_mask=False"),
        ("text_cfg", "tokenizer_kwargs", {}, "text_cfg.tokenizer_kwargs={}"),
        (
            *("text_cfg", "tokenizer_kwargs", dict(strip_sep_token=True, clean="canonicalize")),
            "text_cfg.tokenizer_kwargs.clean='canonicalize'; only 'whitespace' here",
        ),
        ("text_cfg", "norm_kwargs", {"bias": False}, "text_cfg.norm_kwargs={'bias': False}"),
        (
            "text_cfg",
            "act_kwargs",
            {"approximate": "x"},
            "text_cfg.act_kwargs={'approximate': 'x'}",
        ),
        ("text_cfg", "layers", 0, "text_cfg.layers=0"),
    ],
)
def test_other_arrangements_are_refused_by_name(part, key, value, said, tmp_path):
    cfg = OPENVISION | {part: OPENVISION[part] | {key: value}}
    (tmp_path / "open_clip_pytorch_model.bin").write_bytes(b"")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=cfg)))
    from coca_jax.interop import towers_config

    with pytest.raises(ValueError) as error:
        towers_config.find(str(tmp_path / "open_clip_pytorch_model.bin"))
    assert said in str(error.value)
