"""What the adaptation recipes share: the checkpoint they start from (paper, Tables 9 and 10).

The text after a recipe's colon names it, a run or an export:

python -m coca_jax.train --config=configs/imagenet_frozen.py:runs/coca --workdir=runs/imagenet
"""

from ml_collections import ConfigDict

from coca_jax.recipes import base
from coca_jax.training import inherit


def get_config(weights: str = "") -> ConfigDict:
    """The model of `weights`, a head's loss alone, Adafactor with clipping and cosine to zero.

    Without weights, the base model from scratch. data.sources, steps and the head are the recipe's.
    """
    config = base.get_config()
    if weights:
        config.init_from = weights
        inherit.leave(config, "model", "data.vocabulary", "data.resize", "data.label_token")
    config.loss.update(contrastive_weight=0.0, captioning_weight=0.0, caption_chunk=2048)
    config.optimizer.update(name="adafactor", schedule="cosine", warmup_steps=1000, clip_norm=1.0)
    return config
