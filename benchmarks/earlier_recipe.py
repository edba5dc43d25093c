"""Recipes as they were when figures of the pages were measured, so that these stay of one kind.

`--config=benchmarks/earlier_recipe.py:emoji`, `:emoji_reinforced`, or `:demo`, that of 0.1.
"""

from ml_collections import ConfigDict

from coca_jax.recipes import demo, emoji, emoji_reinforced


def get_config(name: str) -> ConfigDict:
    """Raises KeyError for a name that is none of the three."""
    recipes = {"demo": demo, "emoji": emoji, "emoji_reinforced": emoji_reinforced}
    config = recipes[name].get_config()
    config.optimizer.update(schedule="cosine", average_share=0.0, projection_rate=1.0)
    if name == "demo":
        config.steps = 2600
        config.model.text.max_len = 34
        config.data.sources = tuple(
            {key: value for key, value in source.items() if key != "scenery"}  # plain backgrounds
            for source in config.data.sources
        )
        return config
    if name == "emoji":
        config.steps = 3600
    config.model.dtype = "float32"
    config.data.resize = "squash"
    config.loss.min_temperature, config.model.temperature = 0.0, 0.07  # learned freely
    return config
