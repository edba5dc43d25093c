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
from test_convert import (
    as_tensors,
    assert_equal_digests,
    digests_of,
    each_loss,
    forward,
    greedy,
    relative,
    with_keys,
)

import coca_jax
from coca_jax import convert, export_format
from coca_jax.config import Model, read
from coca_jax.data import images
from coca_jax.data.vocabulary.clip_bpe import ClipBpe
from coca_jax.inference.generation import loop
from coca_jax.inference.generation.settings import Settings
from coca_jax.interop import open_clip_config, safetensors_file
from coca_jax.interop.open_clip_layout import Layout
from coca_jax.models import coca, decoding

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
    embed = jax.jit(lambda p, x: pair.ours.apply({"params": p}, x, method="encode_image")[0])
    low = pair.model_config.change(dict(dtype="bfloat16"))
    half = coca.build(low)
    embed_half = jax.jit(lambda p, x: half.apply({"params": p}, x, method="encode_image")[0])
    pixels = cases.pixels(50, size)
    for start in range(0, 50, 10):
        part = pixels[start : start + 10]
        with torch.no_grad():
            wanted = pair.theirs.encode_image(torch.from_numpy(part.transpose(0, 3, 1, 2).copy()))
        wanted = torch.nn.functional.normalize(wanted, dim=-1).numpy()
        assert relative(embed(pair.params, part), wanted) < 2e-5
        assert relative(embed_half(pair.params, part), wanted) < 2e-2
    pixels = pixels[:texts]
    wanted = pair.oracle.run(pair.theirs, pixels, pair.tokens)
    labels = pair.tokens[:, 1:] != 0
    for model, tolerance in ((pair.ours, 2e-5), (half, 2e-2)):
        out = forward(model, pair.params, pixels, pair.tokens)
        assert relative(out.image_embedding, wanted["image_features"]) < tolerance
        assert relative(out.text_embedding, wanted["text_features"]) < tolerance
        logits = np.asarray(out.logits[:, :-1])[labels]
        assert relative(logits, wanted["logits"][labels]) < tolerance
    assert out.image_tokens.shape == wanted["image_tokens"].shape


def test_losses_and_gradients_of_every_tensor(pair):
    """In float32. The decoder of coca_ViT-L-14 has gradients so small that rounding alone moves
    them by up to 7e-4 in either program; see docs/open_clip.md."""
    tolerance = 1e-3 if pair.model_config.image.depth == 24 else 1e-4
    pixels = cases.pixels(len(pair.tokens), pair.model_config.image_size)
    theirs = pair.oracle.losses(pair.theirs, pixels, pair.tokens)
    ours = each_loss(pair.ours, pair.params, pixels, pair.tokens)
    for (value, gradients), (loss, wanted) in zip(ours, theirs, strict=True):
        assert value == pytest.approx(loss, rel=1e-5)
        found = as_tensors(pair.model_config, gradients)
        assert set(found) == set(wanted)
        for key, tensor in wanted.items():
            scale = max(np.abs(tensor).max(), 1e-12)
            assert np.abs(found[key] - tensor).max() <= tolerance * scale, key


def test_losses_and_gradients_in_float64(pair):
    """Both sides in float64, where rounding hides nothing: the same function to 1e-10."""
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
        for (value, gradients), (loss, digests) in zip(ours, wanted, strict=True):
            assert value == pytest.approx(loss, rel=1e-12)
            assert_equal_digests(digests_of(as_tensors(config, gradients)), digests, 1e-10)


def test_greedy_captions(pair):
    """By whole passes over each prefix, and by the cached decoder."""
    text = pair.model_config.text
    length = min(text.max_len, 20)
    bos, eos = text.vocab_size - 2, text.vocab_size - 1
    pixels = cases.pixels(4, pair.model_config.image_size)
    wanted = pair.oracle.greedy(pair.theirs, pixels, length, [bos], eos)
    if text.max_len < 20:  # small: the slow way too
        whole = greedy(pair.ours, pair.params, pixels, length, text.vocab_size)
        np.testing.assert_array_equal(whole, wanted)
    np.testing.assert_array_equal(cached(pair, pair.params, pixels, length, [bos]), wanted)


def cached(pair, params, pixels, length, prompt):
    """Greedy captions by the cached decoder: int [B, length], prompt included, zeros at the end."""
    text, count = pair.model_config.text, len(pixels)
    spec = decoding.decoder(
        pair.model_config,
        num_ids=text.vocab_size,
        eos_id=text.vocab_size - 1,
        hidden_id=ClipBpe.hidden_id,
    )
    embed = jax.jit(lambda p, x: pair.ours.apply({"params": p}, x, method="encode_image"))
    captions = loop.generate(
        spec,
        decoding.pack(spec, params),
        embed(params, pixels)[1],
        np.tile(np.int32(prompt), (count, 1)),
        np.full(count, len(prompt), np.int32),
        Settings(max_tokens=length - len(prompt)),
    )
    found = np.zeros((count, length), np.int32)
    found[:, : len(prompt)] = prompt
    for row, new in enumerate(np.asarray(captions.length[:, 0])):
        found[row, len(prompt) :][:new] = captions.tokens[row, 0, :new]
    return found


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
    from coca_jax import prepare, train
    from coca_jax.configs import finetune_open_clip
    from coca_jax.importers.items import Options

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


@pytest.mark.parametrize("pool", ["cascade", "parallel"])
def test_two_poolers_and_the_corrected_mask(pool):
    """coca2's arrangement. open_clip 3.3.0 has its parts, but joins them wrongly and has no
    configuration for the mask, so the test joins them as later versions do."""
    import open_clip_oracle as oracle
    from open_clip.transformer import AttentionalPooler, LayerNorm

    changes = dict(vision_cfg=dict(attentional_pool=pool), text_cfg=dict(correct_cls_mask=True))
    config = with_keys(cases.SMALL, **changes) | dict(quick_gelu=True)
    theirs = open_clip.coca_model.CoCa(
        **{
            key: value
            for key, value in with_keys(config, text_cfg=dict()).items()
            if key != "custom_text"
        }
        | dict(text_cfg=cases.SMALL["text_cfg"])
    )
    theirs.text.correct_cls_mask = True
    vision = theirs.visual
    vision.ln_post, vision.proj = LayerNorm(64), None
    if pool == "cascade":
        vision.attn_pool_contrastive = AttentionalPooler(48, 48, n_head=4, n_queries=1)
    original = vision._pool
    vision._pool = lambda x: (original(x)[0][:, 0], original(x)[1])
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            tensor.copy_(torch.from_numpy(cases.redraw(name, tuple(tensor.shape))))
    theirs.eval()
    model_config = read(Model, open_clip_config.to_model(config))
    layout = Layout(model_config)
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    layout.check(state)
    params = export_format.unflatten(
        {
            path: np.concatenate([np.ravel(part) for part in blocks.parts()]).reshape(blocks.shape)
            for path, blocks in layout.read(state).items()
        }
    )
    tokens, pixels = cases.captions(530, 12), cases.pixels(6, 32)
    out = forward(coca.build(model_config), params, pixels, tokens)
    wanted = oracle.run(theirs, pixels, tokens)
    labels = tokens[:, 1:] != 0
    assert relative(out.image_embedding, wanted["image_features"]) < 2e-5
    assert relative(out.text_embedding, wanted["text_features"]) < 2e-5
    assert relative(np.asarray(out.logits[:, :-1])[labels], wanted["logits"][labels]) < 2e-5
    for key, (shape, parts) in layout.write(export_format.flatten(params)).items():
        back = np.concatenate([np.ravel(part) for part in parts()]).reshape(shape)
        np.testing.assert_array_equal(back, state[key])


BLOCKS = dict(
    vision_cfg=dict(ls_init_value=0.1, qk_norm=True, norm_kwargs=dict(eps=1e-3)),
    text_cfg=dict(act_kwargs=dict(approximate="tanh"), qk_norm=True),
    multimodal_cfg=dict(ls_init_value=0.2),
)
OTHERS = dict(
    blocks=BLOCKS,
    wide=dict(vision_cfg=dict(image_size=[16, 40])),
    tall_with_wide_patches=dict(vision_cfg=dict(image_size=[48, 32], patch_size=[8, 16])),
    no_pooler=dict(
        vision_cfg=dict(attentional_pool=False),
        text_cfg=dict(width=64, heads=4),
        multimodal_cfg=dict(width=64, heads=4),
    ),
    square_with_tall_patches=dict(vision_cfg=dict(patch_size=[16, 8])),
)


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS)
def test_other_layouts_come_in_and_go_back(changes):
    """LayerScale, QK-norm, other eps and tanh GELU, each in some towers, and images and patches
    that are not square, in outputs and gradients; what comes back is the same configuration and
    the same tensors."""
    import open_clip_oracle as oracle

    config = with_keys(cases.SMALL, **changes)
    theirs = oracle.build(config)
    model_config = read(Model, open_clip_config.to_model(config))
    back = open_clip_config.from_model(model_config)
    assert open_clip_config.to_model(back) == open_clip_config.to_model(config)
    json.dumps(back)
    layout = Layout(model_config)
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    layout.check(state)
    params = export_format.unflatten(
        {
            path: np.concatenate([np.ravel(part) for part in blocks.parts()]).reshape(blocks.shape)
            for path, blocks in layout.read(state).items()
        }
    )
    for key, (shape, parts) in layout.write(export_format.flatten(params)).items():
        written = np.concatenate([np.ravel(part) for part in parts()]).reshape(shape)
        np.testing.assert_array_equal(written, state[key])
    tokens, pixels = cases.captions(530, 12), cases.pixels(6, model_config.image_size)
    ours = coca.build(model_config)
    for (value, gradients), (loss, wanted) in zip(
        each_loss(ours, params, pixels, tokens), oracle.losses(theirs, pixels, tokens), strict=True
    ):
        assert value == pytest.approx(loss, rel=1e-5)
        found = as_tensors(model_config, gradients)
        for key, tensor in wanted.items():
            if key.endswith("attn.ln_k.bias"):  # softmax does not see it: rounding alone
                assert np.abs(found[key]).max() == 0 and np.abs(tensor).max() < 1e-6
                continue
            scale = max(np.abs(tensor).max(), 1e-12)
            assert np.abs(found[key] - tensor).max() <= 1e-4 * scale, key
    wanted = oracle.run(theirs, pixels, tokens)
    out, labels = forward(ours, params, pixels, tokens), tokens[:, 1:] != 0
    assert relative(out.image_embedding, wanted["image_features"]) < 1e-5
    assert relative(out.text_embedding, wanted["text_features"]) < 1e-5
    assert relative(np.asarray(out.logits[:, :-1])[labels], wanted["logits"][labels]) < 1e-5


def test_preprocessing_of_100_odd_images():
    from open_clip.transform import image_transform
    from PIL import Image

    transform = image_transform(224, is_train=False)
    mean = np.asarray(open_clip_config.MEAN, np.float32)
    std = np.asarray(open_clip_config.STD, np.float32)
    for image in cases.odd_images(100):
        rgb = images.decode(image)
        got = images.preprocess_eval(rgb, 224, "crop").astype(np.float32) / 255
        # To RGB first, as open_clip's own loader does.
        wanted = transform(Image.fromarray(rgb)).numpy().transpose(1, 2, 0) * std + mean
        assert np.abs(got - wanted).max() <= 2 / 255, (image.mode, image.size)
        if image.mode not in ("I;16", "RGBA"):
            np.testing.assert_array_equal(rgb, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("size", [(96, 224), (224, 63)])
def test_preprocessing_of_odd_images_to_sizes_that_are_not_square(size):
    from open_clip.transform import image_transform
    from PIL import Image

    transform = image_transform(size, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))
    for image in cases.odd_images(30):
        rgb = images.decode(image)
        got = images.preprocess_eval(rgb, size, "crop").astype(np.float32) / 255
        wanted = transform(Image.fromarray(rgb)).numpy().transpose(1, 2, 0)
        assert got.shape == (*size, 3) and np.abs(got - wanted).max() <= 2 / 255, image.size


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
    back = safetensors_file.read(tmp_path / "back" / convert.WEIGHTS_NAME)
    for key, tensor in state.items():
        np.testing.assert_array_equal(back[key], tensor.float().numpy())
    assert ClipBpe((tmp_path / "out/vocabulary.bpe.gz").read_bytes()).size == 530
