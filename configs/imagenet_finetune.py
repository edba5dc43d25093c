"""ImageNet, all of the encoder fine-tuned with a new head (paper, Table 9).

Data as in imagenet_frozen.py.

python -m coca_jax.train --config=configs/imagenet_finetune.py:runs/coca --workdir=runs/tuned
"""

from ml_collections import ConfigDict

from coca_jax.recipes import imagenet_frozen


def get_config(weights: str = "") -> ConfigDict:
    """weights: the run or export to start from."""
    config = imagenet_frozen.get_config(weights)
    config.head.label_smoothing = 0.5
    config.optimizer.encoder_learning_rate = 5e-4
    return config
