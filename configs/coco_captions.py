"""Captioning fine-tuned on COCO with cross-entropy alone (paper, Table 10).

Prepare the Karpathy split with all captions of an image as its texts. For NoCaps the paper trains
10,000 steps: --config.steps=10000.

coca-jax prepare --format=imagefolder --input=COCO --out=data/coco --split=train
python -m coca_jax.train --config=configs/coco_captions.py:runs/coca --workdir=runs/coco
"""

from ml_collections import ConfigDict

from coca_jax.recipes import adapt, base


def get_config(weights: str = "") -> ConfigDict:
    """weights: the run or export to start from."""
    config = adapt.get_config(weights)
    config.batch_size, config.steps = 128, 50_000
    config.text_lengths = base.TEXT_LENGTHS
    config.loss.captioning_weight = 1.0
    config.optimizer.update(learning_rate=1e-5, weight_decay=0.1)
    config.data.sources = (dict(path="data/coco", split="train", kind="caption"),)
    test = dict(path="data/coco", split="test", kind="caption")
    config.eval.tasks = (dict(kind="captioning", name="coco", data=test),)
    return config
