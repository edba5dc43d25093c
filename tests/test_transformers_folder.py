"""`convert --to=transformers`: every recipe's model in PyTorch, in a process without coca_jax."""

import importlib
import json
import os
import pathlib
import pkgutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from kept_models import no_compile_cache  # noqa: F401
from one_device import models_on_one  # noqa: F401
from PIL import Image
from test_inference import TEXTS, random_params

import coca_jax
from coca_jax import inference, recipes
from coca_jax.cli import convert
from coca_jax.config import heads, typed
from coca_jax.data import videos, vocabulary
from coca_jax.data.vocabulary import clip_bpe
from coca_jax.inference import export_folder, preprocess
from coca_jax.interop import transformers_folder
from coca_jax.models import coca

# What a user of PyTorch runs. It writes what it found beside each folder.
IN_TORCH = """
import sys
sys.modules.update(coca_jax=None, jax=None, flax=None)  # not importable
import numpy as np, torch
from PIL import Image
from transformers import AutoModel
torch.set_num_threads(1)
for folder in sys.argv[1:]:
    model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
    given = dict(np.load(f"{folder}/../given.npz", allow_pickle=True))
    found = {}
    with torch.no_grad():
        pixels = model.preprocess(list(given["images"]))
        ids, mask = model.tokenize(given["texts"].tolist())
        out = model(pixels, ids, mask)
        found["image"], found["text"] = out.image_embeds, out.text_embeds
        log_probs = model.caption_log_probs(pixels, ids, mask)
        found["log_probs"], found["ids"], found["mask"] = log_probs, ids, mask
        assert torch.equal(model.encode_text(ids, mask), out.text_embeds)
        found["labels"] = model.encode_text(*model.tokenize(given["texts"].tolist(), labels=True))
        if model.head is not None:
            asked = model.tokenize(given["texts"].tolist(), questions=True)
            shown = pixels
            if model.head.num_images == 2:
                shown = torch.stack([pixels, pixels.flip(0)], 1)
            found["classes"] = model.classify(shown, *asked).softmax(-1)
        generated = model.generate(pixels)
        found["caption_log_probs"] = generated.log_probs
    captions = model.caption(list(given["images"]))
    prompted = model.caption(list(given["images"]), "a red")
    np.savez(f"{folder}/../found.npz", captions=captions, prompted=prompted,
             **{k: v.numpy() for k, v in found.items()})
"""

RECIPES = sorted(
    name
    for _, name, _ in pkgutil.iter_modules(recipes.__path__)
    # What recipes are made from; a dual encoder, which this layout does not hold.
    if name not in ("base", "adapt", "finetune_towers")
)
LAYOUTS = {  # options that no recipe has, on the model of tiny.py
    "registers_grouped_heads_layer_scale": {
        "model.image.class_token": True,
        "model.image.registers": 2,
        "model.image.pre_norm": True,
        "model.image.rope_start": 1.0,
        "model.image_size": (16, 24),
        "model.patch_size": (8, 6),
        "model.positions": "both",
        "model.layer_scale": 0.1,
        "model.qk_norm": True,
        "model.qk_norm_kind": "layer",
        "model.norm_eps": 1e-3,
        "model.image.block": {"norm": "rms", "activation": "silu", "gated_mlp": True},
        "model.text.kv_heads": 2,
        "model.text.multimodal_heads": 2,
        "model.text.multimodal_mlp_dim": 24,
        "model.text.multimodal_block": {"positions": "rope", "bias": False},
        "model.pooler.kind": "parallel",
        "model.pooler.project": False,
        "model.embed_dim": 24,
        "model.pooler.block": {"norm": "rms"},
        "loss.contrastive": "sigmoid",
        "data.resize": "crop",
    },
    "no_pooler": {
        "model.image.class_token": True,
        "model.pooler.kind": "none",
        "model.text.tie_embeddings": True,
        "model.image.width": 24,
        "model.text.cross": "open_clip",
        "data.num_frames": 2,
    },
}


def small(name):
    """The typed configuration of a recipe or layout with all sizes reduced."""
    recipe = importlib.import_module(f"coca_jax.recipes.{name if name in RECIPES else 'tiny'}")
    config = typed(recipe.get_config())
    image, text = config.model.image, config.model.text
    stages = len(image.conv_widths)
    config = config.change(
        {
            "model.dtype": "float32",
            "model.image_size": 16,
            "model.patch_size": 2**stages if stages else 8,
            "model.embed_dim": 16,
            **{"model.image.width": 16, "model.image.mlp_dim": 24, "model.image.num_heads": 4},
            "model.image.depth": min(image.depth, 2),
            "model.image.conv_widths": (4, 6, 8, 8)[:stages],
            **{"model.text.width": 24, "model.text.mlp_dim": 32, "model.text.num_heads": 2},
            "model.text.unimodal_depth": min(text.unimodal_depth, 2),
            "model.text.multimodal_depth": min(text.multimodal_depth, 2),
            **{"model.text.vocab_size": 640, "model.text.max_len": 24},
            **{"model.pooler.num_queries": 4, "model.pooler.num_heads": 4},
            "data.num_frames": min(config.data.num_frames, 3),
            **{"head.width": 0, "head.num_heads": 0},
        }
    )
    return config.change(LAYOUTS.get(name, {}))


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A SentencePiece vocabulary, and a small one of CLIP's kind."""
    path = tmp_path_factory.mktemp("words") / "vocabulary.model"
    vocabulary.train(TEXTS * 20, 300, str(path), 0)
    merges = clip_bpe.parse_merges(clip_bpe.find_merges(str(path.parent)))[:-48800]
    return vocabulary.load(path), clip_bpe.ClipBpe(clip_bpe.packed(merges))


def model_of(config, words):
    head = heads.head_kind(config.head.kind) if config.head.kind else None
    names = ("cat", "dog", "emu") if head else ()
    module = coca.build(
        config.model,
        sigmoid=config.loss.contrastive == "sigmoid",
        head=config.head if head else None,
        num_classes=len(names),
    )
    params = random_params(module)
    words = words[config.model.pooler.kind == "open_clip"]
    return inference.CoCaModel(config, params, words, batch_size=8, class_names=names)


def pictures(config):
    """Images, or clips, of a size that is not the model's."""
    rng = np.random.default_rng(0)
    frames = (5,) if config.data.num_frames else ()
    images = rng.integers(0, 256, (3, *frames, 20, 31, 3), dtype=np.uint8)
    images[..., :4, :, :] = images[..., :1, :1, :]  # a plain margin, which 'trim' removes
    return images


def wanted(model, images, texts):
    found = dict(zip(("log_prob", "count"), model.caption_log_likelihood(images, texts)))
    found |= dict(image=model.encode_image(images), text=model.encode_text(texts))
    found["labels"] = model.encode_text(texts, labels=True)
    captions = model.captions(images)
    found["captions"] = [one.text for (one,) in captions]
    found["caption_log_probs"] = np.array([one.log_prob for (one,) in captions])
    found["prompted"] = model.caption(images, prompt="a red")
    if model.head_kind:
        shown = list(zip(images, images[::-1])) if model.head_kind.images == 2 else images
        asked = texts if model.head_kind.reads_text else None
        found["classes"] = model.classify(shown, asked)
    return found


def converted(model, folder):
    """A folder for transformers, through an export."""
    export_folder.write(model, str(folder / "export"))
    convert.to_transformers(str(folder / "export"), str(folder / "torch"))
    return str(folder / "torch")


def run_in_torch(code, folder, *arguments):
    """Runs code in a process of its own, where nothing is downloaded."""
    env = os.environ | {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        check=True,
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )


@pytest.mark.torch
@pytest.mark.long
def test_models_of_all_recipes_are_the_same_in_torch(words, tmp_path):
    pytest.importorskip("transformers", reason="needs the extra 'parity'")
    texts = ["a red!? circle", "two stars on white", "Zürich &amp; a blue square, 10 of them"]
    expected, folders, same = {}, [], {}
    for name in (*RECIPES, *LAYOUTS):
        config = small(name)
        parts = (config.model, config.head, config.data.num_frames, config.data.resize)
        kind = repr((*parts, config.data.label_token, config.loss.contrastive))
        same.setdefault(kind, []).append(name)
        if len(same[kind]) > 1:  # recipes differ in training alone
            continue
        model, images = model_of(config, words), pictures(config)
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "given.npz", images=images, texts=np.array(texts))
        expected[name] = wanted(model, images, texts)
        folders.append(converted(model, tmp_path / name))
    assert {name for names in same.values() for name in names} == {*RECIPES, *LAYOUTS}
    run_in_torch(IN_TORCH, tmp_path, *folders)
    for names in same.values():
        found, want = np.load(tmp_path / names[0] / "found.npz"), expected[names[0]]
        worst = {
            key: np.abs(found[key] - want[key]).max()
            for key in ("image", "text", "labels", "classes")
            if key in want
        }
        lengths = found["mask"][:, 1:].sum(1)
        np.testing.assert_array_equal(lengths, want["count"], err_msg=str(names))
        per_token = np.abs(found["log_probs"].sum(1) - want["log_prob"]) / lengths
        worst["log_probs"] = per_token.max()
        print(", ".join(names), {key: f"{value:.1e}" for key, value in worst.items()})
        assert max(worst.values()) < 1e-5, (names, worst)
        for key in ("captions", "prompted"):
            assert found[key].tolist() == want[key], names
        difference = np.abs(found["caption_log_probs"] - want["caption_log_probs"]).max()
        assert difference < 1e-4, names


# Without transformers, and from the folder alone; then saved and loaded again, in bfloat16.
PLAIN_TORCH = """
import sys
sys.modules.update(coca_jax=None, jax=None, transformers=None)
import json, numpy as np, torch
sys.path.insert(0, sys.argv[1])
from modeling_coca import CoCaModel
images = list(np.load("images.npy"))
found = {}
for folder in sys.argv[1:]:
    model = CoCaModel.from_folder(folder)
    greedy = model.caption(images)
    seeds = [torch.Generator().manual_seed(0) for _ in range(3)]
    how = dict(do_sample=True, max_new_tokens=5)
    sampled = [model.caption(images, generator=seed, **how) for seed in seeds[:2]]
    assert sampled[0] == sampled[1] != greedy
    assert model.caption(images, generator=seeds[2], top_k=1, **how) == model.caption(
        images, max_new_tokens=5
    )
    embeds = model.encode_image(model.preprocess(images))[0]
    found[folder] = dict(captions=greedy, embeds=embeds.tolist())
bf16 = CoCaModel.from_folder(sys.argv[1], torch.bfloat16)
assert len(bf16.caption(images)) == len(images)
found["bf16"] = bf16.encode_image(bf16.preprocess(images))[0].tolist()
print(json.dumps(found))
"""
SAVED_AGAIN = """
import sys
sys.modules.update(coca_jax=None, jax=None)
import torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True, torch_dtype=torch.bfloat16)
model.save_pretrained("again")
again = AutoModel.from_pretrained("again", trust_remote_code=True, torch_dtype=torch.bfloat16)
pixels, ids = torch.zeros(1, 3, 16, 16), again.tokenize(["a red circle"])
for one, two in zip(model(pixels, *ids), again(pixels, *ids)):
    assert torch.equal(one, two)
"""


@pytest.fixture(scope="module")
def tiny(words, tmp_path_factory):
    """A model, its export and the folder for transformers."""
    model, folder = model_of(small("tiny"), words), tmp_path_factory.mktemp("tiny")
    return model, str(folder / "export"), converted(model, folder)


@pytest.mark.torch
def test_a_folder_works_without_transformers_in_bfloat16_and_saved_again(tiny, tmp_path):
    pytest.importorskip("transformers", reason="needs the extra 'parity'")
    model, export, folder = tiny
    images = pictures(model.config)
    np.save(tmp_path / "images.npy", images)
    convert.to_transformers(export, str(tmp_path / "half"), "bfloat16")
    sizes = [os.path.getsize(f"{f}/model.safetensors") for f in (folder, tmp_path / "half")]
    assert 0.4 * sizes[0] < sizes[1] < 0.6 * sizes[0]
    done = run_in_torch(PLAIN_TORCH, tmp_path, folder, "half")
    found, embeds = json.loads(done.stdout), model.encode_image(images)
    assert found[folder]["captions"] == model.caption(images)
    np.testing.assert_allclose(found[folder]["embeds"], embeds, atol=1e-5)
    for rounded in (found["half"]["embeds"], found["bf16"]):
        assert 1e-5 < np.abs(np.asarray(rounded) - embeds).max() < 0.02
    run_in_torch(SAVED_AGAIN, tmp_path, folder)


def test_converting_again_and_what_cannot_be_converted(tiny, words, tmp_path):
    model, export, folder = tiny

    # torch, importing modeling_coca.py in another test, may leave a __pycache__ there
    def contents():
        return {p.name: p.read_bytes() for p in pathlib.Path(folder).iterdir() if p.is_file()}

    before = contents()
    names = set(before)
    assert names == {
        *("config.json", "model.safetensors", "modeling_coca.py", "tokenizer.model", "README.md")
    }
    convert.to_transformers(export, folder)
    assert contents() == before
    params = jax.tree.map(lambda x: np.asarray(x) + 1, model.params)
    other = inference.CoCaModel(model.config, params, model.vocabulary)
    export_folder.write(other, str(tmp_path / "other"))
    with pytest.raises(FileExistsError, match="other weights .model.safetensors."):
        convert.to_transformers(str(tmp_path / "other"), folder)
    assert contents() == before
    with pytest.raises(ValueError, match="for transformers.* run or export"):
        coca_jax.load(folder)
    config = model.config.change({"model.image.registers": 1})
    registers = inference.CoCaModel(config, random_params(coca.build(config.model)), words[0])
    export_folder.write(registers, str(tmp_path / "registers"))
    with pytest.raises(ValueError, match="registers.*--to=transformers.*--format=onnx"):
        convert.to_open_clip(str(tmp_path / "registers"), str(tmp_path / "out"))
    native = model.config.change({"data.resize": "native"})
    with pytest.raises(ValueError, match="data.resize='native'"):
        transformers_folder.write(model.params, native, words[0], str(tmp_path / "out"), "x", "")
    assert not (tmp_path / "out").exists()


def files_of_all_kinds(folder):
    """Images that need more than reading pixels."""
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (37, 52, 3), dtype=np.uint8))
    drawing = Image.new("RGBA", (60, 44), (255, 255, 255, 0))
    drawing.paste((200, 30, 30, 128), (20, 10, 40, 35))
    turned = Image.Exif()
    turned[0x0112] = 6
    photo.save(folder / "turned.jpg", exif=turned, quality=80)
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    photo.save(folder / "photo.png")
    photo.convert("L").save(folder / "gray.png")
    photo.convert("P").save(folder / "palette.png")
    drawing.save(folder / "drawing.png")
    drawing.convert("LA").save(folder / "gray_drawing.png")
    drawing.quantize(8).save(folder / "palette_drawing.png")
    Image.fromarray(rng.integers(0, 65536, (30, 20)).astype(np.uint16)).save(folder / "deep.png")
    Image.new("RGB", (33, 21), (9, 90, 200)).save(folder / "plain.png")
    return sorted(folder.iterdir())


@pytest.mark.torch
def test_images_have_the_same_pixels_and_texts_the_same_ids(words, tmp_path):
    pytest.importorskip("transformers", reason="needs the extra 'parity'")
    from coca_jax.interop import modeling_coca

    for size in ((24, 24), (20, 32)):
        for mode in ("squash", "crop", "trim"):
            reader = preprocess.ImageReader(size, mode, 0, 8, None)
            (tmp_path / f"{mode}{size}").mkdir()
            for path in files_of_all_kinds(tmp_path / f"{mode}{size}"):
                frames = modeling_coca.read_frames(path, 0)
                (pixels,) = modeling_coca.fit_frames(frames, path, size, mode)
                want = reader.preprocess(str(path))
                np.testing.assert_array_equal(pixels, want, err_msg=f"{path} {mode}")
    shown = [Image.new("RGB", (30, 20), (40 * i, 9, 255 - 40 * i)) for i in range(6)]
    shown[0].save(tmp_path / "clip.gif", save_all=True, append_images=shown[1:])
    for frames in (2, 4, 9):
        found = modeling_coca.read_frames(tmp_path / "clip.gif", frames)
        want = list(videos.decode((tmp_path / "clip.gif").read_bytes(), frames))
        np.testing.assert_array_equal(found, want)

    texts = ["A red circle", "don't  stop!!! 1234", "Zürich &amp; \u4f60\u597d", "a\tb \u017fs", ""]
    full = clip_bpe.ClipBpe(clip_bpe.find_merges(str(tmp_path)))
    for number, vocabulary_ in enumerate((*words, full)):
        path = str(tmp_path / str(number))
        vocabulary_.save(path)
        settings = transformers_folder.tokenizer_settings(vocabulary_)
        config = modeling_coca.CoCaConfig(tokenizer=settings)
        tokenizer = modeling_coca.load_tokenizer(path, config)
        for text in texts:
            ids = vocabulary_.encode(text)
            assert tokenizer.encode(text) == ids
            row = [*ids, vocabulary_.eos_id, 7]
            assert tokenizer.decode(row) == vocabulary_.decode(row)
