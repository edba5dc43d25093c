"""easy-VQA: 38,575 questions about 4,000 drawings of a shape, answered by head and decoder.

coca-jax prepare --format=webdataset --input=EASY_VQA --out=data/easy_vqa --split=train
coca-jax prepare --format=webdataset --input=EASY_VQA --out=data/easy_vqa --split=test
python -m coca_jax.train --config=configs/easy_vqa.py:runs/demo --workdir=runs/easy_vqa
"""

from ml_collections import ConfigDict

from coca_jax.recipes import adapt, demo

NAMES = (
    *("circle", "rectangle", "triangle"),
    *("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
)


def get_config(start: str = "") -> ConfigDict:
    """start: the run or export to start from, that of configs/demo.py; '': its model, fresh."""
    config = adapt.get_config(start)
    if not start:
        config.model = demo.get_config().model
    config.batch_size, config.steps = 32, 2400
    # In the demo's vocabulary the longest question and answer take 31.
    config.model.text.max_len = 32
    config.head.kind = "answer"
    config.loss.captioning_weight = 1.0
    config.optimizer.update(
        name="muon", learning_rate=1.5e-3, warmup_steps=100, weight_decay=0.05, beta2=0.98
    )
    asked = dict(path="data/easy_vqa", kind="question", questions="qa")
    train = dict(asked, split="train")
    # Shape and colour are learned from the questions for them, a quarter of all; then yes and no.
    config.data.sources = (dict(train, answers=NAMES), dict(train, answers=("yes", "no")))
    test = dict(asked, split="test")
    config.eval.tasks = (
        dict(kind="classification", name="easy_vqa", data=test),
        dict(kind="answers", name="easy_vqa", data=test),
    )
    config.log.every_steps = 50
    return config
