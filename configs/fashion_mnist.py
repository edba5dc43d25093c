"""Fashion-MNIST with its labels as text only: zero-shot classification of the test set.

coca-jax prepare --format=parquet --input=FASHION_MNIST --out=data/fashion_mnist --split=train
coca-jax prepare --format=parquet --input=FASHION_MNIST --out=data/fashion_mnist --split=test
"""  # noqa: E501

from ml_collections import ConfigDict

from coca_jax.recipes import base


def get_config() -> ConfigDict:
    """Ten classes: nearly every text of a batch occurs many times, so equal texts are positives."""
    config = base.get_config()
    config.batch_size = 64
    config.steps = 3000
    config.model.update(
        image_size=28, patch_size=4, embed_dim=96, dtype="float32", activation="relu"
    )
    config.model.image.update(
        width=96, depth=1, mlp_dim=384, num_heads=3, conv_widths=(32, 64), conv_depths=(1, 2)
    )
    config.model.text.update(
        width=96,
        unimodal_depth=1,
        multimodal_depth=1,
        mlp_dim=384,
        num_heads=3,
        vocab_size=320,
        max_len=20,
    )
    config.model.pooler.update(num_queries=8, num_heads=3)
    config.loss.update(duplicate_texts="positives", caption_chunk=512, captioning_weight=4.0)
    config.optimizer.update(
        name="muon",
        learning_rate=1.5e-3,
        warmup_steps=100,
        schedule="cosine",
        weight_decay=0.05,
        beta2=0.98,
    )
    path = "data/fashion_mnist"
    config.data.sources = (dict(path=path, split="train", kind="label"),)
    # No crop: it would show clothes larger in training than they are in the test.
    config.data.update(prompts="plain", flip=True)
    test = dict(path=path, split="test", kind="label")
    config.eval.tasks = (dict(kind="zero_shot", name="fashion_mnist", data=test, prompts="plain"),)
    config.checkpoint.every_steps = 500
    return config
