"""Dual encoders train: gradients and token ids are those of transformers, locked sides stay."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from coca_jax.checkpoints import manager
from coca_jax.cli import convert
from coca_jax.config import Config, read
from coca_jax.data import tower_texts, vocabulary
from coca_jax.interop import export_format
from coca_jax.interop.towers_weights import TowersLayout
from coca_jax.models import network
from coca_jax.training import recipes, train_step
from coca_jax.training.trainer import train

torch = pytest.importorskip("torch", reason="needs the extra 'parity'")
transformers = pytest.importorskip("transformers", reason="needs the extra 'parity'")
pytestmark = pytest.mark.torch

CAPTIONS = ["A photo of a cat!", "two dogs, in a park", "it is a dog", "a park; it is big"]
SIZES = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
NAMES = dict(clip=("CLIPConfig", "CLIPModel"), siglip=("SiglipConfig", "SiglipModel"))


def converted(kind, folder):
    """(a random model of transformers, the folder of its weights converted)."""
    text, more = dict(SIZES, vocab_size=49408), dict(projection_dim=24)
    if kind == "siglip":
        text, more = dict(SIZES, vocab_size=330, max_position_embeddings=16), {}
        text["projection_size"] = 48
    image = dict(SIZES, image_size=32, patch_size=8)
    config, model = (getattr(transformers, name) for name in NAMES[kind])
    torch.manual_seed(0)
    original = model(config(vision_config=image, text_config=text, **more))
    with torch.no_grad():
        for name, x in original.named_parameters():
            if "logit" not in name:
                x.add_(0.1 * torch.randn(x.shape))
    original.save_pretrained(folder / "files")
    if kind == "siglip":
        words = str(folder / "files/spiece.model")
        vocabulary.train(CAPTIONS * 9, 310, words, 0)
        transformers.SiglipTokenizer(words).save_pretrained(folder / "files")
    convert.from_open_clip(str(folder / "files"), str(folder / "weights"))
    return original.eval(), folder / "weights"


def recipe(weights, **changes):
    config = recipes.load(f"finetune_towers:{weights}")
    config.model.dtype, config.batch_size, config.epochs = "float32", 8, 0.0
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 1
    return read(Config, config).change(dict(steps=4) | changes)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(1)
    with open(folder / "metadata.jsonl", "w") as file:
        for number in range(16):
            pixels = rng.integers(0, 256, (32, 32, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
            one = dict(file_name=f"{number}.png", text=CAPTIONS[number % 4])
            print(json.dumps(one), file=file)
    return folder


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_token_ids_and_gradients_equal_those_of_transformers(kind, tmp_path):
    original, weights = converted(kind, tmp_path)
    config = recipe(weights).change({"loss.reduction": "sum", "loss.duplicate_texts": "negatives"})
    assert config.loss.contrastive == ("sigmoid" if kind == "siglip" else "softmax")
    words = vocabulary.load(export_format.vocabulary_path(str(weights)))
    tokens, valid, _ = tower_texts.encode(CAPTIONS, words, config.model)
    if kind == "siglip":
        its_own = transformers.AutoTokenizer.from_pretrained(tmp_path / "files")
        wanted = its_own(CAPTIONS, padding="max_length", truncation=True, max_length=16).input_ids
        np.testing.assert_array_equal(tokens, wanted)
    image = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    batch = dict(image=image, tokens=tokens, text_valid=valid, is_label=np.zeros(4, bool))
    batch["text_id"] = np.arange(8, dtype=np.int32).reshape(4, 2)
    params, _ = export_format.read_export(str(weights))
    module = network.build(config.model, loss=config.loss)
    gradients, metrics = train_step.value_and_gradients(
        jax.tree.map(np.asarray, params), module, config, batch, jax.random.key(0)
    )
    model = config.model
    pixels = (image / 255 - np.array(model.image_mean)) / np.array(model.image_std)
    out = original(
        pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2)).float(),
        input_ids=torch.from_numpy(tokens).long(),
        return_loss=True,
    )
    scale = 1.0 if kind == "siglip" else 2.0  # transformers takes the mean of both directions
    (scale * out.loss).backward()
    assert float(metrics["loss"]) == pytest.approx(scale * out.loss.item(), rel=1e-5)
    wanted = {name: x.grad.numpy() for name, x in original.named_parameters()}
    layout = TowersLayout(model, wanted, "logit_bias" in wanted)
    found = layout.write(export_format.flatten(jax.tree.map(np.asarray, gradients)))
    for name, blocks in found.items():
        if "k_proj.bias" in name or "in_proj_bias" in name:
            continue  # of keys it is 0
        given = np.concatenate([np.ravel(block) for block in blocks.parts()])
        there = wanted[name].ravel()
        assert np.abs(given - there).max() <= 1e-5 * max(np.abs(there).max(), 1e-3), name


@pytest.mark.parametrize("locked", ["image", "text"])
def test_a_locked_tower_stays_bit_for_bit_up_to_its_embedding(locked, photos, tmp_path):
    _, weights = converted("clip", tmp_path)
    changes = {
        f"optimizer.{locked}_learning_rate": 0.0,
        "data.sources": (dict(path=str(photos), split="train", kind="caption"),),
        "optimizer.ema": 0.9,
    }
    result = train(recipe(weights, **changes), str(tmp_path / "run"))
    assert result["steps"] == 4
    before = export_format.flatten(export_format.read_export(str(weights))[0])
    after = export_format.flatten(manager.load_params(str(tmp_path / "run"))[0])
    equal = {name for name in before if np.array_equal(before[name], after[name])}
    own = dict(
        image=("image_encoder", "pooled_norm", "image_to_joint"),
        text=("text_decoder", "text_to_joint"),
    )[locked]
    assert {name for name in before if name.startswith(own)} == equal
    longer = recipe(weights, **changes, steps=6)
    assert train(longer, str(tmp_path / "run"))["steps"] == 6


def test_losses_of_a_decoder_are_refused(tmp_path):
    _, weights = converted("clip", tmp_path)
    config = recipe(weights, **{"data.sources": (dict(path="x", kind="caption"),)})
    with pytest.raises(ValueError, match="captioning_weight=1.0 does not go with model.family"):
        config.change({"loss.captioning_weight": 1.0}).check()
