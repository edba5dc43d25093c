"""FLOPs by formula: of a forward pass, and of a step that trains or reads a part of the model."""

import pytest

from coca_jax.config import Config, ImageModel, Model
from coca_jax.estimate import flops
from coca_jax.recipes import coca_2b, coca_base, coca_large
from coca_jax.training import losses


@pytest.mark.parametrize("recipe,gflop", [(coca_base, 86.5), (coca_large, 229.7), (coca_2b, 708.9)])
def test_forward_flops_are_those_of_the_paper_s_models(recipe, gflop):
    assert abs(flops.model_flops(recipe.get_config().model) / 1e9 - gflop) < 0.05


def test_forward_flops_count_frames_and_a_convolutional_stem():
    def counted(frames=0, **image):
        model = Model(image_size=64, patch_size=16)
        model = model.replace_unchecked(image=ImageModel(**image))  # patches of 4 behind the stem
        return flops.model_flops(model, frames)

    plain = counted()
    of_images = 12 * (8 * 16 * 768**2 + 4 * 16**2 * 768 + 4 * 16 * 768 * 3072)
    of_images += 2 * 16 * 16 * 16 * 3 * 768
    pooled = 4 * 16 * 768**2 + 4 * 256 * 16 * 768  # keys and values, what 256 queries make of them
    assert counted(frames=1) == plain
    assert counted(frames=4) - plain == 3 * (of_images + pooled)
    stem = 2 * 9 * 32 * 32 * 8 * 3 + 2 * 9 * 16 * 16 * 16 * (8 + 2 * 16)
    patches = 2 * 16 * 768 * (4 * 4 * 16 - 16 * 16 * 3)
    assert counted(conv_widths=(8, 16), conv_depths=(0, 1)) - plain == stem + patches


def test_a_step_s_flops_are_of_what_is_read_and_trained():
    config = Config().change({"steps": 1, "optimizer.warmup_steps": 0})
    parts = flops.forward_flops(config.model)
    whole = 3 * flops.model_flops(config.model)

    def saved(changes):
        return whole - flops.step_flops(config.change(changes))

    assert saved({}) == saved({"optimizer.lora_rank": 4, "optimizer.name": "adamw"}) == 0
    frozen, alone = {"optimizer.image_learning_rate": 0.0}, {"loss.contrastive_weight": 0.0}
    assert saved(frozen) == 2 * parts["encoder"] > 0.2 * whole
    assert saved(frozen | {"data.features": "kept"}) == 3 * parts["encoder"]
    contrastive = {"loss.captioning_weight": 0.0}
    unread = parts["multimodal"] + parts["softmax"]
    assert saved(contrastive) == 3 * unread > 0.2 * whole
    parallel = {"model.pooler.kind": "parallel"}
    pooled = saved(contrastive | parallel) - saved(parallel)
    assert pooled == 3 * (unread + parts["generative_pooler"])  # no embedding reads it
    embedded = parts["contrastive_pooler"] + parts["image_joint"] + parts["text_joint"]
    assert saved(alone) == 3 * embedded
    kept = parts["encoder"] + parts["generative_pooler"] + parts["unimodal"]
    assert saved(alone | {"optimizer.keep_embeddings": True}) == 3 * embedded + 2 * kept


def test_a_step_s_flops_leave_out_what_is_not_computed():
    config = Config().change({"steps": 1, "optimizer.warmup_steps": 0})

    def saved(changes):
        return flops.step_flops(config) - flops.step_flops(config.change(changes))

    def attention(queries, places, width):  # of what grows with the number of places
        return 4 * places * width**2 + 4 * queries * places * width

    model, least = config.model, 64  # of 256 patches, each 18 x 18 x 3
    width, depth, queries = model.image.width, model.image.depth, model.pooler.num_queries
    assert model.num_patches == 256 == 4 * least

    def blocks(n):
        return depth * (attention(n, n, width) + 4 * n * width**2 + 4 * n * width * 4 * width)

    pooled = attention(queries, 256 - least, width)
    left_out = blocks(256) - blocks(least) + pooled
    whole = flops.step_flops(config)
    assert saved({"model.image.patch_dropout": 0.75}) == 3 * left_out > 0.2 * whole
    embedded = 2 * (256 - least) * 18 * 18 * 3 * width
    native = {"data.resize": "native", "data.augment": "none"}
    assert saved(native) == 0
    assert saved(native | {"data.max_patches": least}) == 3 * (left_out + embedded)
    hidden = model.text.multimodal_depth * attention(model.text.max_len, queries - 90, width)
    assert saved({"model.pooler.token_dropout": 0.65}) == 3 * hidden
    head = {"head.kind": "classification", "loss.contrastive_weight": 0.0}
    head |= {"loss.captioning_weight": 0.0}
    less = saved(head | {"model.image.patch_dropout": 0.75}) - saved(head)
    assert less == 3 * (blocks(256) - blocks(least) + attention(1, 256 - least, width))


def test_hidden_patches_take_a_pass_that_learns_and_one_of_the_averaged_encoder():
    """Over all patches, though the other losses' pass leaves three in four out."""
    changes = {"steps": 1, "optimizer.warmup_steps": 0, "model.image.patch_dropout": 0.75}
    config = Config().change(changes)
    hidden = config.change({"loss.hidden_weight": 1.0, "optimizer.ema": 0.99})
    encoder, width = flops.forward_flops(config.model)["encoder"], config.model.image.width
    more = flops.step_flops(hidden) - flops.step_flops(config)
    assert more == 3 * (encoder + 2 * 256 * width**2) + encoder


@pytest.mark.parametrize("kind", ["classification", "answer", "pair"])
def test_a_step_of_a_head_alone_counts_what_the_head_needs(kind):
    alone = {"loss.contrastive_weight": 0.0, "loss.captioning_weight": 0.0, "head.kind": kind}
    config = Config().change({"steps": 1, "optimizer.warmup_steps": 0, **alone})
    parts, model = flops.forward_flops(config.model), config.model
    read, places, source = parts["encoder"], model.num_patches, model.image.width
    if kind != "classification":
        read += sum(parts[part] for part in ("generative_pooler", "unimodal", "multimodal"))
        places, source = model.text.max_len, model.text.width
    queries, width, images = config.head.num_queries, model.text.width, 1 + (kind == "pair")
    head = 4 * queries * width**2 + 4 * places * (source + queries) * width
    assert flops.step_flops(config) == images * 3 * (read + head)
    locked = config.change({"optimizer.encoder_learning_rate": 0.0})
    assert flops.step_flops(locked) == images * (read + 3 * head)


def test_every_field_that_a_loss_reads_has_its_parts():
    read = {field for objective in losses.OBJECTIVES for field in objective.outputs}
    parts = set(flops.forward_flops(Config().model)) | {"head", "hidden", "teacher"}
    assert all(flops.reads(Config(), field) <= parts for field in read)


def test_a_field_whose_parts_nothing_tells_is_named():
    with pytest.raises(ValueError, match=r"output 'told_length' depends on; add it to `reads` of"):
        flops.reads(Config(), "told_length")
