"""Fine-tune a dual encoder (CLIP, SigLIP, MetaCLIP, PE-Core, OpenVision) on your own pairs.

coca-jax convert --input=ViT-B-32:openai --out=weights
coca-jax train --config=finetune_towers:weights --data=data/captions --workdir=runs/tuned

Trains both towers in full. --config.optimizer.image_learning_rate=0 locks the image side up to its
embedding (LiT, Zhai et al. 2022); text_learning_rate=0 locks the text side.
"""

from ml_collections import ConfigDict

from coca_jax.recipes import base
from coca_jax.training import inherit


def get_config(weights: str = "") -> ConfigDict:
    """weights: the converted folder, which has the model, the tokenizer, the preprocessing, and the
    form of the contrastive loss: sigmoid where the weights have its bias.

    Without it, a CLIP of the size of ViT-B/32 that starts from random weights.
    """
    config = base.get_config()
    if weights:
        config.init_from = weights
        inherit.leave(config, "model", "data.vocabulary", "data.resize", "loss.contrastive")
    else:
        config.model.update(family="clip", image_size=224, patch_size=32, embed_dim=512)
        config.model.update(activation="gelu_exact")
        config.model.image.update(
            class_token=True, pre_norm=True, final_norm=False, patch_bias=False
        )
        config.model.text.update(width=512, mlp_dim=2048, num_heads=8, max_len=77)
        config.model.pooler.num_heads = 8
        config.data.resize = "crop"
    config.model.dtype = "bfloat16"
    config.batch_size = 256
    config.epochs = 5.0
    config.loss.update(captioning_weight=0.0, duplicate_texts="ignore")
    config.optimizer.update(
        name="adamw",
        learning_rate=1e-5,
        warmup_steps=100,
        schedule="cosine",
        weight_decay=0.1,
        beta1=0.9,
        beta2=0.98,
        clip_norm=1.0,
    )
    config.data.augment = "crop"
    config.data.sources = (dict(path="data/captions", split="train", kind="caption", weight=1.0),)
    config.checkpoint.every_steps = 500
    return config
