"""Emoji: train on the drawings of three vendors, retrieve those of a fourth by name.

coca-jax prepare --format=imagefolder --input=EMOJI_FOLDER --out=data/emoji
"""

from ml_collections import ConfigDict

from coca_jax.recipes import base

VENDORS = ["google", "twitter", "fluent"]
UNSEEN = "openmoji"


def get_config() -> ConfigDict:
    """Names are alt-text; a light ConvNet stem, as there are only 5,674 drawings.

    Steps are worth more here than layers, and names more than groups beside them: so the model is
    small, and every row is a name, in tokens of which names have 2.8.
    """
    config = base.get_config()
    config.batch_size, config.steps = 128, 5500
    config.image_sizes = ((0.3, 32),)
    config.text_lengths, config.text_parts = (7,), 4  # three names in four have at most six tokens
    config.model.update(
        image_size=48, patch_size=8, embed_dim=160, dtype="bfloat16", activation="relu"
    )  # as exact as float32 here, in 0.7 of the time where a processor multiplies it
    # Lower ones sort the drawings of three hands better than those of a fourth.
    config.model.temperature = config.loss.min_temperature = 0.1
    config.model.image.update(
        width=160,
        depth=1,
        mlp_dim=640,
        num_heads=4,
        conv_widths=(32, 64, 128),
        conv_depths=(0, 2, 1),
    )
    config.model.text.update(
        width=160,
        unimodal_depth=2,
        multimodal_depth=1,
        mlp_dim=640,
        num_heads=4,
        vocab_size=3072,
        max_len=16,
    )
    config.model.pooler.update(num_queries=16, num_heads=4)
    config.loss.update(
        contrastive_weight=1.0,
        captioning_weight=2.0,
        duplicate_texts="positives",
        caption_chunk=512,
    )
    config.optimizer.update(
        name="muon",
        learning_rate=2.5e-3,
        warmup_steps=100,
        schedule="constant",  # and the mean of the last parameters, as in the demo
        average_share=0.4,
        weight_decay=0.1,
        beta2=0.98,
        projection_rate=0.0,  # a random map into the joint space: the towers learn, not it
    )
    path, where = "data/emoji", {"vendor": VENDORS}
    names = dict(path=path, split="train", where=where)
    config.data.sources = (dict(names, kind="caption"),)
    config.data.vocabulary_kind, config.data.augment = "bpe", "drawing"
    config.data.resize = "trim"  # vendors leave more or less room around the same thing
    unseen = dict(path=path, split="train", where={"vendor": [UNSEEN]})
    task = dict(name=f"emoji_{UNSEEN}", data=unseen, candidates=names, known_only=True)
    retrieval = dict(task, kind="retrieval", rerank=20, querybank=names)
    config.eval.tasks = (retrieval, dict(task, kind="captioning"))
    config.checkpoint.every_steps = 300
    return config
