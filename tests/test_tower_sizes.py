"""The published sizes of towers: open_clip's own configurations against what is made of them here.
Nothing is computed: torch's tensors are on its device 'meta'."""

import copy
import json
from pathlib import Path

import pytest

from coca_jax.config import Model, read
from coca_jax.interop import towers_config
from coca_jax.interop.open_clip_config import block_options
from coca_jax.interop.open_clip_weights import compare, count
from coca_jax.interop.towers_weights import TowersLayout

torch = pytest.importorskip("torch", reason="needs the extra 'parity'")
open_clip = pytest.importorskip("open_clip", reason="needs the extra 'parity'")
pytest.importorskip("timm", reason="needs the extra 'parity'")
pytestmark = pytest.mark.torch

FOLDER = Path(open_clip.__file__).parent / "model_configs"
# (tensors, parameters) of each, as open_clip has them.
SIZES = {
    "ViT-B-32-quickgelu": (302, 151_277_313),
    "ViT-L-14-CLIPA-336": (444, 414_538_241),
    "ViT-H-14-worldwide-quickgelu": (686, 1_858_783_745),
    "PE-Core-T-16-384": (316, 69_546_113),
    "PE-Core-S-16-384": (316, 87_188_225),
    "PE-Core-B-16": (460, 447_660_545),
    "PE-Core-L-14-336": (604, 671_138_817),
    "PE-Core-bigG-14-448": (915, 2_419_267_841),
    "ViT-B-16-SigLIP": (314, 203_155_970),
    "ViT-B-16-SigLIP2": (314, 375_187_970),
    "ViT-B-32-SigLIP2-256": (314, 376_856_066),
    "ViT-L-16-SigLIP2-512": (602, 882_313_218),
    "ViT-SO400M-14-SigLIP-384": (674, 877_960_498),
    "ViT-SO400M-16-SigLIP2-256": (674, 1_135_670_962),
    "ViT-gopt-16-SigLIP2-384": (830, 1_871_885_426),
}


def activation(mlp):
    """The name here of an MLP's activation there."""
    act = next(m for name, m in mlp.named_children() if name in ("act", "gelu"))
    kind = type(act).__name__
    if kind == "GELU":
        return "gelu" if act.approximate == "tanh" else "gelu_exact"
    return {"QuickGELU": "quick_gelu", "GELUTanh": "gelu", "PytorchGELUTanh": "gelu"}[kind]


@pytest.mark.parametrize("name", SIZES)
def test_published_sizes_fit_and_have_the_blocks_of_the_original(name):
    cfg = json.loads((FOLDER / f"{name}.json").read_text())
    found = towers_config.read(cfg, None)
    model = read(Model, found["model"], "model")
    arguments = copy.deepcopy(cfg)
    custom = arguments.pop("custom_text", False)
    with torch.device("meta"):
        original = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**arguments)
    shapes = {key: tuple(value.shape) for key, value in original.state_dict().items()}
    layout = TowersLayout(model, shapes, "logit_bias" in shapes)
    assert compare(shapes, layout.tensors()) == []
    assert (len(shapes), count(shapes)) == SIZES[name]
    trunk = getattr(original.visual, "trunk", None)
    image = trunk.blocks[0] if trunk else original.visual.transformer.resblocks[0]
    norm, heads = (
        (image.norm1, image.attn.num_heads) if trunk else (image.ln_1, image.attn.num_heads)
    )
    here = block_options(model)
    assert activation(image.mlp) == here["image"]["activation"]
    assert norm.eps == here["image"]["norm_eps"] and heads == model.image.num_heads
    text = (original.text if custom else original).transformer.resblocks[0]
    assert activation(text.mlp) == here["text"]["activation"]
    assert text.ln_1.eps == here["text"]["norm_eps"]
    assert text.attn.num_heads == model.text.num_heads
    if trunk:
        pool = trunk.attn_pool
        assert activation(pool.mlp) == here["pooler"]["activation"]
        assert (pool.num_heads, pool.norm.eps) == (model.pooler.num_heads, model.norm_eps)
