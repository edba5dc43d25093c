"""Visual entailment: whether an image entails a statement, is neutral or contradicts (Table 10).

Prepare data whose text is the statement and whose label is one of the three.

coca-jax prepare --format=imagefolder --input=SNLI_VE --out=data/snli_ve --split=train
python -m coca_jax.train --config=configs/snli_ve.py:runs/coca --workdir=runs/snli_ve
"""

from ml_collections import ConfigDict

from coca_jax.recipes import adapt


def get_config(weights: str = "") -> ConfigDict:
    """weights: the run or export to start from."""
    config = adapt.get_config(weights)
    config.batch_size, config.steps = 128, 50_000
    config.head.kind = "answer"
    config.optimizer.update(learning_rate=1e-3, encoder_learning_rate=5e-5, weight_decay=0.1)
    config.data.sources = (dict(path="data/snli_ve", split="train", kind="question"),)
    config.data.update(augment="randaugment", randaugment=(1, 10))
    test = dict(path="data/snli_ve", split="test", kind="question")
    config.eval.tasks = (dict(kind="classification", name="snli_ve", data=test),)
    return config
