"""Exported and converted folders with random damage: it is told in one line, never used."""

import collections
import json
import pathlib
import random
import shutil

import jax
import numpy as np
import open_clip_cases as cases
import pytest
from test_inference import images, model, no_compile_cache, words  # noqa: F401

import coca_jax
from coca_jax.cli import convert
from coca_jax.config import Model, read
from coca_jax.inference import export_folder, export_programs, loading
from coca_jax.interop import export_format, open_clip_config, safetensors
from coca_jax.interop.open_clip_weights import Layout
from coca_jax.interop.safetensors import Blocks

DAMAGES = ("flip", "truncate", "delete", "empty")


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory):  # noqa: F811
    """An export with its programs; open_clip weights converted, and as convert gives them back."""
    root = tmp_path_factory.mktemp("folders")
    export_programs.export(model, str(root / "exported"))
    export_folder.write_hub(model, str(root / "hub"), "org/hub")
    layout = Layout(read(Model, open_clip_config.to_model(cases.SMALL), "model"))
    tensors = {
        key: Blocks(shape, lambda key=key, shape=shape: [cases.redraw(key, shape)])
        for key, shape in layout.tensors().items()
    }
    (root / "given").mkdir()
    safetensors.write(root / "given/weights.safetensors", tensors)
    (root / "given/config.json").write_text(json.dumps(cases.SMALL))
    (root / "given" / "bpe_simple_vocab_16e6.txt.gz").write_bytes(cases.small_merges())
    weights = str(root / "given/weights.safetensors")
    convert.from_open_clip(weights, str(root / "converted"), str(root / "given/config.json"))
    convert.to_open_clip(str(root / "converted"), str(root / "open_clip"))
    return root


def load(folder: pathlib.Path, scratch: pathlib.Path) -> None:
    """As `coca_jax.load`, but what it takes for open_clip's in this process, not in one of its own:
    that of the hub too where it has no whole config.json."""

    def convert_here(path):
        convert.from_open_clip(path, str(scratch / "again"))
        raise AssertionError("taken for weights of open_clip")

    if folder.name == "open_clip":
        convert.from_open_clip(str(folder), str(scratch / "again"))
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "_read_open_clip", convert_here)
        coca_jax.load(folder, devices=jax.devices()[:1])


def damage(path: pathlib.Path, kind: str, rng: random.Random) -> None:
    data = path.read_bytes()
    if kind == "delete":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncate":
        path.write_bytes(data[: rng.randrange(1, len(data))])
    else:
        place, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])


def outcomes(source: pathlib.Path, scratch: pathlib.Path, count: int) -> dict[str, int]:
    """What became of up to `count` damages, the kinds of damage and the files taken in turn."""
    table: dict[str, int] = collections.Counter()
    names = sorted(p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file())
    for name in (export_format.CARD, export_format.PREPROCESSOR):  # nothing here reads them
        names = [other for other in names if other != name]
    shutil.copytree(source.parent / "given", scratch / "given")
    for number in range(count):
        rng = random.Random(number)
        kind, name = DAMAGES[number % 4], names[number // 4 % len(names)]
        if kind in ("delete", "empty") and number >= 4 * len(names):
            continue  # nothing of them is random: they were tried
        folder = scratch / source.name
        shutil.copytree(source, folder)
        damage(folder / name, kind, rng)
        try:
            load(folder, scratch)
            what = "silent"
        except (ValueError, FileNotFoundError) as error:
            one_line = "\n" not in str(error) and source.name in str(error)
            what = "told in a line" if one_line else f"told badly: {error}"
        except Exception as error:
            what = f"traceback: {type(error).__name__}: {error}"
        if kind == "delete" and name.startswith("programs/") and what == "silent":
            what = "told as a warning"
        if name == export_format.GENERATION and what == "silent":
            what = "edited"  # users change these defaults, so the file has no checksum
        table[what] += 1
        shutil.rmtree(folder)
    return dict(table)


@pytest.mark.parametrize("source", ["exported", "hub", "converted", "open_clip"])
@pytest.mark.long
def test_random_damage_is_never_used(folders, source, tmp_path, caplog):
    count = 200
    load(folders / source, tmp_path)  # whole, it is taken
    found = outcomes(folders / source, tmp_path, count)
    print(source, found)
    assert set(found) <= {"told in a line", "told as a warning", "edited"}
    assert count // 2 < sum(found.values()) <= count
    if "told as a warning" in found:
        assert caplog.text.count("is missing; the model is loaded without it") >= 1


def test_weights_that_are_no_numbers_are_refused(model, words, folders, tmp_path):  # noqa: F811
    params = jax.tree.map(np.array, jax.device_get(model.params))
    params["text_decoder"]["cls"]["value"][3] = np.nan
    config = {"model": model.config.model.to_dict()}
    words.save(tmp_path / "v.model")
    with pytest.raises(ValueError, match="text_decoder/cls/value has 1 values that are not finite"):
        export_format.write_export(tmp_path / "new", params, config, tmp_path / "v.model")
    assert not export_format.is_export(tmp_path / "new")
    # Of a folder that somebody else wrote, or an older version, without checksums.
    folder = tmp_path / "older"
    shutil.copytree(folders / "converted", folder)
    config = json.loads((folder / "config.json").read_text())
    plain = {name: config[name] for name in ("model", "preprocess", "tokenizer")}
    (folder / "config.json").write_text(json.dumps(plain))
    coca_jax.load(folder)
    arrays = safetensors.read(folder / "params.safetensors")
    broken = {name: np.array(array) for name, array in arrays.items()}
    broken["log_scale/value"] = np.float32(np.inf)
    safetensors.write(
        folder / "params.safetensors",
        {name: Blocks(np.shape(x), lambda x=x: [x]) for name, x in broken.items()},
    )
    with pytest.raises(ValueError, match="log_scale/value has 1 values that are not finite"):
        coca_jax.load(folder)
    with pytest.raises(ValueError, match="log_scale/value has 1 values that are not finite"):
        convert.to_open_clip(str(folder), str(tmp_path / "back"))


def test_a_name_of_the_configuration_leads_nowhere_else(folders, tmp_path):
    folder = tmp_path / "moved"
    shutil.copytree(folders / "converted", folder)
    config = json.loads((folder / "config.json").read_text())
    for name in ("../words.model", "/etc/hostname", "..", "", None, 5):
        plain = {part: config[part] for part in ("model", "preprocess")}
        (folder / "config.json").write_text(json.dumps(plain | {"tokenizer": {"file": name}}))
        with pytest.raises(ValueError, match="is not the name of a file beside it"):
            coca_jax.load(folder)


def test_a_change_that_is_meant_needs_the_seal_taken_off(folders, tmp_path):
    folder = tmp_path / "changed"
    shutil.copytree(folders / "converted", folder)
    config = json.loads((folder / "config.json").read_text())
    config["preprocess"]["resize"] = "squash"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="delete the line 'sha256_of_the_rest'"):
        coca_jax.load(folder)
    del config["sha256_of_the_rest"]
    (folder / "config.json").write_text(json.dumps(config))
    assert coca_jax.load(folder).resize == "squash"


def test_arrays_that_do_not_fit_their_configuration_are_one_line(folders, tmp_path):
    folder = tmp_path / "foreign"
    shutil.copytree(folders / "converted", folder)
    config = json.loads((folder / "config.json").read_text())
    plain = {part: config[part] for part in ("model", "preprocess", "tokenizer")}

    def refused(message, **changed):
        other = plain | {"model": plain["model"] | changed}
        (folder / "config.json").write_text(json.dumps(other))
        with pytest.raises(ValueError, match=message) as caught:
            coca_jax.load(folder)
        assert "\n" not in str(caught.value)

    cascade = plain["model"]["pooler"] | {"kind": "cascade"}
    says = "its arrays do not fit its config.json: missing: contrastive_pooler.*; misshapen: image_"
    refused(says, patch_size=16, pooler=cascade)
    refused("foreign/config.json: config.model.text=None: give a dict", text=None)
    refused("foreign/config.json: config.model.image_size='large'", image_size="large")
