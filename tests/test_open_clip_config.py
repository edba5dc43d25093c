"""open_clip's configurations: which are read, to what sizes, and which are refused by name."""

import json
import re

import numpy as np
import open_clip_cases as cases
import pytest
from conftest import tiny_config
from conversion_cases import SMALL, shapes_of, with_keys
from ml_collections import ConfigDict

from coca_jax.cli import convert
from coca_jax.config import Model, read, typed
from coca_jax.interop import open_clip_config, pe_core
from coca_jax.interop.open_clip_weights import Layout, count


@pytest.mark.parametrize(
    "name, tensors, parameters",
    [("coca_ViT-B-32", 629, 253_560_065), ("coca_ViT-L-14", 773, 638_450_177)],
)
def test_sizes_of_the_released_models(name, tensors, parameters):
    model = read(Model, open_clip_config.to_model(open_clip_config.RELEASED[name]))
    layout = Layout(model)
    assert len(layout.tensors()) == tensors
    assert count(layout.tensors()) == count(layout.parameters()) == parameters
    assert shapes_of(model) == layout.parameters()


def test_the_later_layout_s_own_configuration_is_read():
    """coca2_ViT-B-32: coca_ViT-B-32 with two poolers and the corrected mask."""
    first = open_clip_config.RELEASED["coca_ViT-B-32"]
    fusion = first["multimodal_cfg"] | dict(attn_pooler_heads=8)
    changes = dict(
        vision_cfg=dict(attentional_pool="cascade"), text_cfg=dict(correct_cls_mask=True)
    )
    found = open_clip_config.to_model(with_keys(first, **changes) | dict(multimodal_cfg=fusion))
    model = read(Model, found)
    assert (model.pooler.kind, model.text.cls_mask) == ("cascade", "exact")
    layout = Layout(model)
    tensors = layout.tensors()
    assert "visual.proj" not in tensors and tensors["visual.ln_post.weight"] == (768,)
    assert tensors["visual.attn_pool_contrastive.query"] == (1, 512)
    assert tensors["visual.attn_pool_contrastive.attn.in_proj_weight"] == (1536, 512)
    # The second pooler (9 tensors, 4 D^2 + 9 D) for the projection; a norm of W for one of D.
    added = 9 * 512 + 4 * 512**2 - 512**2 + 2 * (768 - 512)
    assert len(tensors) == 629 + 9 - 1
    assert count(tensors) == count(layout.parameters()) == 253_560_065 + added


@pytest.mark.parametrize("pool", [True, "cascade", "parallel", False])
@pytest.mark.parametrize("quick_gelu", [True, False])
def test_every_arrangement_has_the_model_s_own_parameters(pool, quick_gelu):
    width = {} if pool else dict(width=48)
    keys = dict(attentional_pool=pool, no_ln_pre=quick_gelu) | width
    keys |= dict(patch_dropout=0.5) if quick_gelu else {}
    config = with_keys(cases.SMALL, vision_cfg=keys)
    config = config | dict(quick_gelu=quick_gelu)
    model = read(Model, open_clip_config.to_model(config))
    assert shapes_of(model) == Layout(model).parameters()
    back = open_clip_config.from_model(model)
    assert open_clip_config.to_model(back) == open_clip_config.to_model(config)


@pytest.mark.parametrize(
    "section, keys, message",
    [
        ("text_cfg", dict(hf_model_name="roberta-base"), "text_cfg.hf_model_name='roberta-base'"),
        ("text_cfg", dict(hf_tokenizer_name="t5-base"), "text_cfg.hf_tokenizer_name='t5-base'"),
        (
            "text_cfg",
            dict(tokenizer_kwargs=dict(clean="canonicalize")),
            "text_cfg.tokenizer_kwargs.clean='canonicalize'; only 'lower' here",
        ),
        ("text_cfg", dict(text_arch="modern"), "text_cfg.text_arch='modern': an unknown key"),
        ("text_cfg", dict(embed_cls=False), "text_cfg.embed_cls=False"),
        ("text_cfg", dict(pad_id=1), "text_cfg.pad_id=1"),
        ("text_cfg", dict(width=64), "text_cfg.width=64 differs from embed_dim=48"),
        (
            "vision_cfg",
            dict(attentional_pool=False),
            "text_cfg.width=48 differs from vision_cfg.width=64",
        ),
        (
            "vision_cfg",
            dict(attentional_pool=False, width=48, head_width=16, final_ln_after_pool=True),
            "final_ln_after_pool=True without attentional_pool",
        ),
        ("vision_cfg", dict(attentional_pool=1), "vision_cfg.attentional_pool=1; only true, fa"),
        ("vision_cfg", dict(scale_heads=True), "vision_cfg.scale_heads=True"),
        ("vision_cfg", dict(ls_init_value=-0.1), "vision_cfg.ls_init_value=-0.1: give a number"),
        ("text_cfg", dict(norm_kwargs=dict(bias=False)), "{'bias': False} is not supported"),
        ("text_cfg", dict(norm_kwargs=dict(eps=1)), "{'eps': 1}: give an eps from"),
        ("text_cfg", dict(act_kwargs=dict(approximate="erf")), "text_cfg.act_kwargs="),
        ("vision_cfg", dict(timm_model_name="vit"), "vision_cfg.timm_model_name='vit'"),
        ("vision_cfg", dict(image_size=[32, 64, 3]), "or height and width"),
        ("multimodal_cfg", dict(context_length=8), "multimodal_cfg.context_length=8"),
    ],
)
def test_arrangements_that_are_not_supported_are_named(section, keys, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        open_clip_config.to_model(with_keys(cases.SMALL, **{section: keys}))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.update(activation="gelu"), "model.activation='gelu' .multimodal."),
        (lambda m: m.update(norm="rms"), "model.norm='rms'"),
        (lambda m: m.update(bias=False), "model.bias=False"),
        (lambda m: m.update(gated_mlp=True), "model.gated_mlp=True"),
        (lambda m: m.update(positions="rope"), "model.positions='rope'"),
        (lambda m: m.update(norm_eps=1e-6), "model.norm_eps=1e-06 .multimodal."),
        (lambda m: m.update(qk_norm=True), "model.qk_norm_kind='rms' .image."),
        (lambda m: m.pooler.update(block=dict(norm_eps=1e-6)), "model.norm_eps=1e-06 .pooler."),
        (lambda m: m.image.update(registers=2), "model.image.registers=2"),
        (lambda m: m.text.update(kv_heads=1), "model.text.kv_heads=1"),
        (lambda m: m.text.update(cross="paper"), "model.text.cross='paper'"),
        (lambda m: m.text.update(tie_embeddings=True), "model.text.tie_embeddings=True"),
        (lambda m: m.image.update(final_norm=True), "model.image.final_norm=True"),
        (lambda m: m.image.update(conv_widths=[8, 8], conv_depths=[0, 1]), "conv_widths=.8, 8.: "),
    ],
)
def test_models_that_open_clip_cannot_hold_are_refused(change, message):
    model = ConfigDict(SMALL.to_dict())
    change(model)
    with pytest.raises(ValueError, match=message):
        open_clip_config.from_model(model)


def test_the_model_is_found_by_its_tensors_or_asked_for(tmp_path):
    shape = (50, 768)
    positions = {"visual.positional_embedding": np.broadcast_to(np.float32(0), shape)}
    found, *_ = convert._model_config(str(tmp_path / "x.bin"), "", positions)
    assert found is open_clip_config.RELEASED["coca_ViT-B-32"]
    with pytest.raises(ValueError, match="convert .* --model=CONFIG.json --out=weights"):
        convert._model_config(str(tmp_path / "x.bin"), "", {})
    with pytest.raises(FileNotFoundError, match="--model=coca_ViT-Z"):
        convert._model_config(str(tmp_path / "x.bin"), "coca_ViT-Z", {})


@pytest.mark.parametrize("key", ["interpolation", "resize_mode"])
def test_other_preprocessing_is_refused(key):
    for given in ("other", ["squash"], {"a": 1}):
        says = re.escape(f"preprocess_cfg.{key}={given!r}")
        with pytest.raises(ValueError, match=says):
            open_clip_config.read({key: given})
    with pytest.raises(
        ValueError, match="interpolation='bilinear'; of .*'shortest' only 'bicubic'"
    ):
        open_clip_config.read(dict(interpolation="bilinear"))


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_how_images_are_resized_survives_open_clip_s_file(resize):
    config = tiny_config(image_mean=(0.1, 0.2, 0.3), image_std=(0.4, 0.5, 0.6))
    model = typed(config).model
    found = open_clip_config.read(open_clip_config.write(model, resize))
    assert found == dict(resize=resize, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6])
    with pytest.raises(ValueError, match="data.resize='native', for which open_clip has no words"):
        open_clip_config.write(model, "native")


ODD = [  # keys of open_clip_config.json, what is said of them
    (dict(model_cfg=[1]), "the configuration is a list"),
    (dict(model_cfg=None), "the configuration is a NoneType"),
    (dict(vision_cfg=[1]), "has no vision_cfg"),
    (dict(vision_cfg=dict(width=None)), "vision_cfg.width=None: give a whole number"),
    (dict(vision_cfg=dict(layers=[3, 4, 6, 3])), r"vision_cfg.layers=\[3, 4, 6, 3\]: give a whole"),
    (dict(vision_cfg=dict(layers=10**9)), "vision_cfg.layers=1000000000: .* 1 to 1024"),
    (dict(vision_cfg=dict(width=True)), "vision_cfg.width=True"),
    (dict(vision_cfg=dict(head_width=0)), "vision_cfg.head_width=0"),
    (dict(vision_cfg=dict(head_width=7)), "vision_cfg.head_width=7 does not divide"),
    (dict(vision_cfg=dict(patch_size=[])), r"vision_cfg.patch_size=\[\]: give 1 to 16384"),
    (dict(vision_cfg=dict(image_size=[32, 0])), r"image_size=\[32, 0\]: .*, or height and width"),
    (dict(vision_cfg=dict(image_size=[8, 8, 8])), r"image_size=\[8, 8, 8\]: .*or height and width"),
    (dict(vision_cfg=dict(image_size=-32)), "vision_cfg.image_size=-32"),
    (dict(vision_cfg=dict(mlp_ratio=float("nan"))), "vision_cfg.mlp_ratio=nan"),
    (dict(vision_cfg=dict(patch_dropout="x")), "vision_cfg.patch_dropout='x'"),
    (dict(vision_cfg=dict(attentional_pool={})), "vision_cfg.attentional_pool={}"),
    (dict(text_cfg=dict(heads=0)), "text_cfg.heads=0"),
    (dict(text_cfg=dict(vocab_size="many")), "text_cfg.vocab_size='many'"),
    (dict(text_cfg=dict(act_kwargs="x" * 10_000)), "text_cfg.act_kwargs='x{70,76}\\.\\.\\. is not"),
    (dict(multimodal_cfg=dict(layers=1.5)), "multimodal_cfg.layers=1.5"),
    (dict(quick_gelu="no"), "quick_gelu='no': give true or false"),
    (dict(embed_dim=[48]), r"embed_dim=\[48\]"),
    (dict(preprocess_cfg=[1]), r"preprocess_cfg=\[1\]: not a JSON object"),
    (dict(preprocess_cfg=dict(mean=0.5)), "preprocess_cfg.mean=0.5: give three numbers"),
    (dict(preprocess_cfg=dict(mean=[0.5, 0.5])), r"preprocess_cfg.mean=\[0.5, 0.5\]: give three"),
    (dict(preprocess_cfg=dict(std=[0.5, 0, 0.5])), "preprocess_cfg.std=.*, above 0"),
    (dict(preprocess_cfg=dict(std=[0.5, float("inf"), 0.5])), "preprocess_cfg.std="),
]


@pytest.mark.parametrize("changes, message", ODD)
def test_odd_configurations_are_named(tmp_path, changes, message):
    config = cases.SMALL
    for key, value in changes.items():
        if key in config:
            value = config[key] | value if isinstance(value, dict) else value
            config = config | {key: value}
    text = dict(model_cfg=config) | {k: v for k, v in changes.items() if k not in cases.SMALL}
    (tmp_path / convert.CONFIG_NAME).write_text(json.dumps(text))
    found = convert._model_config(str(tmp_path / "x.bin"), "", {})
    with pytest.raises(ValueError, match=f"{convert.CONFIG_NAME}: .*{message}"):
        convert._config(*found)


@pytest.mark.parametrize(
    "text", ["[1]", "null", "[" * 5000, "{", "\xff", '{"a": ' + "1" * (5 << 20)]
)
def test_a_configuration_that_is_no_json_object(tmp_path, text):
    (tmp_path / convert.CONFIG_NAME).write_text(text, "latin-1")
    with pytest.raises(ValueError, match=f"{convert.CONFIG_NAME}: "):
        convert._model_config(str(tmp_path / "x.bin"), "", {})


@pytest.mark.parametrize(
    "keys, message",
    [
        (dict(hf_tokenizer_name="t5-base"), "text_cfg.hf_tokenizer_name='t5-base' is not supp"),
        (dict(tokenizer_kwargs=dict(clean="whitespace")), "clean='whitespace'; only 'lower' here"),
    ],
)
def test_pe_core_reads_texts_by_clip_s_byte_pairs_alone(keys, message):
    name = "vit_pe_core_base_patch16_224"
    vision = dict(image_size=224, timm_model_name=name, timm_pool="map", timm_proj=None)
    text = dict(context_length=32, vocab_size=49408, width=1024, heads=16, layers=24)
    how = dict(mean=[0.5] * 3, std=[0.5] * 3)
    cfg = dict(embed_dim=1024, vision_cfg=vision, text_cfg=text)
    assert pe_core.to_model(cfg, how)["text"]["max_len"] == 32
    with pytest.raises(ValueError, match=message):
        pe_core.to_model(cfg | dict(text_cfg=text | keys), how)
