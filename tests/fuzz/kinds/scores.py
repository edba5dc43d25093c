"""Sets of suites, one of their files damaged, and configurations of image and text towers."""

from __future__ import annotations

import io
import json
import pathlib
import random
import shutil
import tarfile

import mutate
import numpy as np

from coca_jax.apps.suites import folders, tables
from coca_jax.config import Model, checks, read
from coca_jax.interop import towers_config
from coca_jax.interop.towers_weights import TowersLayout
from kinds import Kind, encoded

PAIR = {"filename": "a.png", "caption": "a cat", "negative_caption": "a dog"}


def _tar(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _files() -> dict[str, bytes]:
    """A set of each layout below one folder."""
    array = io.BytesIO()
    np.save(array, np.array([2, 7]))
    picture = encoded("PNG")
    groups = {"s0.png": picture, "s0.cls": b"1", "s0.npy": array.getvalue()}
    groups |= {"s1.png": picture, "s1.cls": b"0", "s1.json": b'{"region": "Asia"}'}
    texts = {"s0.png": picture, "s0.txt": b"a cat\na pet\n", "s1.png": picture}
    texts["s1.json"] = b'{"captions": ["a dog", "another"]}'
    return {
        "classes/test/0.tar": _tar(groups),
        "captions/test/0.tar": _tar(texts),
        "pairs/swap.json": json.dumps({"0": PAIR}).encode(),
        "tasks.yml": b"classes:\n  name: Classes\n  main_metric: acc1\ncaptions: {}\n",
        "classes/test/nshards.txt": b"1\n",
        "classes/classnames.txt": b"cat\ndog\n",
        "classes/zeroshot_classification_templates.txt": b"a photo of a {c}.\n",
        "captions/test/nshards.txt": b"1\n",
        "captions/dataset_type.txt": b"retrieval\n",
        "pairs/a.png": picture,
    }


NAMES = (*_files(),)


def seeds() -> list[bytes]:
    """Each file but the picture, its number before it."""
    return [bytes([n]) + data for n, data in enumerate(_files().values()) if NAMES[n][-3:] != "png"]


def damage(rng: random.Random, seed: bytes) -> bytes:
    """Bytes at random, or other values in JSON."""
    if NAMES[seed[0]].endswith(".json") and rng.random() < 0.8:
        return seed[:1] + mutate.text_of(rng, mutate.tree(rng, json.loads(seed[1:])))
    return seed[:1] + mutate.data(rng, seed[1:], 4)


def run(path: pathlib.Path) -> str:
    """The tasks of the list, and how many examples each set has."""
    root = path.with_name("sets")
    shutil.rmtree(root, ignore_errors=True)
    data = path.read_bytes()
    for number, (name, good) in enumerate(_files().items()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data[1:] if number == data[0] % len(NAMES) else good)
    found, missing = tables.tasks(str(root / "tasks.yml"), str(root))
    told = [f"{task.title} {task.metric} {task.folder.kind}" for task in found]
    counts = [sum(1 for _ in task.folder.examples()) for task in found]
    pairs = folders.read(str(root / "pairs"))
    counts.append(sum(1 for _ in pairs.examples()))
    return f"{told} {counts} {missing}"


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
    model = checks.check_model(read(Model, found["model"], "model"))
    names = ["vision_model."] if model.norm_eps < 1e-5 else []
    return f"{found['resize']} {sorted(TowersLayout(model, names).tensors())[:9]}"


KINDS = {
    "suites": Kind(seeds, damage, run),
    "towers": Kind(towers_seeds, damage_towers, run_towers),
}
