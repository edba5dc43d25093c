"""Two images and a statement that is true of them or not (paper, Table 10).

Prepare pairs: rows of metadata.jsonl with the files of both images, text and label.

coca-jax prepare --format=imagefolder --input=NLVR2 --image_field=left,right \\
    --out=data/nlvr2 --split=train
python -m coca_jax.train --config=configs/nlvr2.py:runs/coca --workdir=runs/nlvr2
"""

from ml_collections import ConfigDict

from coca_jax.recipes import adapt


def get_config(weights: str = "") -> ConfigDict:
    """weights: the run or export to start from."""
    config = adapt.get_config(weights)
    config.batch_size, config.steps = 64, 50_000
    config.head.kind = "pair"
    config.optimizer.update(learning_rate=5e-4, encoder_learning_rate=2e-5, weight_decay=0.1)
    config.data.sources = (dict(path="data/nlvr2", split="train", kind="question"),)
    test = dict(path="data/nlvr2", split="test", kind="question")
    config.eval.tasks = (dict(kind="classification", name="nlvr2", data=test),)
    return config
