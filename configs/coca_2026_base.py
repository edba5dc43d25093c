"""CoCa-Base with the blocks of its later relatives: RMSNorm, RoPE, GEGLU, QK-norm, no biases.

The recipe is that of coca_base. Point data.sources at your own prepared alt-text and label data.
"""

from ml_collections import ConfigDict

from coca_jax.recipes import coca_base


def get_config() -> ConfigDict:
    """The paper's Base model with the blocks of `modernise`."""
    return modernise(coca_base.get_config())


def modernise(config: ConfigDict) -> ConfigDict:
    """The config with RMSNorm, rotary positions and GEGLU in all towers (GRR-CoCa, Patock et al.
    2025), normed queries and keys, and no biases. A gated MLP has three products in place of two:
    two thirds of the width keep the number of parameters. Registers are left out: of 256 patches
    and a few beside them the attention kernels of TPUs do not know.
    """
    config.model.update(norm="rms", positions="rope", gated_mlp=True, qk_norm=True, bias=False)
    config.model.image.patch_bias = False
    config.model.text.head_bias = False
    for tower in (config.model.image, config.model.text):
        tower.mlp_dim = round(tower.mlp_dim * 2 / 3 / 64) * 64
    return config
