"""Tux Paint stamps: photos and drawings, each with captions in up to 18 languages.

for split in train test; do
  coca-jax prepare --format=webdataset --input=TUXPAINT --text_field=captions \\
    --out=data/tuxpaint --split=$split
done
python -m coca_jax.train --config=configs/tuxpaint.py --workdir=runs/tuxpaint
"""

from ml_collections import ConfigDict

from coca_jax.recipes import emoji


def get_config() -> ConfigDict:
    """The emoji recipe with a deeper stem; one of an image's captions is drawn at each visit."""
    config = emoji.get_config()
    config.batch_size, config.steps = 64, 1500
    config.image_sizes = ((0.5, 32),)
    config.text_lengths = (16, 24, 40)
    config.model.image.conv_depths = (0, 1, 2)
    config.model.text.update(vocab_size=3000, max_len=40, unimodal_depth=1, multimodal_depth=2)
    config.loss.update(captioning_weight=1.0, min_temperature=0.0)
    config.model.temperature = 0.07
    config.optimizer.update(
        learning_rate=1.5e-3, schedule="cosine", average_share=0.0, projection_rate=1.0
    )
    path = "data/tuxpaint"
    config.data.sources = (dict(path=path, split="train", kind="caption"),)
    config.data.vocabulary_kind, config.data.resize = "auto", "squash"
    task = dict(name="tuxpaint", data=dict(path=path, split="test"))
    config.eval.tasks = (dict(task, kind="retrieval"), dict(task, kind="captioning"))
    return config
