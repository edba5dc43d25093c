"""Everything that open_clip computes against open_clip itself, from one converted file.

Needs torch and open_clip (pip install -e '.[parity]'); tests/test_convert.py checks the same
against golden outputs without them. COCA_JAX_LARGE_PARITY=1 adds coca_ViT-L-14 (20 GiB, minutes).
"""

import copy
import json
import os
import pathlib

import jax
import numpy as np
import open_clip_cases as cases
import pytest
from conversion_cases import (
    as_tensors,
    assert_equal_digests,
    digests_of,
    each_loss,
    forward,
    relative,
)

import coca_jax
from coca_jax.cli import convert
from coca_jax.config import Model, read
from coca_jax.data.vocabulary.clip_bpe import ClipBpe
from coca_jax.inference.generation import driver
from coca_jax.inference.generation.config import GenerationConfig
from coca_jax.interop import export_format, open_clip_config, safetensors
from coca_jax.interop.open_clip_weights import Layout
from coca_jax.models import coca, text_decoder

torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[parity]'")
open_clip = pytest.importorskip("open_clip", reason="needs open_clip: pip install -e '.[parity]'")
pytestmark = pytest.mark.torch
large = pytest.mark.skipif(
    not os.environ.get("COCA_JAX_LARGE_PARITY"), reason="COCA_JAX_LARGE_PARITY is not set"
)
CONFIGS = {"small": cases.SMALL} | open_clip_config.RELEASED
MODELS = [
    "small",
    pytest.param("coca_ViT-B-32", marks=pytest.mark.slow),
    pytest.param("coca_ViT-L-14", marks=[pytest.mark.slow, large]),
]


class Pair:
    """A model of open_clip with weights drawn again, and its conversion."""

    def __init__(self, name, folder):
        import open_clip_oracle

        self.oracle = open_clip_oracle
        self.config = CONFIGS[name]
        self.theirs = open_clip_oracle.build(self.config)
        self.file = folder / "epoch_3.pt"
        state = {f"module.{key}": value for key, value in self.theirs.state_dict().items()}
        torch.save({"epoch": 3, "name": name, "state_dict": state}, self.file)
        json_file = folder / convert.CONFIG_NAME
        json_file.write_text(json.dumps(self.config))
        (folder / "vocabulary.bpe.gz").write_bytes(cases.small_merges())
        self.export = folder / "export"
        convert.from_open_clip(str(self.file), str(self.export))
        self.params, config = export_format.read_export(self.export)
        self.model_config = config.model
        self.ours = coca.build(self.model_config)
        self.embed = jax.jit(lambda p, x: self.ours.apply({"params": p}, x, method="encode_image"))
        self.tokens = cases.captions(config.model.text.vocab_size, config.model.text.max_len)


@pytest.fixture(scope="module", params=MODELS)
def pair(request, tmp_path_factory):
    return Pair(request.param, tmp_path_factory.mktemp("parity"))


def test_the_released_configurations_are_open_clip_s():
    for name, config in open_clip_config.RELEASED.items():
        theirs = open_clip.get_model_config(name)
        assert open_clip_config.to_model(theirs) == open_clip_config.to_model(config)


def test_open_clip_s_json_files_are_read_or_refused_by_name():
    """Every CoCa configuration that the package ships, as --model=PATH."""
    folder = pathlib.Path(open_clip.__file__).parent / "model_configs"
    said = {}
    for path in sorted(folder.glob("coca*.json")):
        config, *_ = convert._model_config("weights.bin", str(path), {})
        try:
            said[path.stem] = len(Layout(read(Model, open_clip_config.to_model(config))).tensors())
        except ValueError as error:
            said[path.stem] = str(error)
    assert (said["coca_ViT-B-32"], said["coca_ViT-L-14"]) == (629, 773)
    assert said["coca_base"] == 618  # no pooler: the decoder sees 256 patches of width 768
    assert "text_cfg.hf_model_name='roberta-base'" in said["coca_roberta-ViT-B-32"]


def test_outputs_of_50_images(pair):
    """Embeddings of all, logits at label positions for captions of every kind."""
    size, texts = pair.model_config.image_size, len(pair.tokens)
    half = coca.build(pair.model_config.change(dict(dtype="bfloat16")))
    pixels = cases.pixels(50, size)
    captions = np.resize(pair.tokens, (10, pair.tokens.shape[1]))  # the first ones again
    for start in range(0, 50, 10):
        part = pixels[start : start + 10]
        with torch.no_grad():
            wanted = pair.theirs.encode_image(torch.from_numpy(part.transpose(0, 3, 1, 2).copy()))
        wanted = torch.nn.functional.normalize(wanted, dim=-1).numpy()
        for model, tolerance in ((pair.ours, 2e-5), (half, 2e-2)):
            out = forward(model, pair.params, part, captions)
            assert relative(out.image_embedding, wanted) < tolerance
    wanted = pair.oracle.run(pair.theirs, pixels[:texts], pair.tokens)
    labels = pair.tokens[:, 1:] != 0
    for model, tolerance in ((pair.ours, 2e-5), (half, 2e-2)):
        out = forward(model, pair.params, pixels[:10], captions)
        assert relative(out.image_embedding[:texts], wanted["image_features"]) < tolerance
        assert relative(out.text_embedding[:texts], wanted["text_features"]) < tolerance
        logits = np.asarray(out.logits)[:texts, :-1][labels]
        assert relative(logits, wanted["logits"][labels]) < tolerance
    assert out.image_tokens[:texts].shape == wanted["image_tokens"].shape


def test_losses_and_gradients_of_every_tensor(pair):
    """In float32. The decoder of coca_ViT-L-14 has gradients so small that rounding alone moves
    them by up to 7e-4 in either program; see docs/open_clip.md."""
    tolerance = 1e-3 if pair.model_config.image.depth == 24 else 1e-4
    pixels = cases.pixels(len(pair.tokens), pair.model_config.image_size)
    theirs = pair.oracle.losses(pair.theirs, pixels, pair.tokens)
    ours = each_loss(pair.ours, pair.params, pixels, pair.tokens)
    for (value, gradients, _), (loss, wanted) in zip(ours, theirs, strict=True):
        assert value == pytest.approx(loss, rel=1e-5)
        found = as_tensors(pair.model_config, gradients)
        assert set(found) == set(wanted)
        for key, tensor in wanted.items():
            scale = max(np.abs(tensor).max(), 1e-12)
            assert np.abs(found[key] - tensor).max() <= tolerance * scale, key


@pytest.mark.parametrize("pair", MODELS[1:], indirect=True)
def test_losses_and_gradients_in_float64(pair):
    """Both sides in float64, where rounding hides nothing: the same function to 1e-10. Of the small
    model test_convert.py has them."""
    pixels = cases.pixels(len(pair.tokens), pair.model_config.image_size)
    exact = copy.deepcopy(pair.theirs).double()
    exact.set_grad_checkpointing(True)
    theirs = pair.oracle.losses(exact, pixels, pair.tokens)
    wanted = [(loss, digests_of(tensors)) for loss, tensors in theirs]
    del exact, theirs
    config = pair.model_config.change(dict(dtype="float64"))
    with jax.enable_x64(True):
        model = coca.build(config, remat="full")
        ours = each_loss(model, pair.params, pixels, pair.tokens)
        for (value, gradients, _), (loss, digests) in zip(ours, wanted, strict=True):
            assert value == pytest.approx(loss, rel=1e-12)
            assert_equal_digests(digests_of(as_tensors(config, gradients)), digests, 1e-10)


def test_greedy_captions(pair):
    """By the cached decoder; test_convert.py has those of whole passes over each prefix."""
    text = pair.model_config.text
    length = min(text.max_len, 20)
    bos, eos = text.vocab_size - 2, text.vocab_size - 1
    pixels = cases.pixels(8, pair.model_config.image_size)
    wanted = pair.oracle.greedy(pair.theirs, pixels, length, [bos], eos)
    np.testing.assert_array_equal(cached(pair, pair.params, pixels, length, [bos]), wanted)


def cached(pair, params, pixels, length, prompt):
    """Greedy captions by the cached decoder: int [B, length], prompt included, zeros at the end."""
    text, count = pair.model_config.text, len(pixels)
    spec = text_decoder.decoder(
        pair.model_config,
        num_ids=text.vocab_size,
        eos_id=text.vocab_size - 1,
        hidden_id=ClipBpe.hidden_id,
    )
    captions = driver.generate(
        spec,
        text_decoder.pack(spec, params),
        pair.embed(params, pixels)[1],
        np.tile(np.int32(prompt), (count, 1)),
        np.full(count, len(prompt), np.int32),
        GenerationConfig(max_new_tokens=length - len(prompt)),
    )
    found = np.zeros((count, length), np.int32)
    found[:, : len(prompt)] = prompt
    for row, new in enumerate(np.asarray(captions.length[:, 0])):
        found[row, len(prompt) :][:new] = captions.tokens[row, 0, :new]
    return found


@pytest.mark.long
def test_greedy_captions_with_id_0_inside(pair):
    """Padding by value: a generated id 0, or one in the prompt, hides a key from later tokens."""
    text = pair.model_config.text
    if text.vocab_size != 530:
        pytest.skip("the small model shows it")
    length, bos, eos = text.max_len, text.vocab_size - 2, text.vocab_size - 1
    pixels = cases.pixels(8, pair.model_config.image_size)
    plain = pair.oracle.greedy(pair.theirs, pixels, length, [bos], eos)
    theirs = copy.deepcopy(pair.theirs)
    head = theirs.text_decoder.text_projection
    with torch.no_grad():  # id 0 comes where the most frequent token came
        ids, counts = np.unique(plain[:, 1:-1], return_counts=True)
        head[:, 0] = 1.01 * head[:, ids[counts.argmax()]]
    params = jax.tree.map(np.array, pair.params)
    params["text_decoder"]["head"]["kernel"]["value"] = head.detach().numpy()
    for prompt in ([bos], [bos, 7, 0, 11], [bos, 9, 0]):
        wanted = pair.oracle.greedy(theirs, pixels, length, prompt, eos)
        inside = wanted[:, len(prompt) : -1] == 0
        ended = np.cumsum(wanted == eos, axis=1)[:, len(prompt) : -1] > 0
        assert (inside & ~ended).sum() >= 4
        np.testing.assert_array_equal(cached(pair, params, pixels, length, prompt), wanted)
    # open_clip's own loop stops at the first id 0, as at the end symbol.
    wanted = pair.oracle.generate(theirs, pixels, length, bos, eos)
    found = cached(pair, params, pixels, length, [bos])
    for row in range(8):
        ends = np.isin(wanted[row, 1:-1], (0, eos))  # it forces an end symbol to the last place
        count = 2 + int(ends.argmax()) if ends.any() else length - 1
        np.testing.assert_array_equal(found[row, :count], wanted[row, :count])


def test_export_loads_strictly_and_gives_the_same_bits(pair, tmp_path):
    from safetensors.torch import load_file

    model_cfg, _ = convert.to_open_clip(str(pair.export), str(tmp_path))
    parts = {k: v for k, v in model_cfg.items() if k != "custom_text"}
    again = open_clip.coca_model.CoCa(**parts).eval()
    again.load_state_dict(load_file(tmp_path / convert.WEIGHTS_NAME), strict=True)
    for key, tensor in pair.theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    pixels = cases.pixels(2, pair.model_config.image_size)
    before = pair.oracle.run(pair.theirs, pixels, pair.tokens[:2])
    after = pair.oracle.run(again, pixels, pair.tokens[:2])
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)


@pytest.mark.slow
def test_a_tuned_run_goes_back(pair, tmp_path):
    """Converted, tuned on images in files with both losses, and back: open_clip loads it strictly
    and computes what the run does."""
    if pair.model_config.text.vocab_size != 530:
        pytest.skip("the small model shows it")
    from coca_jax.cli import prepare, train
    from coca_jax.data.sources.items import Options
    from coca_jax.recipes import finetune_open_clip

    folder = tmp_path / "images"
    folder.mkdir()
    lines = []
    for index, image in enumerate(cases.odd_images(24)[8:]):
        image.convert("RGB").save(folder / f"{index}.png")
        text = ["a photo of the cat", "the dog and a photo"][index % 2]
        lines.append(json.dumps(dict(file_name=f"{index}.png", text=text)))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    data = str(tmp_path / "data")
    options = dict(split="train", options=Options(), progress=False, processes=1)
    prepare.prepare("imagefolder", str(folder), data, **options)
    config = finetune_open_clip.get_config(str(pair.export))
    config.data.sources = (dict(path=data, split="train", kind="caption", weight=1.0),)
    config.batch_size, config.epochs, config.loss.caption_chunk = 8, 1.0, 32
    config.model.dtype = "float32"
    config.optimizer.update(warmup_steps=1, learning_rate=1e-3)
    config.mesh.update(data=2, fsdp=4)
    train.train(config, str(tmp_path / "run"))

    convert.to_open_clip(str(tmp_path / "run"), str(tmp_path / "back"))
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'back'}").eval()
    moved = {
        key: (tensor - pair.theirs.state_dict()[key]).abs().max().item()
        for key, tensor in theirs.state_dict().items()
    }
    assert sum(value > 1e-4 for value in moved.values()) > len(moved) / 2
    pixels = cases.pixels(len(pair.tokens), pair.model_config.image_size)
    wanted = pair.oracle.run(theirs, pixels, pair.tokens)
    out = coca_jax.load(str(tmp_path / "run")).forward(pixels, pair.tokens)
    labels = pair.tokens[:, 1:] != 0
    assert relative(out.image_embedding, wanted["image_features"]) < 2e-5
    assert relative(out.text_embedding, wanted["text_features"]) < 2e-5
    assert relative(out.logits[:, :-1][labels], wanted["logits"][labels]) < 2e-5


def test_the_folder_is_one_that_open_clip_loads_by_itself(pair, tmp_path):
    convert.to_open_clip(str(pair.export), str(tmp_path))
    model = open_clip.create_model(f"local-dir:{tmp_path}")
    for key, tensor in pair.theirs.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key


def test_a_half_precision_file(tmp_path):
    """Weights in float16 or bfloat16 are converted to the float32 of the same value."""
    folder = tmp_path / "in"
    folder.mkdir()
    state = {
        key: torch.from_numpy(cases.redraw(key, shape)).bfloat16()
        for key, shape in Layout(read(Model, open_clip_config.to_model(cases.SMALL)))
        .tensors()
        .items()
    }
    torch.save(state, folder / "open_clip_pytorch_model.bin")
    (folder / convert.CONFIG_NAME).write_text(json.dumps(cases.SMALL))
    (folder / "vocabulary.bpe.gz").write_bytes(cases.small_merges())
    convert.from_open_clip(str(folder), str(tmp_path / "out"))
    convert.to_open_clip(str(tmp_path / "out"), str(tmp_path / "back"))
    back = safetensors.read(tmp_path / "back" / convert.WEIGHTS_NAME)
    for key, tensor in state.items():
        np.testing.assert_array_equal(back[key], tensor.float().numpy())
    assert ClipBpe((tmp_path / "out/vocabulary.bpe.gz").read_bytes()).size == 530
