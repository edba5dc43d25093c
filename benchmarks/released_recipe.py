"""Fine-tuning at the sizes of a released model: `--config=benchmarks/released_recipe.py:NAME`."""

from ml_collections import ConfigDict

from coca_jax.interop import open_clip_config
from coca_jax.recipes import finetune_open_clip


def get_config(name: str) -> ConfigDict:
    """name: as open_clip has it, coca_ViT-L-14."""
    config = finetune_open_clip.get_config()
    config.model.update(open_clip_config.to_model(open_clip_config.RELEASED[name]))
    config.model.dtype = "bfloat16"
    return config
