"""CoCa-Large of the paper (Table 1, which counts 787M parameters; there are 798M)."""

from ml_collections import ConfigDict

from coca_jax.recipes import coca_base


def get_config() -> ConfigDict:
    """The paper's Large model; the recipe is that of Base."""
    config = coca_base.get_config()
    config.model.embed_dim = 1024
    config.model.image.update(width=1024, depth=24, mlp_dim=4096, num_heads=16)
    config.model.text.update(width=1024, mlp_dim=4096, num_heads=16)
    config.model.pooler.num_heads = 16
    return config
