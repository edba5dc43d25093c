"""CoCa-Large with the blocks of coca_2026_base."""

from ml_collections import ConfigDict

from coca_jax.recipes import coca_2026_base, coca_large


def get_config() -> ConfigDict:
    """The paper's Large model and recipe with RMSNorm, RoPE, GEGLU, QK-norm and no biases."""
    return coca_2026_base.modernise(coca_large.get_config())
