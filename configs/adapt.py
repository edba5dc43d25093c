"""What the adaptation recipes share: the checkpoint they start from (paper, Tables 9 and 10).

The text after a recipe's colon names it, a run or an export:

python -m coca_jax.train --config=configs/imagenet_frozen.py:runs/coca --workdir=runs/imagenet
"""

from ml_collections import ConfigDict

from coca_jax import checkpointing, export_format
from coca_jax.configs import base


def get_config(weights: str = "") -> ConfigDict:
    """The model of `weights`, a head's loss alone, Adafactor with clipping and cosine to zero.

    Without weights, the base model from scratch. data.sources, steps and the head are the recipe's.
    """
    config = base.get_config()
    if weights:
        export = export_format.is_export(weights)
        given = export_format.read_config(weights) if export else checkpointing.load_config(weights)
        config.init_from = weights
        config.model = ConfigDict(given.model.to_dict(), convert_dict=True)
        data = given.preprocess if export else given.data
        config.data.resize = data.resize
        config.data.label_token = bool(data.get("label_token", False))
    config.loss.update(contrastive_weight=0.0, captioning_weight=0.0, caption_chunk=2048)
    config.optimizer.update(name="adafactor", schedule="cosine", warmup_steps=1000, clip_norm=1.0)
    return config
