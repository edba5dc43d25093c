"""Tux Paint stamps with their English captions, tuned from a run on emoji that stays able.

for split in train test; do
  coca-jax prepare --format=webdataset --input=TUXPAINT --text_field=caption \\
    --out=data/tuxpaint_en --split=$split
done
python -m coca_jax.train --config=configs/tuxpaint_tuned.py:runs/emoji --workdir=runs/tuned
"""

from ml_collections import ConfigDict

from coca_jax.recipes import base, emoji
from coca_jax.training import inherit


def get_config(weights: str = "") -> ConfigDict:
    """weights: the run on emoji. The guard's probe is what that could do: find the drawings of an
    unseen vendor by name. Only what captions alone depend on is trained.
    """
    config = base.get_config()
    if weights:
        config.init_from = weights
        inherit.leave(config, "model", "data.vocabulary", "data.resize")
    else:
        config.model = emoji.get_config().model
    config.batch_size, config.steps = 64, 300
    config.loss.update(contrastive_weight=0.0, captioning_weight=1.0, caption_chunk=512)
    config.optimizer.update(
        name="adamw",
        learning_rate=1e-3,
        warmup_steps=30,
        schedule="cosine",
        weight_decay=0.0,
        beta2=0.98,
        keep_embeddings=True,
    )
    config.data.update(augment="drawing", features="features", augmentations=8)
    path = "data/tuxpaint_en"
    config.data.sources = (dict(path=path, split="train", kind="caption"),)
    stamps = dict(name="tuxpaint", data=dict(path=path, split="test"))
    probe = emoji.get_config().eval.tasks[0]
    config.eval.tasks = (probe, dict(stamps, kind="captioning"), dict(stamps, kind="retrieval"))
    config.eval.guard = "warn"
    config.checkpoint.every_steps = 300
    return config
