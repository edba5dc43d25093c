"""A CoCa of width 384 with the blocks of coca_2026_base: 224 px, 12 + 6 + 6 layers, batch 1,024.

Point data.sources at your own prepared alt-text and label data before a run.
"""

from ml_collections import ConfigDict

from coca_jax.recipes import coca_224, coca_2026_base


def get_config() -> ConfigDict:
    """coca_224 at half the width, with warm-up, decay and the weights of the paper's losses."""
    config = coca_224.get_config()
    config.batch_size, config.epochs = 1024, 30.0
    config.model.embed_dim = 384
    config.model.image.update(width=384, mlp_dim=1536, num_heads=6)
    config.model.text.update(width=384, mlp_dim=1536, num_heads=6)
    config.model.pooler.update(num_heads=6, num_queries=64)
    config.loss.update(contrastive_weight=1.0, captioning_weight=2.0)
    config.optimizer.update(
        learning_rate=1e-3, warmup_steps=2000, schedule="cosine", weight_decay=0.1, clip_norm=1.0
    )
    return coca_2026_base.modernise(config)
