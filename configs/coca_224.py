"""The small recipe that summaries of the paper publish: 224 px, 12 + 12 layers, batch 256, Adam.

Labels are told from alt-text by a reserved token. Point data.sources at your own prepared data.
"""

from ml_collections import ConfigDict

from coca_jax.recipes import base


def get_config() -> ConfigDict:
    """ViT of 12 layers and a decoder of 6 + 6, width 768, vocabulary 30,000, losses 1 and 1."""
    config = base.get_config()
    config.batch_size = 256
    config.epochs = 100.0
    config.model.update(image_size=224, patch_size=16)
    config.model.text.update(unimodal_depth=6, multimodal_depth=6, vocab_size=30_000)
    config.text_lengths, config.text_parts = base.TEXT_LENGTHS, 4
    config.loss.update(contrastive_weight=1.0, captioning_weight=1.0)
    config.optimizer.update(
        name="adamw", learning_rate=1e-4, schedule="constant", weight_decay=0.0, clip_norm=0.0
    )
    config.data.sources = (
        dict(path="data/alt_text", split="train", kind="caption", weight=1.0),
        dict(path="data/labels", split="train", kind="label", weight=1.0),
    )
    config.data.label_token = True
    config.log.every_steps = 100
    return config
