"""The demo before many backgrounds, in changing light; tested on some that training never shows."""

from ml_collections import ConfigDict

from coca_jax.configs import demo


def get_config() -> ConfigDict:
    """configs/demo.py with varied scenery, and its zero-shot and captions on unseen scenery too."""
    config = demo.get_config()
    config.data.sources = tuple(source | dict(scenery="varied") for source in config.data.sources)
    unseen = dict(builtin="scenes", split="test", scenery="unseen")
    config.eval.tasks += (
        dict(kind="zeroshot", name="scenes_unseen", data=unseen | dict(kind="label"), limit=1000),
        dict(
            kind="captioning",
            name="scenes_unseen",
            data=unseen | dict(kind="caption", objects=(1,)),
            limit=500,
        ),
    )
    return config
