"""The demo: scenes that the program draws itself, a small model, minutes on two CPU cores.

Half of every batch is alt-text of one to four objects, half are labels of one object. Eight
combinations of colour and shape never occur in training; the evaluation asks for exactly those.
Backgrounds and light vary, and some scenes stand before what training never shows.
"""

from typing import Any

from ml_collections import ConfigDict

from coca_jax.recipes import base


def get_config() -> ConfigDict:
    """A model of about 1.5M parameters for 64 px scenes."""
    config = base.get_config()
    # Many small steps: at this size a run learns more from its steps than from its negatives.
    config.batch_size = 32
    config.steps = 2800
    config.text_lengths, config.text_parts = (20,), 2  # labels are short, half the alt-text too
    config.model.update(
        image_size=64, patch_size=8, embed_dim=128, dtype="float32", activation="relu"
    )
    config.model.image.update(
        width=128,
        depth=1,
        mlp_dim=512,
        num_heads=4,
        conv_widths=(16, 32, 64),
        conv_depths=(0, 1, 1),
    )
    config.model.text.update(
        width=128,
        unimodal_depth=1,
        multimodal_depth=2,
        mlp_dim=512,
        num_heads=4,
        vocab_size=600,
        max_len=50,  # of four objects; a shorter one cuts the last of them off
    )
    config.model.pooler.update(num_queries=16, num_heads=4)
    _train(config)
    config.eval.tasks = _tasks()
    config.checkpoint.every_steps = 200
    return config


def _train(config: ConfigDict) -> None:
    """What is learned, from what."""
    # Equal label texts are the rule in a batch, so they are positives. At the paper's weights the
    # contrastive gradient in the encoder is eight times the captioning one here; with 30 captions
    # end as good as those of captioning alone, and retrieval is no worse.
    config.loss.update(duplicate_texts="positives", caption_chunk=512, captioning_weight=30.0)
    config.optimizer.update(
        name="muon",
        learning_rate=1.5e-3,
        warmup_steps=100,
        schedule="constant",  # and the mean of the last part's parameters, which wander: together
        average_share=0.3,  # they get right what is held out more often than a rate that falls
        weight_decay=0.05,
        beta2=0.98,
    )
    config.data.sources = (
        dict(builtin="scenes", split="train", kind="caption", weight=1.0, scenery="varied"),
        dict(builtin="scenes", split="train", kind="label", weight=1.0, scenery="varied"),
    )
    config.data.prompts = "varied"


def _tasks() -> tuple[dict[str, Any], ...]:
    """Scores of scenes whose combinations, or backgrounds, training never shows."""
    seen = dict(builtin="scenes", split="test", kind="caption", objects=(1,))
    one = dict(builtin="scenes", split="heldout", kind="caption", objects=(1,))
    many = dict(builtin="scenes", split="heldout", kind="caption", objects=(2, 3, 4))
    label = dict(builtin="scenes", split="heldout", kind="label")
    every = dict(builtin="scenes", split="heldout", kind="caption")
    unseen = dict(builtin="scenes", split="test", scenery="unseen")
    return (
        dict(kind="zero_shot", name="scenes_heldout", data=label, limit=1000),
        dict(kind="retrieval", name="scenes_heldout", data=every, limit=500),
        dict(kind="captioning", name="scenes_test", data=seen, limit=500),
        dict(kind="captioning", name="scenes_heldout", data=one, limit=500),
        dict(kind="captioning", name="scenes_heldout_many", data=many, limit=300),
        dict(kind="zero_shot", name="scenes_unseen", data=unseen | dict(kind="label"), limit=1000),
        dict(
            kind="captioning",
            name="scenes_unseen",
            data=unseen | dict(kind="caption", objects=(1,)),
            limit=500,
        ),
    )
