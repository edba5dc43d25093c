"""What the soak tests train: as small as a run can be, with every kind of moment in it."""

from ml_collections import ConfigDict

from coca_jax.recipes import tiny


def get_config() -> ConfigDict:
    """One layer a tower, 16 px scenes, batch 8, an average of the parameters, evaluations."""
    config = tiny.get_config()
    config.batch_size, config.steps = 8, 1000
    config.model.update(image_size=16, patch_size=8, embed_dim=16)
    config.model.image.update(width=16, depth=1, mlp_dim=32, num_heads=2)
    config.model.text.update(width=16, unimodal_depth=1, multimodal_depth=1, mlp_dim=32)
    config.model.text.num_heads = 2
    config.model.pooler.update(num_queries=2, num_heads=2)
    config.optimizer.update(name="adamw", ema=0.9)
    config.checkpoint.every_steps = 20
    data = dict(builtin="scenes", split="heldout", kind="label")
    config.eval.every_steps = 50
    config.eval.tasks = (dict(kind="zero_shot", name="scenes", data=data, limit=16),)
    return config
