"""The smallest run there is, for trying meshes, processes and launchers: seconds on any machine."""

from ml_collections import ConfigDict

from coca_jax.recipes import base


def get_config() -> ConfigDict:
    """Two layers a tower, 32 px scenes, batch 16, five steps."""
    config = base.get_config()
    config.batch_size, config.steps = 16, 5
    config.model.update(image_size=32, patch_size=8, embed_dim=32, dtype="float32")
    config.model.image.update(width=32, depth=2, mlp_dim=64, num_heads=4)
    config.model.text.update(
        width=32,
        unimodal_depth=2,
        multimodal_depth=2,
        mlp_dim=64,
        num_heads=4,
        vocab_size=320,
        max_len=12,
    )
    config.model.pooler.update(num_queries=4, num_heads=4)
    config.loss.update(duplicate_texts="ignore", caption_chunk=16)
    config.optimizer.update(learning_rate=1e-3, warmup_steps=1)
    config.data.sources = (
        dict(builtin="scenes", split="train", kind="caption"),
        dict(builtin="scenes", split="train", kind="label"),
    )
    config.log.every_steps, config.checkpoint.every_steps = 1, 3
    return config
