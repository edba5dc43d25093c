"""A recipe that reads the JPEGs of pictures.py: `--config=benchmarks/pictures_recipe.py:DATA`."""

from ml_collections import ConfigDict

from coca_jax.recipes import coca_224


def get_config(path: str) -> ConfigDict:
    """path: what `prepare` made of the folder."""
    config = coca_224.get_config()
    config.data.sources = (dict(path=path, split="train", kind="caption", weight=1.0),)
    config.data.label_token = False
    config.data.augment = "crop"
    config.batch_size = 64
    return config
