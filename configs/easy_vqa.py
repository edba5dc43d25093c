"""easy-VQA: 38,575 questions about 4,000 drawings of a shape, answered by head and decoder.

python -m coca_jax.prepare --format=webdataset --input=EASY_VQA --out=data/easy_vqa --split=train
python -m coca_jax.prepare --format=webdataset --input=EASY_VQA --out=data/easy_vqa --split=test
python -m coca_jax.train --config=configs/easy_vqa.py --workdir=runs/easy_vqa
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """A small model from scratch: 64 px, a convolutional stem, one loss for each way to answer."""
    config = base.get_config()
    config.batch_size, config.steps = 64, 3000
    config.model.update(
        image_size=64, patch_size=8, embed_dim=96, dtype="float32", activation="relu"
    )
    config.model.image.update(
        width=96,
        depth=1,
        mlp_dim=384,
        num_heads=3,
        conv_widths=(16, 32, 64),
        conv_depths=(0, 1, 1),
    )
    config.model.text.update(
        width=96,
        unimodal_depth=1,
        multimodal_depth=2,
        mlp_dim=384,
        num_heads=3,
        vocab_size=320,
        max_len=20,
    )
    config.model.pooler.update(num_queries=8, num_heads=3)
    config.head.kind = "answer"
    config.loss.update(contrastive_weight=0.0, captioning_weight=1.0, caption_chunk=512)
    config.optimizer.update(
        name="adamw",
        learning_rate=1.5e-3,
        warmup_steps=100,
        schedule="cosine",
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
