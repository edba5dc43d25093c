"""Exported programs run without the package and equal the model."""

import ast
import json
import pathlib
import re
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from absl import flags
from conftest import flags_of, tiny_config
from docs_walk import ROOT
from one_device import models_on_one  # noqa: F401
from test_inference import (  # noqa: F401
    images,
    model,
    no_compile_cache,
    random_params,
    tiny_parts,
    words,
)

import coca_jax
from coca_jax import inference
from coca_jax.cli import export
from coca_jax.config import heads, typed
from coca_jax.inference import export_folder, export_onnx, export_programs
from coca_jax.inference.model import TwoTowerModel
from coca_jax.interop import export_format
from coca_jax.models import two_towers
from coca_jax.runtime import json_files

# What a user without this package runs: jax, NumPy and the files.
WITHOUT_PACKAGE = """
import json, sys
import jax, numpy as np
from jax import export
folder = sys.argv[1]
data = open(f"{folder}/params.safetensors", "rb").read()
size = int.from_bytes(data[:8], "little")
header = json.loads(data[8 : 8 + size])
params = {
    name: np.frombuffer(data[8 + size :], np.float32, count=int(np.prod(entry["shape"])),
                        offset=entry["data_offsets"][0]).reshape(entry["shape"])
    for name, entry in header.items() if name != "__metadata__"
}
def program(name):
    data = open(f"{folder}/programs/{name}.jax_export", "rb").read()
    return export.deserialize(bytearray(data)).call
images = np.load(f"{folder}/images.npy")
embedding, tokens = program("encode_image")(params, images)
weights = program("decode_weights")(params)
state = program("decode_start")(weights, tokens)
config = json.load(open(f"{folder}/config.json"))
tokenizer, max_len = config["tokenizer"], config["model"]["text"]["max_len"]
token, caption = np.full(len(images), tokenizer["begin_id"], np.int32), []
step = program("decode_step")
for place in range(6):
    log_probs, state = step(weights, state, token, np.int32(place))
    token = np.asarray(log_probs).argmax(-1).astype(np.int32)
    caption.append(token)
assert not np.isnan(step(weights, state, token, np.int32(max_len - 1))[0]).any()
assert np.isnan(step(weights, state, token, np.int32(max_len))[0]).all()  # no room for more
assert not any(name.startswith(("coca_jax", "flax")) for name in sys.modules)
np.savez(f"{folder}/found.npz", embedding=embedding, caption=np.stack(caption, 1))
"""


@pytest.mark.long
def test_programs_equal_the_model_without_its_code(model, words, images, tmp_path):  # noqa: F811
    files, differences = export_programs.export(model, str(tmp_path))
    assert {"config.json", "params.safetensors", "vocabulary.model"} < set(files)
    assert max(differences.values()) < 1e-5
    np.save(tmp_path / "images.npy", images)
    subprocess.run([sys.executable, "-c", WITHOUT_PACKAGE, str(tmp_path)], check=True, cwd=tmp_path)
    found = np.load(tmp_path / "found.npz")
    np.testing.assert_allclose(found["embedding"], model.encode_image(images), atol=1e-5)
    captions = model.captions(images, max_new_tokens=6)
    for tokens, (caption,) in zip(found["caption"], captions):
        ids = tokens[: caption.num_tokens].tolist()
        assert (words.bos_id, *ids) == caption.tokens


def test_a_written_decoder_gives_ids_beyond_the_vocabulary_no_chance(model, words, images):  # noqa: F811
    """The softmax layer has rows for more of them, and the best of all may be one."""
    functions = export_programs.functions_of(model, ["cpu"])
    token = np.full(1, words.bos_id, np.int32)

    @jax.jit
    def first(flat):
        weights = functions.decode_weights(flat)
        state = functions.decode_start(weights, functions.encode_image(flat, images[:1])[1])
        return functions.decode_step(weights, state, token, np.int32(0))[0]

    log_probs = np.asarray(first(export_format.flatten(model.params)))
    assert np.isfinite(log_probs[:, : words.size]).all() and words.size < log_probs.shape[1]
    assert (log_probs[:, words.size :] == -np.inf).all()


def test_the_example_without_the_package_reads_each_program_once():
    """What is read anew is compiled anew: in the loop over tokens, at every one."""
    page = pathlib.Path(ROOT, "docs/inference.md").read_text()
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", page, re.S) if "def program(" in c]
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.For)]
    inside = {ast.unparse(node.func) for loop in calls for node in ast.walk(loop)
              if isinstance(node, ast.Call)}  # fmt: skip
    assert "decode_step" in inside and "program" not in inside


@pytest.mark.long
def test_programs_of_a_model_of_clips_take_clips(model, tmp_path):  # noqa: F811
    config = typed(model.config).change({"data.num_frames": 3})
    clips = inference.CoCaModel(config, model.params, model.vocabulary)
    differences = export_programs.export(clips, str(tmp_path)).differences
    assert max(differences.values()) < 1e-4
    data = (tmp_path / "programs/encode_image.jax_export").read_bytes()
    program = jax.export.deserialize(bytearray(data))
    assert program.in_avals[-1].shape[1:] == (3, 16, 16, 3)
    given = np.random.default_rng(1).integers(0, 256, (2, 3, 16, 16, 3), dtype=np.uint8)
    params = export_format.flatten(model.params)
    embedding, tokens = program.call(params, given)
    np.testing.assert_allclose(embedding, clips.encode_image(given), atol=1e-5)
    assert tokens.shape == (2, 4, 16)


def test_config_says_what_the_model_is(model, tmp_path):  # noqa: F811
    export_folder.write(model, str(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model"]["text"]["vocab_size"] == 320
    assert config["preprocess"]["resize"] == "squash"
    ids = dict(begin_id=model.vocabulary.bos_id, end_id=model.vocabulary.eos_id)
    assert config["tokenizer"] == dict(file="vocabulary.model", **ids)


def test_an_export_knows_what_its_images_and_labels_were(model, tmp_path):  # noqa: F811
    config = typed(model.config).change({"data.num_frames": 2, "data.label_token": True})
    clips = inference.CoCaModel(config, model.params, model.vocabulary)
    export_folder.write(clips, str(tmp_path))
    again = coca_jax.load(str(tmp_path))
    assert again.num_frames == 2 and again.config.data.label_token
    texts = ["red", "a blue square"]
    for labels in (True, False):
        found = again.encode_text(texts, labels=labels)
        np.testing.assert_array_equal(found, clips.encode_text(texts, labels=labels))
    assert np.abs(found - again.encode_text(texts, labels=True)).max() > 1e-3


def test_an_export_has_the_weights_of_a_run_in_bfloat16_bit_for_bit(
    model,  # noqa: F811
    tmp_path,
    monkeypatch,
    caplog,
):
    export_folder.write(model, str(tmp_path / "run"), dtype="bfloat16")
    stored = export_format.flatten(export_format.read_export(tmp_path / "run")[0])
    flags_of("export", monkeypatch)
    out = tmp_path / "out"
    export.flags.FLAGS(
        ["export", f"--checkpoint={tmp_path / 'run'}", f"--out={out}", "--format=hub"]
    )
    export.main(["export"])
    params, config = export_format.read_export(out)
    found = export_format.flatten(params)
    assert config.model.dtype == "bfloat16" and found.keys() == stored.keys() and len(found) > 40
    for name, array in stored.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    assert "rounded" not in caplog.text
    rounded = coca_jax.load(str(tmp_path / "run"))
    assert rounded.checksum() == coca_jax.load(str(out)).checksum()
    export_folder.write(rounded, str(tmp_path / "rounded"))
    assert "load(..., narrow=False) keeps them as they were stored" in caplog.text


def test_towers_have_a_card_of_their_own(words, tmp_path):  # noqa: F811
    sizes = {"image.class_token": True, "image.final_norm": False, "image.depth": 1}
    sizes |= {"text.vocab_size": 320, "text.unimodal_depth": 1, "family": "clip"}
    config = typed(tiny_config()).change({f"model.{k}": v for k, v in sizes.items()})
    module = two_towers.build(config.model)
    towers = TwoTowerModel(config, random_params(module, two_towers), words)
    export_folder.write_hub(towers, str(tmp_path), "me/clip")
    card = (tmp_path / "README.md").read_text()
    assert "$" not in card and "caption(" not in card and "Yu et al." not in card
    for line in (
        *("pipeline_tag: zero-shot-image-classification", "- clip", "# clip"),
        f"| text encoder | 1 layers of width {config.model.text.width} |",
    ):
        assert f"\n{line}\n" in card
    stored = json.loads((tmp_path / "config.json").read_text())
    assert (stored["model_type"], stored["architectures"]) == ("two_towers", ["TwoTowers"])
    again = coca_jax.load(str(tmp_path))
    called = re.findall(r"model\.(\w+)\(", card)
    assert called == ["similarity", "zero_shot"] and all(hasattr(again, name) for name in called)
    # As it was written before: a captioner's type.
    export_folder.write(towers, str(tmp_path / "old"))
    config_file = tmp_path / "old" / "config.json"
    old = json.loads(config_file.read_text()) | dict(model_type="coca", architectures=["CoCa"])
    old = {name: value for name, value in old.items() if name not in ("files", json_files.SEAL_KEY)}
    config_file.write_text(json.dumps(old))
    assert isinstance(coca_jax.load(str(tmp_path / "old")), TwoTowerModel)


def test_programs_of_an_earlier_export_stay_with_their_model_alone(model, tmp_path):  # noqa: F811
    names = ["programs/encode_image.jax_export", "onnx/encode_image.onnx"]
    for name in [*names, "programs/notes.txt"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"of the first model")
    own = ["config.json", "generation_config.json", "params.safetensors", "vocabulary.model"]
    export_folder.write(model, str(tmp_path), programs=names[:1])
    assert export_format.files(tmp_path) == sorted([*own, names[0]])
    export_folder.write(model, str(tmp_path), programs=names[1:])
    assert export_format.files(tmp_path) == sorted([*own, *names])
    hub = export_folder.write_hub(model, str(tmp_path), "org/name")
    assert {*names} < {*hub} and "programs/notes.txt" not in hub
    params = jax.tree.map(lambda x: np.asarray(x) + 1, model.params)
    other = inference.CoCaModel(model.config, params, model.vocabulary)
    (tmp_path / names[0]).write_bytes(b"of the second model")
    export_folder.write(other, str(tmp_path), programs=names[:1])
    assert export_format.files(tmp_path) == sorted([*own, names[0]])
    assert coca_jax.load(str(tmp_path)).checksum() == other.checksum()
    assert not (tmp_path / names[1]).exists()
    assert (tmp_path / "programs/notes.txt").exists()  # not written by an export
    export_folder.write(model, str(tmp_path))
    assert export_format.files(tmp_path) == own and not (tmp_path / names[0]).exists()


BFLOAT16_SEEDS = [(seed, scale) for seed in range(4) for scale in (0.3, 1.0)]


@pytest.mark.long
def test_bfloat16_programs_pass_the_check_and_wrong_weights_do_not(words, tmp_path):  # noqa: F811
    """Log probabilities down to -100 differ by whole numbers in bfloat16; weights that are wrong by
    5% differ by more than that rounding. With other weights the programs are the same."""
    config, params = tiny_parts()
    config.model.dtype = "bfloat16"
    folder = tmp_path / "exported"
    worst = []
    for seed, scale in BFLOAT16_SEEDS:
        rng = np.random.default_rng(seed)
        model = inference.CoCaModel(config, noisy(params, 0, scale, rng), words)  # noqa: F811
        if not folder.exists():
            export_programs.export(model, str(folder))
        export_folder.write(model, str(folder), programs=programs_in(folder))
        worst.append(export_programs.check(model, str(folder))["decode_step"])
    assert max(worst) > 0.1  # an absolute limit would refuse it
    other = inference.CoCaModel(config, noisy(model.params, 1, 0.05, rng), words)
    with pytest.raises(ValueError, match="program encode_image: .* bfloat16 rounding explains"):
        export_programs.check(other, str(folder))


def noisy(params, share, scale, rng):
    """share of the parameters plus normal noise as large as `scale` of them (share 1), or alone."""

    def one(x):
        noise = np.float32(scale * rng.standard_normal(x.shape))
        return np.asarray(x) * (1 + noise) if share else noise

    return jax.tree.map(one, params) | {"log_scale": params["log_scale"]}


def programs_in(folder):
    return [f"programs/{path.name}" for path in (folder / "programs").iterdir()]


@pytest.mark.long
def test_a_refused_export_leaves_the_folder_as_it_was(model, monkeypatch, tmp_path):  # noqa: F811
    """The programs are those of a model with another activation."""
    config = typed(model.config).change({"model.activation": "relu"})
    other = inference.CoCaModel(config, model.params, model.vocabulary)
    wrong = export_programs.make_programs(other, ["cpu"])
    monkeypatch.setattr(export_programs, "make_programs", lambda *_: wrong)
    place = tmp_path / "exported"
    with pytest.raises(ValueError, match="program encode_image: its output differs"):
        export_programs.export(model, str(place))
    assert list(tmp_path.iterdir()) == []
    export_folder.write(model, str(place))
    (place / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    with pytest.raises(ValueError, match="program encode_image: its output differs"):
        export_programs.export(model, str(place))
    assert {path.name: path.read_bytes() for path in place.iterdir()} == before
    monkeypatch.undo()
    files = export_programs.export(model, str(place)).files
    assert "programs/decode_step.jax_export" in files and len(files) == 9
    assert {path.name for path in place.iterdir()} == {*before, "programs"}
    assert coca_jax.load(str(place)).checksum() == model.checksum()


def test_onnx_without_its_packages_is_a_line_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    given = dict(checkpoint="nowhere", out=str(tmp_path / "out"), format="onnx", push="")
    given |= dict(private=False, base="", share=None)
    args = types.SimpleNamespace(**given, platforms=["cpu"], int8=False, batch_size=1)
    monkeypatch.setattr(export, "flags", types.SimpleNamespace(FLAGS=args))
    with pytest.raises(ValueError, match="--format=onnx needs jax2onnx: pip install"):
        export.main(["export"])
    assert not (tmp_path / "out").exists()


def test_the_command_writes_each_format_and_refuses_the_rest(monkeypatch, tmp_path, capsys):
    """What it asks of what writes; that is tested above and in test_hub.py."""
    loaded = types.SimpleNamespace(
        captions=None, params={}, head_kind=None, step=None, config=typed(tiny_config())
    )
    calls = []

    def writes(*given, **how):
        calls.append((*given[1:], *how.items()))
        return {"a": 1_000, "b": 234}

    monkeypatch.setattr(export.coca_jax, "load", lambda place, **how: loaded)
    for name in ("check", "write_hub"):
        monkeypatch.setattr(export_folder, name, writes)
    written = export_programs.Exported({"a": 1_000, "b": 234}, {"decode_step": 1e-6})
    monkeypatch.setattr(export_programs, "export", lambda *given: written)
    monkeypatch.setattr(export_onnx, "packages", lambda: None)
    onnx = dict(files={"c": 5}, differences=0.5)
    monkeypatch.setattr(export_onnx, "export", lambda *_, **how: onnx | how)
    monkeypatch.setattr(export.hub, "push", lambda folder, name, private: f"{name} {private}")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "eval.json").write_text('{"score": 1}')
    flags_of("export", monkeypatch)

    def call(out, *given):
        for name in ("format", "batch_size", "int8", "push", "private", "platforms"):
            export.flags.FLAGS[name].unparse()
        place = f"--checkpoint={tmp_path / 'run'}"
        export.flags.FLAGS(["export", place, f"--out={tmp_path / out}", *given])
        return export.main(["export"])

    told = call("programs")
    assert told["bytes"] == 1_234 and told["differences"] == {"decode_step": 1e-6}
    assert "1,000 bytes" in capsys.readouterr().out
    written = export_programs.Exported({"a": 1}, {})
    assert call("programs", "--platforms=tpu,rocm")["differences"] == {}
    assert "not compared with the model: tpu, rocm" in capsys.readouterr().err
    told = call("hub", "--format=hub", "--push=org/name", "--private")
    assert told["url"] == "org/name True"
    assert (str(tmp_path / "hub"), "org/name", {"score": 1}) in calls
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/config.json").write_text('{"port": 80}')
    for kind in ("folder", "hub", "onnx"):
        with pytest.raises(ValueError, match=r"theirs holds something else \(config.json\)"):
            call("theirs", f"--format={kind}")
    call("mine", "--format=hub")
    assert calls[-1] == (str(tmp_path / "mine"), "org/mine", {"score": 1})
    told = call("onnx", "--format=onnx", "--batch_size=8", "--int8")
    assert (told["batch"], told["int8"], told["bytes"], told["differences"]) == (8, True, 5, 0.5)
    for given, says in (
        (["--int8"], "--batch_size and --int8 belong to --format=onnx"),
        (["--batch_size=4"], "--batch_size and --int8 belong to --format=onnx"),
        (["--format=onnx", "--batch_size=0"], "--batch_size=0: 0 is not a positive integer"),
        (["--push=org/name"], "--push=org/name: only with --format=hub"),
        (["--private"], "--private: only with --push=org/name"),
        (["--private", "--format=hub"], "--private: only with --push=org/name"),
        (["--platforms="], "--platforms= names none: choose from cpu, tpu, cuda, rocm"),
        (["--platforms=tpu", "--format=hub"], "--platforms=tpu: only with --format=folder"),
        (["--platforms=cpu,tpu", "--format=onnx"], "--platforms=cpu,tpu: only with --format=fold"),
    ):
        with pytest.raises((ValueError, flags.Error), match=says):
            call("no", *given)
    told = "the programs leave out the task head, whose weights are written too: coca_jax.load("
    assert told not in capsys.readouterr().err
    loaded.head_kind = heads.Classification()
    for kind, says in (("folder", True), ("onnx", True), ("hub", False)):
        call(kind, f"--format={kind}")
        assert (f"{told}'{tmp_path / kind}') has" in capsys.readouterr().err) == says
    del loaded.captions
    for kind in ("folder", "onnx"):
        with pytest.raises(ValueError, match="without a decoder has no program for captions; give"):
            call("no", f"--format={kind}")
