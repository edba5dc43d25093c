"""easy-VQA: 38,575 questions about 4,000 drawings of a shape, answered by head and decoder.

python -m coca_jax.prepare --format=webdataset --input=EASY_VQA --out=data/easy_vqa --split=train
python -m coca_jax.prepare --format=webdataset --input=EASY_VQA --out=data/easy_vqa --split=test
python -m coca_jax.train --config=configs/easy_vqa.py --workdir=runs/easy_vqa
"""

from ml_collections import ConfigDict

from configs import base

NAMES = (
    *("circle", "rectangle", "triangle"),
    *("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
)


def get_config() -> ConfigDict:
    """A tiny model from scratch: what it needs is many steps, one loss for each way to answer."""
    config = base.get_config()
    config.batch_size, config.steps = 32, 10_000
    config.model.update(
        image_size=64, patch_size=32, embed_dim=64, dtype="float32", activation="relu"
    )
    # Of light paper: a background of zeros, so that images differ by what is drawn on them.
    config.model.update(image_mean=(0.94, 0.94, 0.94), image_std=(0.2, 0.2, 0.2))
    config.model.image.update(
        width=64,
        depth=1,
        mlp_dim=256,
        num_heads=2,
        conv_widths=(16, 24, 32, 48, 64),
        conv_depths=(0, 0, 0, 0, 0),
    )
    config.model.text.update(
        width=64,
        unimodal_depth=1,
        multimodal_depth=2,
        mlp_dim=256,
        num_heads=2,
        vocab_size=320,
        max_len=20,
    )
    config.model.pooler.update(num_queries=4, num_heads=2)
    config.head.kind = "answer"
    config.loss.update(contrastive_weight=0.0, captioning_weight=0.3)
    config.optimizer.update(
        name="adamw",
        learning_rate=3e-3,
        warmup_steps=100,
        schedule="cosine",
        weight_decay=0.05,
        beta2=0.98,
    )
    asked = dict(path="data/easy_vqa", kind="question", questions="qa")
    # Shape and colour are learned from the questions for them, a quarter of all; then yes and no.
    train = dict(asked, split="train")
    config.data.sources = (dict(train, answers=NAMES), dict(train, answers=("yes", "no")))
    config.eval.tasks = (
        dict(kind="classification", name="easy_vqa", data=dict(asked, split="test")),
        dict(kind="answers", name="easy_vqa", data=dict(asked, split="test")),
    )
    config.checkpoint.every_steps = 1000
    config.log.every_steps = 50
    return config
