"""CoCa of the paper (Table 1): 2.1B parameters, counted with tied embedding and softmax."""

from ml_collections import ConfigDict

from coca_jax.recipes import coca_base


def get_config() -> ConfigDict:
    """The paper's largest model; tied, since only then Table 1's 2.1B comes out (2.19B untied)."""
    config = coca_base.get_config()
    config.model.embed_dim = 1408
    config.model.image.update(width=1408, depth=40, mlp_dim=6144, num_heads=16)
    config.model.text.update(
        width=1408,
        unimodal_depth=18,
        multimodal_depth=18,
        mlp_dim=5632,
        num_heads=16,
        tie_embeddings=True,
    )
    config.model.pooler.num_heads = 16
    return config
