"""ImageNet on frozen features: a new pooler and a linear classifier (paper, Table 9).

coca-jax prepare --format=tfds --input=imagenet2012 --out=data/imagenet --split=train
coca-jax prepare --format=tfds --input=imagenet2012 --out=data/imagenet --split=validation
python -m coca_jax.train --config=configs/imagenet_frozen.py:runs/coca --workdir=runs/frozen
"""

from ml_collections import ConfigDict

from coca_jax.recipes import adapt


def get_config(weights: str = "") -> ConfigDict:
    """weights: the run or export to start from."""
    config = adapt.get_config(weights)
    config.batch_size, config.steps = 512, 200_000
    config.head.update(kind="classification", label_smoothing=0.2)
    config.optimizer.update(
        learning_rate=5e-4, encoder_learning_rate=0.0, warmup_steps=0, weight_decay=0.01, ema=0.9999
    )
    config.data.sources = (dict(path="data/imagenet", split="train", kind="label"),)
    config.data.update(augment="randaugment", randaugment=(2, 20))
    test = dict(path="data/imagenet", split="validation", kind="label")
    config.eval.tasks = (dict(kind="classification", name="imagenet", data=test),)
    return config
