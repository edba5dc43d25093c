"""Models by name: the hub's cache as huggingface_hub lays it, and a hub that stands in for it."""

import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import hub_stand_in
import numpy as np
import open_clip_cases as cases
import pytest
from conftest import flags_of
from one_device import models_on_one  # noqa: F401
from quick_conversion import conversions_are_forks  # noqa: F401
from test_inference import images, model, no_compile_cache, words  # noqa: F401

import coca_jax
from coca_jax.cli import convert, export
from coca_jax.config import Model, read
from coca_jax.data import vocabulary
from coca_jax.inference import export_folder
from coca_jax.interop import export_format, hub, open_clip_config, safetensors
from coca_jax.interop.open_clip_weights import Layout
from coca_jax.interop.pretrained import GELU, QUICK_GELU
from coca_jax.interop.safetensors import Blocks

constants = pytest.importorskip("huggingface_hub.constants", reason="needs the extra 'hf'")
file_download = pytest.importorskip("huggingface_hub.file_download")
APPLES_FILE = "mobileclip2_coca.pt"
NOBODY = "http://127.0.0.1:9"  # no server answers there
SCORES = {
    "zero_shot/birds/top1": 0.8125,
    "zero_shot/birds/top1_low": 0.75,
    "zero_shot/birds/top1_high": 0.875,
    "zero_shot/birds/top1_count": 1600.0,
    "zero_shot/birds/num_examples": 1600.0,
    "captioning/birds/bleu4": None,
}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """An empty hub; huggingface_hub asks it, with an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    with hub_stand_in.Hub(tmp_path / "hub") as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, file_download):  # older ones keep a copy
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        yield server


def open_clip_weights(folder: pathlib.Path) -> None:
    """A repository as laion's are, of a small model."""
    folder.mkdir(parents=True)
    layout = Layout(read(Model, open_clip_config.to_model(cases.SMALL), "model"))
    tensors = {
        key: Blocks(shape, lambda key=key, shape=shape: [cases.redraw(key, shape)])
        for key, shape in layout.tensors().items()
    }
    safetensors.write(folder / "open_clip_model.safetensors", tensors)
    config = dict(model_cfg=cases.SMALL, preprocess_cfg={})
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text('{"model_type": "clip"}')  # of another library
    (folder / "open_clip_pytorch_model.bin").write_bytes(b"the same again")
    symbols = cases.small_merges()
    (folder / "tokenizer.json").write_text(json.dumps(dict(model=_merges(symbols))))


def _merges(data: bytes) -> dict:
    from coca_jax.data.vocabulary.clip_bpe import ClipBpe

    ids = {symbol: number for number, symbol in enumerate(ClipBpe(data)._symbols[:-2])}
    return dict(type="BPE", vocab=ids, merges=cases.MERGES)


def test_names_resolve_to_repositories_and_a_missing_tag_lists_the_tags():
    found = coca_jax.list_pretrained()
    assert found == sorted(set(found)) and ("ViT-L-14", "openai") in found
    place = "hf-hub:timm/vit_large_patch14_clip_224.openai"
    for name, tag in (
        ("ViT-L-14", "openai"),
        ("ViT-L-14:openai", ""),
        ("ViT-L-14-quickgelu", "openai"),
    ):
        assert hub.resolve(name, tag) == place
    assert hub.resolve("runs/demo") == "runs/demo"
    for given in (dict(), dict(pretrained="opnai")):
        with pytest.raises(
            ValueError, match="^ViT-L-14: .*ViT-L-14:TAG.*openai,.*laion2b_s32b_b82k"
        ):
            coca_jax.load("ViT-L-14", **given)
    with pytest.raises(ValueError, match="'ViT-L14'.*Close names:.*ViT-L-14.*list_pretrained"):
        coca_jax.load("ViT-L14", pretrained="openai")
    # Weights trained without QuickGELU have no -quickgelu name.
    with pytest.raises(ValueError, match="laion2b_s32b_b82k"):
        coca_jax.load("ViT-L-14-quickgelu", pretrained="laion2b_s32b_b82k")


def test_apples_captioners_have_the_names_of_their_repositories():
    apples = {place for place in hub.PRETRAINED.values() if place.startswith("apple/mobileclip2")}
    assert len(apples) == 21
    tag = "mobileclip2_coca_dfn2b_s13b_context77"
    assert hub.resolve("coca_ViT-L-14", tag) == f"hf-hub:apple/{tag}"
    tag = "mobileclip2_coca_dfn2b_s13b_dci-short_s12m_context256"
    assert hub.resolve(f"coca_ViT-L-14-context256:{tag}") == f"hf-hub:apple/{tag}"
    with pytest.raises(ValueError, match="mobileclip2.*gbc10m-long_context256"):
        hub.resolve("coca_ViT-L-14-context256")


@pytest.mark.torch
@pytest.mark.parametrize(
    "name, tag, quick_gelu",
    [
        ("ViT-L-14", "openai", True),
        ("ViT-L-14-quickgelu", "openai", True),
        ("ViT-B-32", "laion2b_s34b_b79k", False),
    ],
)
def test_two_tower_models_by_name_equal_open_clip(server, name, tag, quick_gelu):
    """A small model that open_clip made, in the repository of the name."""
    pytest.importorskip("open_clip", reason="needs the extra 'parity'")
    import open_clip
    import test_towers as towers
    import torch

    folder = server.root / hub.PRETRAINED[name, tag]
    folder.parent.mkdir(parents=True)
    original = towers.in_open_clip(folder, quick_gelu)
    (folder / "config.json").write_text('{"architecture": "vit_large_patch14_clip_224"}')  # timm's
    model = coca_jax.load(name, pretrained=tag)  # noqa: F811
    pixels = torch.from_numpy(model.preprocess(towers.PHOTOS).transpose(0, 3, 1, 2))
    with torch.no_grad():
        images = original.encode_image(pixels)  # noqa: F811
        tokens = open_clip.tokenize(towers.TEXTS)
        texts = original.encode_text(tokens)
    np.testing.assert_array_equal(model.tokenize(towers.TEXTS), tokens)
    np.testing.assert_allclose(model.encode_image(towers.PHOTOS), towers.unit(images), atol=1e-6)
    np.testing.assert_allclose(model.encode_text(towers.TEXTS), towers.unit(texts), atol=1e-6)


@pytest.mark.torch
def test_a_folder_as_apples_captioners_have_it_loads(tmp_path):
    """Weights of torch.save under another name, and the bare model as config.json."""
    torch = pytest.importorskip("torch")
    open_clip_weights(tmp_path / "usual")
    here = tmp_path / "apples"
    here.mkdir()
    (here / "config.json").write_text(json.dumps(cases.SMALL))
    (here / "tokenizer.json").write_bytes((tmp_path / "usual" / "tokenizer.json").read_bytes())
    arrays = safetensors.read(str(tmp_path / "usual" / "open_clip_model.safetensors"))
    torch.save({k: torch.from_numpy(np.array(v)) for k, v in arrays.items()}, here / APPLES_FILE)
    usual, found = (coca_jax.load(str(place)) for place in (tmp_path / "usual", here))
    texts = ["a cat", "two dogs"]
    np.testing.assert_array_equal(found.encode_text(texts), usual.encode_text(texts))
    assert found.image_size == usual.image_size


@pytest.mark.torch
def test_the_table_is_that_of_open_clip():
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("needs open_clip: the extra 'parity'")
    # In a process of its own, and the table's module alone: all of open_clip takes 20 s to import.
    program = """
import importlib.util, json, sys, types
package = types.ModuleType("open_clip")
package.__path__ = importlib.util.find_spec("open_clip").submodule_search_locations
sys.modules |= {"open_clip": package, "safetensors.torch": None}
import open_clip.pretrained
print(json.dumps(open_clip.pretrained._PRETRAINED))
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    theirs = json.loads(said.stdout.splitlines()[-1])
    for table, quick in ((QUICK_GELU, True), (GELU, False)):
        for model, tags in table.items():  # noqa: F402, F811
            for tag, place in tags.items():
                entry = theirs[model][tag]
                assert entry["hf_hub"].rstrip("/") == place, (model, tag)
                assert entry.get("quick_gelu", False) == quick, (model, tag)


def test_a_folder_for_the_hub_goes_up_and_back(  # noqa: F811
    model,  # noqa: F811
    images,  # noqa: F811
    server,
    tmp_path,
    monkeypatch,
):
    files = export_folder.write_hub(model, str(tmp_path / "out"), "org/birds", SCORES)
    assert set(files) == {
        "generation_config.json",
        *("README.md", "config.json", "model.safetensors", "preprocessor_config.json"),
        "tokenizer.model",
    }
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["library_name"], config["model_type"]) == ("coca_jax", "coca")
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\nlibrary_name: coca_jax\n") and "$" not in card
    assert "| zero_shot/birds/top1 | 0.8125 | 0.7500 to 0.8750 | 1,600 |" in card
    assert "| zero_shot/birds/num_examples | 1,600 |  |  |" in card
    assert 'coca_jax.load("hf-hub:org/birds")' in card and "bleu4" not in card
    wanted = model.encode_image(images)
    np.testing.assert_array_equal(coca_jax.load(tmp_path / "out").encode_image(images), wanted)

    (tmp_path / "out/diary.txt").write_text("mine")
    assert export_folder.write_hub(model, str(tmp_path / "out"), "org/birds", SCORES) == files
    assert hub.push(str(tmp_path / "out"), "org/birds").endswith("/org/birds")
    assert not (server.root / "org/birds/diary.txt").exists()
    # A second time: the repository is there.
    assert coca_jax.push_to_hub(model, "org/birds", scores=SCORES).endswith("/org/birds")
    for name in files:
        sent = (server.root / "org/birds" / name).read_bytes()
        assert sent == (tmp_path / "out" / name).read_bytes()
    loaded = coca_jax.load("hf-hub:org/birds")
    np.testing.assert_array_equal(loaded.encode_image(images), wanted)
    assert loaded.caption(images, max_new_tokens=4) == model.caption(images, max_new_tokens=4)
    # The second time nothing but the commit is asked for; without a hub the cache is enough.
    before = len(server.requests)
    coca_jax.load(f"hf-hub:org/birds@{hub_stand_in.COMMIT}")
    assert all("/api/models/" in asked for asked in server.requests[before:])
    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)
    coca_jax.load("hf-hub:org/birds")
    with pytest.raises(FileNotFoundError, match="the cache does not have it"):
        coca_jax.load("hf-hub:org/others")


def test_open_clips_names_come_from_laions_repositories(server, tmp_path):
    tag = "mscoco_finetuned_laion2b_s13b_b90k"
    repository = hub.PRETRAINED["coca_ViT-B-32", tag]
    open_clip_weights(server.root / repository)
    loaded = coca_jax.load("coca_ViT-B-32", pretrained=tag)
    assert loaded.image_size == 32 and loaded.vocabulary.size == 530
    assert loaded.encode_text(["a photo of a cat"]).shape == (1, 48)
    fetched = {asked.rpartition("/")[2] for asked in server.requests if asked.startswith("GET")}
    assert "open_clip_model.safetensors" in fetched
    assert "open_clip_pytorch_model.bin" not in fetched  # the same weights again
    (server.root / repository / "open_clip_model.safetensors").unlink()
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ValueError, match="not a zip archive of torch.save"):
        coca_jax.load(f"coca_ViT-B-32:{tag}")  # the .bin is taken where there is nothing else


def test_merges_of_ones_own_come_from_the_hub(server, tmp_path):
    """`convert --to=open_clip` writes them where they are other than CLIP's, which come unasked."""
    open_clip_weights(tmp_path / "given")
    convert.from_open_clip(str(tmp_path / "given"), str(tmp_path / "ours"))
    convert.to_open_clip(str(tmp_path / "ours"), str(server.root / "org/mine"))
    loaded, ours = coca_jax.load("hf-hub:org/mine"), coca_jax.load(tmp_path / "ours")
    np.testing.assert_array_equal(loaded.encode_text(["a photo"]), ours.encode_text(["a photo"]))


def test_a_cache_that_another_program_filled_is_enough_offline(tmp_path, monkeypatch):
    """Laid out as the library does: blobs, a reference, and links in a snapshot."""
    root = tmp_path / "cache/models--laion--CoCa-ViT-B-32-laion2B-s13B-b90k"
    snapshot = root / "snapshots" / hub_stand_in.COMMIT
    open_clip_weights(tmp_path / "files")
    (root / "blobs").mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs/main").write_text(hub_stand_in.COMMIT)
    snapshot.mkdir(parents=True)
    for number, name in enumerate(sorted(os.listdir(tmp_path / "files"))):
        if name == "open_clip_pytorch_model.bin":
            continue
        shutil.move(tmp_path / "files" / name, root / "blobs" / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)
    loaded = coca_jax.load("coca_ViT-B-32", pretrained="laion2b_s13b_b90k")
    assert loaded.vocabulary.size == 530


def test_what_the_hub_refuses_is_one_line(server, tmp_path):
    (server.root / "org/empty").mkdir(parents=True)
    (server.root / "org/empty/README.md").write_text("nothing")
    for name, message in {
        "hf-hub:org/none": "org/none: there is no such model, or it is private",
        "hf-hub:org/empty@v2": "there is no such revision",
        "hf-hub:org/empty": "holds no weights that are known here",
        "hf-hub:a b/c/d": "no name of a model on the hub",
    }.items():
        with pytest.raises((FileNotFoundError, ValueError), match=message) as caught:
            coca_jax.load(name)
        assert "\n" not in str(caught.value)


def test_of_two_layouts_in_a_folder_the_last_one_counts(model, tmp_path):  # noqa: F811
    folder = str(tmp_path / "both")
    export_folder.write(model, folder)
    (tmp_path / "both/params.safetensors").write_bytes(b"of another model")
    (tmp_path / "both/notes.txt").write_text("mine")
    export_folder.write_hub(model, folder, "org/birds")
    assert coca_jax.load(folder).checksum() == model.checksum()
    names = {path.name for path in (tmp_path / "both").iterdir()}
    assert names - {"README.md", "preprocessor_config.json", "generation_config.json"} == {
        *("config.json", "model.safetensors", "tokenizer.model", "notes.txt")
    }
    (tmp_path / "both/model.safetensors").write_bytes(b"of another model")
    export_folder.write(model, folder)
    assert coca_jax.load(folder).checksum() == model.checksum()
    assert not {"model.safetensors", "tokenizer.model"} & {*os.listdir(folder)}


def test_a_configuration_before_names_no_file_elsewhere_to_remove(model, tmp_path):  # noqa: F811
    for name in ("diary.model", "both/diary.model"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    for name in ("../diary.model", "diary.model"):
        before = dict(tokenizer=dict(file="x.model"), files={name: {}, "x.model": {}})
        before["tokenizer"]["file"] = name if name.startswith("..") else "x.model"
        (tmp_path / "both/config.json").write_text(json.dumps(before))
        export_folder.write(model, str(tmp_path / "both"))
    assert (tmp_path / "diary.model").exists() and (tmp_path / "both/diary.model").exists()


def test_a_file_damaged_on_its_way_is_told(model, server, tmp_path):  # noqa: F811
    export_folder.write_hub(model, str(server.root / "org/birds"), "org/birds")
    path = server.root / "org/birds/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="model.safetensors is damaged: its"):
        coca_jax.load("hf-hub:org/birds")
    assert not export_format.is_export(tmp_path)


def test_a_readme_of_something_else_is_not_written_over(model, tmp_path):  # noqa: F811
    (tmp_path / "README.md").write_text("# My project\n")
    with pytest.raises(ValueError, match="README.md is of something else, and a model's card goes"):
        export_folder.write_hub(model, str(tmp_path), "org/birds", {})
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "# My project\n"


def test_a_card_has_no_scores_of_an_earlier_step(model, tmp_path, monkeypatch, capsys):  # noqa: F811
    """As of a run that was scored while it trained; of those of its end the step is no measure."""
    for name, told in (
        (
            "eval.json",
            {"zero_shot/birds/top1": 0.25, "retrieval/birds/mean_recall": 0.5, "step": 12},
        ),
        ("eval_steps.json", {"zero_shot/birds": 9, "retrieval/birds": 12}),
    ):
        (tmp_path / name).write_text(json.dumps(told))
    flags_of("export", monkeypatch)
    given = [f"--checkpoint={tmp_path}", f"--out={tmp_path / 'hub'}", "--format=hub"]
    export.flags.FLAGS(["export", *given])
    monkeypatch.setattr(model, "step", 12)
    monkeypatch.setattr(coca_jax, "load", lambda *_, **__: model)
    export.main(["export"])
    card = (tmp_path / "hub/README.md").read_text()
    assert "| retrieval/birds/mean_recall | 0.5000 |" in card
    assert "zero_shot/birds" not in card and "| step" not in card
    line = "zero_shot/birds was scored after step 9, and the weights are of step 12: its scores are"
    assert line in capsys.readouterr().err


def test_a_card_that_was_edited_stays(model, tmp_path, caplog):  # noqa: F811
    """One that was not is written anew, with the scores of now."""
    path = tmp_path / "README.md"
    export_folder.write_hub(model, str(tmp_path), "org/birds", {"zero_shot/birds/top1": 0.25})
    assert "| zero_shot/birds/top1 | 0.2500 |" in path.read_text()
    export_folder.write_hub(model, str(tmp_path), "org/birds", SCORES)
    card = path.read_text()
    assert "| zero_shot/birds/top1 | 0.8125 |" in card and "0.2500" not in card
    assert "was edited" not in caplog.text
    begin, line, rest = card.split("\n", 3)[1:]
    for edited in (
        card.replace("## Use", "## Data\n\nTen thousand birds.\n\n## Use"),
        card.replace("pipeline_tag", "license: mit\npipeline_tag"),
        f"---\n{begin}\n{rest}",  # as older versions wrote it, or without its comment
        f"---\n{begin}\n{line[:-1]}{'1' if line[-1] == '0' else '0'}\n{rest}",
    ):
        assert edited != card
        path.write_text(edited)
        caplog.clear()
        files = export_folder.write_hub(model, str(tmp_path), "org/birds", SCORES)
        assert path.read_text() == edited and files["README.md"] == len(edited)
        assert f"{path} was edited and stays as it is; move it away for a new card" in caplog.text
    path.unlink()
    export_folder.write_hub(model, str(tmp_path), "org/birds", SCORES)
    assert path.read_text() == card


def test_commands_take_the_names(model, images, server, commands, tmp_path):  # noqa: F811
    from PIL import Image

    export_folder.write_hub(model, str(server.root / "org/birds"), "org/birds")
    shutil.copytree(server.root / "org/birds", tmp_path / "given")
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    env = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}

    def run(command, *arguments):
        return commands.run([command, *arguments], tmp_path, env)

    done = run(
        "caption", "--checkpoint=hf-hub:org/birds", "--max_new_tokens=4", f"{tmp_path}/a.png"
    )
    assert done.returncode == 0, done.stderr
    first = json.loads(done.stdout.splitlines()[0])
    assert first["caption"] == model.caption(images[:1], max_new_tokens=4)[0]
    shutil.rmtree(server.root / "org")
    env["HF_HUB_OFFLINE"] = "1"
    done = run(
        "caption", "--checkpoint=hf-hub:org/birds", "--max_new_tokens=4", f"{tmp_path}/a.png"
    )
    assert done.returncode == 0 and json.loads(done.stdout.splitlines()[0]) == first, done.stderr
    del env["HF_HUB_OFFLINE"]
    done = run(
        "export", f"--checkpoint={tmp_path}/given", f"--out={tmp_path}/again", "--format=hub",
        "--push=me/again",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["url"].endswith("/me/again")
    assert "hf-hub:me/again" in (server.root / "me/again/README.md").read_text()
    done = run("evaluate", "--checkpoint=hf-hub:org/birds", "--data=scenes")
    assert done.returncode == 2 and "is a name; give --out=DIR" in done.stderr
    done = run("caption", "--checkpoint=ViT-L-14", f"{tmp_path}/a.png")
    assert done.returncode == 2 and "ViT-L-14:TAG, with a tag of openai," in done.stderr
    done = run("convert", "--input=hf-hub:org/none", f"--out={tmp_path}/none")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(
        "error: hf-hub:org/none: there is no such model"
    )


def test_towers_come_with_their_tokenizer_and_preprocessing(server):
    torch = pytest.importorskip("torch", reason="needs the extra 'parity'")
    transformers = pytest.importorskip("transformers", reason="needs the extra 'parity'")
    place = server.root / "google/siglip"
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = sizes | dict(vocab_size=320, max_position_embeddings=8, projection_size=16)
    image = sizes | dict(image_size=16, patch_size=8)
    torch.manual_seed(0)
    config = transformers.SiglipConfig(vision_config=image, text_config=text)
    transformers.SiglipModel(config).save_pretrained(place)
    vocabulary.train(["a photo of a cat"] * 9, 310, str(place / "spiece.model"), 0)
    (place / "preprocessor_config.json").write_text('{"image_mean": [0.25, 0.5, 0.5]}')
    loaded = coca_jax.load("hf-hub:google/siglip")
    assert loaded.config.model.image_mean == (0.25, 0.5, 0.5)
    np.testing.assert_array_equal(
        loaded.encode_text(["a photo"]), coca_jax.load(str(place)).encode_text(["a photo"])
    )
