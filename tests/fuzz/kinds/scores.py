"""Configurations of image and text towers."""

from __future__ import annotations

import json
import pathlib
import random

import mutate

from coca_jax.config import Model, read
from coca_jax.interop import towers_config
from coca_jax.interop.towers_weights import TowersLayout
from kinds import Kind


def towers_seeds() -> list[bytes]:
    """transformers' configurations and open_clip's."""
    small = dict(hidden_size=48, num_attention_heads=4, num_hidden_layers=2)
    sections = dict(vision_config=small | dict(image_size=32, patch_size=8), text_config=small)
    clip = dict(model_type="clip", projection_dim=24, **sections)
    vision = dict(image_size=32, layers=2, width=48, patch_size=8, head_width=12)
    text = dict(context_length=20, vocab_size=99, width=40, heads=4, layers=2)
    open_clip = dict(embed_dim=24, vision_cfg=vision, text_cfg=text, quick_gelu=True)
    trunk = dict(timm_model_name="vit_base_patch16_siglip_224", timm_pool="map", timm_proj="none")
    siglip = text | dict(no_causal_mask=True, proj_bias=True, pool_type="last")
    siglip["norm_kwargs"] = dict(eps=1e-6)
    timm = dict(embed_dim=768, vision_cfg=trunk | dict(image_size=224), text_cfg=siglip)
    trunk = dict(timm_model_name="vit_pe_core_base_patch16_224", timm_pool="map", timm_proj=None)
    pe_core = dict(embed_dim=24, vision_cfg=trunk | dict(image_size=224), text_cfg=text)
    pooled = vision | dict(no_ln_pre=True, pool_type="avg", final_ln_after_pool=True)
    whole = text | dict(pool_type="last", no_causal_mask=True, act_kwargs=dict(approximate="tanh"))
    whole["tokenizer_kwargs"] = dict(strip_sep_token=True)
    openvision = dict(embed_dim=24, vision_cfg=pooled, text_cfg=whole)
    trees = [clip, dict(model_type="siglip", **sections)]
    trees += [dict(model_cfg=tower) for tower in (open_clip, timm, pe_core, openvision)]
    return [json.dumps(tree).encode() for tree in trees]


def damage_towers(rng: random.Random, seed: bytes) -> bytes:
    """Other values, or bytes at random."""
    if rng.random() < 0.8:
        return mutate.text_of(rng, mutate.tree(rng, json.loads(seed)))
    return mutate.data(rng, seed)


def run_towers(path: pathlib.Path) -> str:
    """The model, and the tensors that its file would have."""
    copy = path.with_name("towers.json")
    copy.write_bytes(path.read_bytes())
    found = towers_config.find(str(path.with_name("weights.bin")), str(copy))
    if found is None:
        return "no towers"
    model = read(Model, found["model"], "model")
    names = ["vision_model."] if model.norm_eps < 1e-5 else []
    return f"{found['resize']} {sorted(TowersLayout(model, names).tensors())[:9]}"


KINDS = {
    "towers": Kind(towers_seeds, damage_towers, run_towers),
}
