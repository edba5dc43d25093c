"""Animated emoji: the group of an animation from 8 frames, over the frozen encoder of an emoji run.

for split in train test; do
  coca-jax prepare --format=imagefolder --input=ANIMATIONS --out=data/animated_emoji \\
    --split=$split --where=split=$split
done
python -m coca_jax.train --config=configs/animated_emoji.py:runs/emoji --workdir=runs/animated

--config.data.num_frames=1 looks at one frame; --config.optimizer.encoder_learning_rate=3e-4
fine-tunes the encoder.
"""

from ml_collections import ConfigDict

from coca_jax.recipes import adapt


def get_config(weights: str = "") -> ConfigDict:
    """weights: the run or export to start from."""
    config = adapt.get_config(weights)
    config.batch_size, config.steps = 32, 200
    config.head.update(kind="classification", label_smoothing=0.1)
    config.optimizer.update(
        name="adamw",
        learning_rate=2e-3,
        encoder_learning_rate=0.0,
        layer_decay=0.8,
        warmup_steps=20,
        weight_decay=0.05,
    )
    path = "data/animated_emoji"
    config.data.sources = (dict(path=path, split="train", kind="label"),)
    config.data.update(num_frames=8, frame_jitter=True, augment="drawing")
    test = dict(path=path, split="test", kind="label")
    config.eval.tasks = (dict(kind="classification", name="animated_emoji", data=test),)
    config.checkpoint.every_steps = 200
    return config
