"""CoCa-Base of the paper (Table 1, which counts 383M parameters; there are 389M), at its batch of
65,536.

Point data.sources at your own prepared alt-text and label data before a run.
"""

from ml_collections import ConfigDict

from coca_jax.recipes import base


def get_config() -> ConfigDict:
    """The paper's Base model and recipe (Section 4.1)."""
    config = base.get_config()
    config.batch_size = 65_536
    config.steps = 500_000
    config.optimizer.warmup_steps = 10_000  # 2% of the steps, then linear to 0
    config.loss.caption_chunk = 2048
    config.remat = "named"
    config.text_lengths, config.text_parts = base.TEXT_LENGTHS, 4
    config.data.loader = "seqio"  # 'direct' gives the same batches without TensorFlow
    config.data.sources = (
        dict(path="data/alt_text", split="train", kind="caption", weight=1.0),
        dict(path="data/labels", split="train", kind="label", weight=1.0),
    )
    config.checkpoint.every_steps = 5_000
    config.log.every_steps = 50
    return config
