"""easy-VQA: 38,575 questions about 4,000 drawings of a shape, from an emoji run.

python -m coca_jax.prepare --format=webdataset --input=EASY_VQA --out=data/easy_vqa --split=train
python -m coca_jax.prepare --format=webdataset --input=EASY_VQA --out=data/easy_vqa --split=test
python -m coca_jax.train --config=configs/easy_vqa.py:runs/emoji --workdir=runs/easy_vqa
"""

from ml_collections import ConfigDict

from configs import adapt, emoji


def get_config(weights: str = "") -> ConfigDict:
    """weights: the run or export to start from."""
    config = adapt.get_config(weights)
    if not weights:
        config.model = emoji.get_config().model
    config.model.text.max_len = 24  # of question and answer; emoji names have 16
    config.batch_size, config.steps = 32, 2000
    config.text_lengths = (16, 20, 24)
    config.head.kind = "answer"
    config.loss.update(captioning_weight=0.5, caption_chunk=512)
    config.optimizer.update(
        name="adamw",
        learning_rate=1e-3,
        encoder_learning_rate=1e-3,
        warmup_steps=50,
        weight_decay=0.05,
        beta2=0.98,
    )
    asked = dict(path="data/easy_vqa", kind="question", questions="qa")
    config.data.sources = (dict(asked, split="train"),)
    config.eval.tasks = (
        dict(kind="classification", name="easy_vqa", data=dict(asked, split="test")),
        dict(kind="answers", name="easy_vqa", data=dict(asked, split="test")),
    )
    config.checkpoint.every_steps = 500
    return config
