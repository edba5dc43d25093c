"""A captioner on a locked image encoder: new poolers and a new decoder learn to read its tokens.

python -m coca_jax.train --config=configs/locked_captioner.py:WEIGHTS --workdir=runs/captioner

WEIGHTS: a run, an export, or what `convert` made of CLIP, SigLIP, DINOv2, DINOv3 or an open_clip CoCa.
"""

from ml_collections import ConfigDict

from coca_jax.config.model import BLOCK
from coca_jax.recipes import base
from coca_jax.training import inherit

OF_THE_ENCODER = ("image", "image_size", "patch_size", "image_mean", "image_std", *BLOCK)


def get_config(weights: str = "") -> ConfigDict:
    """weights: the run or export whose image encoder is taken, as it is (LiT, Zhai et al. 2022).

    A decoder of 6 + 6 layers of 512, both losses. The encoder runs once over the data: its tokens
    are kept in data.features. Point data.sources at your own data before a run.
    """
    config = base.get_config()
    if weights:
        config.update(init_from=weights, init_parts="image")
        inherit.leave(config, *(f"model.{key}" for key in OF_THE_ENCODER), "data.resize")
    else:
        config.data.resize = "crop"
    config.batch_size, config.epochs = 512, 8.0
    config.text_lengths = base.TEXT_LENGTHS
    config.model.update(embed_dim=512, dtype="bfloat16")
    config.model.text.update(
        width=512,
        unimodal_depth=6,
        multimodal_depth=6,
        mlp_dim=2048,
        num_heads=8,
        vocab_size=16_384,
        max_len=64,
    )
    config.model.pooler.update(num_queries=64, num_heads=8)
    config.loss.update(
        contrastive_weight=1.0,
        captioning_weight=2.0,
        duplicate_texts="ignore",
        caption_chunk=4096,
    )
    config.optimizer.update(
        name="adamw",
        learning_rate=1e-3,
        image_learning_rate=0.0,
        warmup_steps=500,
        schedule="cosine",
        weight_decay=0.1,
        beta2=0.98,
    )
    config.model.image.patch_dropout = 0.0  # the tokens are the same at each visit
    config.data.update(augment="none", features="features")
    config.data.sources = (dict(path="data/captions", split="train", kind="caption"),)
    return config
