"""Kinetics, all of the encoder fine-tuned with a new head (paper, Table 9).

Data as in kinetics_frozen.py.

python -m coca_jax.train --config=configs/kinetics_finetune.py:runs/coca --workdir=runs/tuned
"""

from ml_collections import ConfigDict

from coca_jax.recipes import kinetics_frozen


def get_config(weights: str = "") -> ConfigDict:
    """weights: the run or export to start from."""
    config = kinetics_frozen.get_config(weights)
    config.optimizer.encoder_learning_rate = 5e-4
    return config
