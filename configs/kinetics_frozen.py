"""Kinetics (or another set of labelled clips) on frozen features: a new pooler over the tokens of
all frames and a linear classifier (paper, Table 9).

One folder a class, clips of some seconds cut beforehand, near the training size:
coca-jax prepare --format=imagefolder --input=CLIPS --out=data/kinetics --split=train
coca-jax prepare --format=imagefolder --input=CLIPS --out=data/kinetics --split=validation
python -m coca_jax.train --config=configs/kinetics_frozen.py:runs/coca --workdir=runs/frozen
"""

from ml_collections import ConfigDict

from coca_jax.recipes import adapt


def get_config(weights: str = "") -> ConfigDict:
    """weights: the run or export to start from. 16 frames, as in the paper's video retrieval; how
    many it takes here the paper does not say."""
    config = adapt.get_config(weights)
    config.batch_size, config.steps = 128, 120_000
    config.head.update(kind="classification", label_smoothing=0.1)
    config.optimizer.update(
        learning_rate=5e-4,
        encoder_learning_rate=0.0,
        warmup_steps=1000,
        weight_decay=0.0,
        ema=0.9999,
    )
    config.data.update(num_frames=16, frame_jitter=True)
    config.data.sources = (dict(path="data/kinetics", split="train", kind="label"),)
    test = dict(path="data/kinetics", split="validation", kind="label")
    config.eval.tasks = (dict(kind="classification", name="kinetics", data=test),)
    return config
