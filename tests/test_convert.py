"""open_clip weights in and out, without torch: golden outputs, refusals, memory, commands."""

import filecmp
import json
import pathlib
import tracemalloc

import conftest
import jax
import numpy as np
import open_clip_cases as cases
import pytest
from conftest import fresh_state
from conversion_cases import (
    SMALL,
    as_tensors,
    assert_equal_digests,
    digests_of,
    each_loss,
    forward,
    greedy,
    relative,
    small_weights,
    with_keys,
    write_source,
)
from one_device import models_on_one  # noqa: F401

import coca_jax
from coca_jax.cli import convert
from coca_jax.config import Model, read
from coca_jax.data import images, vocabulary
from coca_jax.data.vocabulary import clip_bpe
from coca_jax.inference import export_programs as programs
from coca_jax.interop import export_format, open_clip_config, safetensors
from coca_jax.interop.open_clip_weights import Layout, count
from coca_jax.models import coca
from coca_jax.parallel import sharding
from coca_jax.runtime import json_files, storage
from coca_jax.training import recipes, warm_start

GOLDEN = pathlib.Path(__file__).parent / "golden/open_clip.npz"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("open_clip"), small_weights())


@pytest.fixture(scope="module")
def export(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("export")
    convert.from_open_clip(str(source), str(out))
    return out


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN))


@pytest.fixture(scope="module")
def inputs():
    tokens = cases.captions(SMALL.text.vocab_size, SMALL.text.max_len)
    return cases.pixels(len(tokens), SMALL.image_size), tokens


def test_outputs_in_bfloat16_are_near_open_clips(export, golden, inputs):
    """In float32 they are those of the model that is loaded, below."""
    params, config = export_format.read_export(export)
    config = config.change({"model.dtype": "bfloat16"})
    pixels, tokens = inputs
    out = forward(coca.build(config.model), params, pixels, tokens)
    assert relative(out.image_embedding, golden["image_embedding"]) < 2e-2
    assert relative(out.text_embedding, golden["text_embedding"]) < 2e-2
    logits = np.asarray(out.logits[:, :-1])[tokens[:, 1:] != 0]
    assert relative(logits, golden["logits"]) < 2e-2


def test_losses_and_gradients_equal_open_clip(export, golden, inputs):
    """Both in float64: what is left is not rounding but a mistake. What float32 rounds is in
    test_open_clip_parity.py."""
    tolerance = 1e-11
    params, config = export_format.read_export(export)
    config = config.change({"model.dtype": "float64"})
    with jax.enable_x64(True):
        found = list(each_loss(coca.build(config.model, remat="full"), params, *inputs))
    for (value, gradients, _), loss, digests in zip(found, golden["losses"], golden["gradients"]):
        assert value == pytest.approx(loss, rel=tolerance)
        wanted = dict(zip(golden["gradient_keys"], digests))
        assert_equal_digests(digests_of(as_tensors(config.model, gradients)), wanted, tolerance)


def test_greedy_captions_equal_open_clip(export, golden, inputs):
    params, config = export_format.read_export(export)
    model = coca.build(config.model)
    tokens = greedy(model, params, inputs[0], SMALL.text.max_len, SMALL.text.vocab_size)
    np.testing.assert_array_equal(tokens, golden["greedy"])


def test_load_gives_the_same(export, golden, inputs):
    model = coca_jax.load(str(export))
    out = model.forward(*inputs)
    assert relative(out.image_embedding, golden["image_embedding"]) < 2e-5
    assert relative(out.text_embedding, golden["text_embedding"]) < 2e-5
    logits = np.asarray(out.logits)[:, :-1][inputs[1][:, 1:] != 0]
    assert relative(logits, golden["logits"]) < 2e-5


@pytest.mark.long
def test_exported_programs_hide_id_0_as_the_model_does(tmp_path):
    """A model of one block a tower, which is enough for that."""
    one = dict(layers=1)
    config = with_keys(cases.SMALL, vision_cfg=one, text_cfg=one, multimodal_cfg=one)
    shapes = Layout(read(Model, open_clip_config.to_model(config))).tensors()
    tensors = {key: cases.redraw(key, shape) for key, shape in shapes.items()}
    source = write_source(tmp_path / "in", tensors, config)
    convert.from_open_clip(str(source), str(tmp_path / "weights"))
    model = coca_jax.load(str(tmp_path / "weights"))
    programs.export(model, str(tmp_path / "out"))
    assert max(programs.check(model, str(tmp_path / "out")).values()) < 1e-5


def test_preprocessing_equals_torchvision(golden):
    reference = golden["pixels"]
    for image, wanted in zip(cases.odd_images(len(reference)), reference):
        got = images.preprocess_eval(images.decode(image), wanted.shape[0], "crop")
        difference = np.abs(got.astype(int) - wanted).max()
        assert difference <= 2, (image.mode, image.size, difference)


def test_going_back_gives_the_same_bytes(source, export, tmp_path):
    convert.to_open_clip(str(export), str(tmp_path))
    before = safetensors.read(source / convert.WEIGHTS_NAME)
    after = safetensors.read(tmp_path / convert.WEIGHTS_NAME)
    assert set(before) == set(after)
    for key, tensor in before.items():
        np.testing.assert_array_equal(after[key], tensor)
    again = tmp_path / "again"
    convert.from_open_clip(str(tmp_path), str(again), bpe=str(source / "vocabulary.bpe.gz"))
    for name in ("params.safetensors", "vocabulary.bpe.gz"):
        assert (again / name).read_bytes() == (export / name).read_bytes()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("visual.proj"), "missing: visual.proj"),
        (lambda t: t.update(extra=np.zeros(2, np.float32)), "unknown: extra"),
        (
            lambda t: t.update({"visual.proj": t["visual.proj"][:-1]}),
            r"misshapen: visual.proj is \(47, 48\), not \(48, 48\)",
        ),
        (
            lambda t: [t.pop(key) for key in list(t) if ".ln_1." in key],
            r"missing: .*ln_1.weight.* and \d+ more",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_nothing_is_written(tmp_path, change, message):
    tensors = small_weights()
    change(tensors)
    source = write_source(tmp_path / "in", tensors)
    with pytest.raises(ValueError, match=message):
        convert.from_open_clip(str(source), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_wrappers_and_one_element_scalars(tmp_path, export):
    tensors = {f"module.{key}": tensor for key, tensor in small_weights().items()}
    tensors["module.logit_scale"] = tensors["module.logit_scale"].reshape(1)
    source = write_source(tmp_path / "in", tensors)
    convert.from_open_clip(str(source), str(tmp_path / "out"))
    same = (tmp_path / "out/params.safetensors").read_bytes()
    assert same == (export / "params.safetensors").read_bytes()


def test_the_sigmoid_loss_s_bias_goes_both_ways(tmp_path):
    tensors = small_weights() | {"logit_bias": np.float32(-9.5)}
    source = write_source(tmp_path / "in", tensors)
    convert.from_open_clip(str(source), str(tmp_path / "out"))
    params, config = export_format.read_export(tmp_path / "out")
    assert params["logit_bias"]["value"] == -9.5
    pixels, tokens = cases.pixels(1, 32), np.ones((1, 12), np.int32)
    model = coca.build(config.model, sigmoid=True)
    bias = jax.jit(lambda p: model.apply({"params": p}, pixels, tokens, tokens != 0).logit_bias)
    assert bias(params) == -9.5
    model, _ = convert.to_open_clip(str(tmp_path / "out"), str(tmp_path / "back"))
    assert model["init_logit_bias"] == -9.5
    assert safetensors.read(tmp_path / "back" / convert.WEIGHTS_NAME)["logit_bias"] == -9.5


def test_images_that_are_squashed_are_so_in_open_clip_too(tmp_path):
    source = write_source(tmp_path / "in", small_weights())
    path = source / convert.CONFIG_NAME
    given = dict(resize_mode="squash", interpolation="bilinear", mean=[0.5] * 3, std=[0.25] * 3)
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(preprocess_cfg=given)))
    convert.from_open_clip(str(source), str(tmp_path / "out"))
    assert export_format.read_config(tmp_path / "out").data.resize == "squash"
    convert.to_open_clip(str(tmp_path / "out"), str(tmp_path / "back"))
    written = json.loads((tmp_path / "back" / convert.CONFIG_NAME).read_text())
    assert written["preprocess_cfg"] == given


def test_a_bucket_gets_the_whole_folder(source, export, s3, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    there, back = f"{s3}/converted", f"{s3}/back"
    convert.from_open_clip(str(source), there)
    assert {file.name for file in storage.place(there).iterdir()} == {
        *("config.json", "params.safetensors", "vocabulary.bpe.gz")
    }
    for (name, found), wanted in zip(
        export_format.flatten(export_format.read_export(there)[0]).items(),
        export_format.flatten(export_format.read_export(export)[0]).values(),
    ):
        np.testing.assert_array_equal(found, wanted, err_msg=name)
    convert.to_open_clip(there, back)
    names = {file.name for file in storage.place(back).iterdir()}
    assert names == {convert.WEIGHTS_NAME, convert.CONFIG_NAME, clip_bpe.FILE_NAME}
    assert not list(tmp_path.iterdir())


def test_a_vocabulary_that_open_clip_lacks_does_not_go_back(export, tmp_path, caplog):
    """Its texts would be read by CLIP's byte pairs, with ids of others."""
    convert.to_open_clip(str(export), str(tmp_path / "back"))
    assert "other merges than CLIP's" in caplog.text and "clips" not in caplog.text
    merges = str(tmp_path / "back" / clip_bpe.FILE_NAME)
    assert f"get_tokenizer('local-dir:{tmp_path}/back', bpe_path='{merges}')" in caplog.text
    found = clip_bpe.ClipBpe(clip_bpe.find_merges(tmp_path / "back"))  # as `convert` reads it again
    known = vocabulary.load(str(export / "vocabulary.bpe.gz"))
    assert found.encode("a red cat") == known.encode("a red cat") and found.size == known.size
    open_clip = pytest.importorskip("open_clip", reason="needs the extra 'parity'")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path}/back", bpe_path=merges)
    ids = tokenizer(["a red cat"])[0].tolist()
    assert ids[: ids.index(known.eos_id)] == [known.bos_id, *known.encode("a red cat")]
    words = tmp_path / "words.model"
    vocabulary.train([f"a {word} {i}" for word in ("cat", "dog") for i in range(60)], 300, words)
    params, config = export_format.read_export(export)
    own = str(tmp_path / "own")
    export_format.write_export(own, params, {"model": config.model.to_dict()}, words)
    with pytest.raises(ValueError, match="own: .*not CLIP's byte pairs.*--to=transformers"):
        convert.to_open_clip(own, str(tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_that_open_clip_reads_no_clips_is_told(export, tmp_path, caplog):
    params, config = export_format.read_export(export)
    told = dict(resize="crop", num_frames=4, mean=[0.5] * 3, std=[0.5] * 3)
    given = {"model": config.model.to_dict(), "preprocess": told}
    clips = str(tmp_path / "clips")
    export_format.write_export(clips, params, given, export / "vocabulary.bpe.gz")
    convert.to_open_clip(clips, str(tmp_path / "back"))
    assert f"{clips}: a model of clips of 4 frames; open_clip reads images" in caplog.text


def test_converting_holds_no_second_copy(tmp_path):
    config = with_keys(cases.SMALL, vision_cfg=dict(layers=24, width=256))
    model = read(Model, open_clip_config.to_model(config))
    shapes = Layout(model).tensors()
    size = 4 * count(shapes)
    zeros = {k: np.broadcast_to(np.float32(0), shape) for k, shape in shapes.items()}
    source = write_source(tmp_path / "in", zeros, config)
    tracemalloc.start()
    convert.from_open_clip(str(source), str(tmp_path / "out"))
    convert.to_open_clip(str(tmp_path / "out"), str(tmp_path / "back"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 40e6 and peak < 0.2 * size


def test_weights_start_a_run_straight_on_the_mesh(export, monkeypatch):
    """Each device gets its part of each matrix; together they are the weights."""
    config = recipes.load(f"finetune_open_clip:{export}")
    boxed = jax.eval_shape(lambda: coca.init(coca.build(config.model), jax.random.key(0)))
    nothing = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), boxed)
    monkeypatch.setattr(conftest, "_drawn", lambda *_: nothing)  # a draw is compiled
    mesh = sharding.make_mesh(2, 4, 1)
    params = export_format.flatten(export_format.read_export(export)[0])
    with jax.set_mesh(mesh):
        state = fresh_state(coca.build(config.model), config, mesh)
        wanted = {k: x.sharding for k, x in export_format.flatten(state.params).items()}
        state = warm_start.apply(state, str(export))
    split = []
    for path, array in export_format.flatten(state.params).items():
        np.testing.assert_array_equal(array, params[path])
        assert array.sharding.is_equivalent_to(wanted[path], array.ndim)
        if path.endswith("kernel"):
            split.append({array.nbytes / shard.data.nbytes for shard in array.addressable_shards})
    assert len(split) > 20 and all(parts == {4} for parts in split)


def test_export_folders(export, tmp_path):
    config = export_format.read_config(export)
    assert config.data.resize == "crop" and config.tokenizer == "vocabulary.bpe.gz"
    assert export_format.vocabulary_path(export) == str(export / "vocabulary.bpe.gz")
    assert config.model.image_mean == (0.48145466, 0.4578275, 0.40821073)
    assert not export_format.is_export(tmp_path)
    with pytest.raises(FileNotFoundError, match="not an export"):
        export_format.read_export(tmp_path)


def test_a_model_is_not_converted_over_one_of_other_weights(source, export, tmp_path):
    """In both directions; the same one may be written again."""
    tensors = small_weights()
    tensors["visual.proj"] = tensors["visual.proj"] + np.float32(1e-3)
    other = write_source(tmp_path / "in", tensors)
    out, back = tmp_path / "out", tmp_path / "back"
    for _ in range(2):
        convert.from_open_clip(str(source), str(out))
        convert.to_open_clip(str(export), str(back))
    with pytest.raises(FileExistsError, match=r"out holds a model with other weights \(params.saf"):
        convert.from_open_clip(str(other), str(out))
    assert filecmp.cmp(out / "params.safetensors", export / "params.safetensors", shallow=False)
    convert.from_open_clip(str(other), str(tmp_path / "others"))
    before = (back / convert.WEIGHTS_NAME).read_bytes()
    with pytest.raises(
        FileExistsError, match=f"back holds .* other weights .{convert.WEIGHTS_NAME}"
    ):
        convert.to_open_clip(str(tmp_path / "others"), str(back))
    assert (back / convert.WEIGHTS_NAME).read_bytes() == before


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers(tmp_path, value):
    tensors = small_weights()
    tensors["visual.proj"] = tensors["visual.proj"].copy()
    tensors["visual.proj"][3, :2] = value
    source = write_source(tmp_path / "in", tensors)
    with pytest.raises(ValueError, match=f"{convert.WEIGHTS_NAME}: visual.proj has 2 values"):
        convert.from_open_clip(str(source), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c["tokenizer"].update(file="../../etc/passwd"), "tokenizer.file='../../etc/pas"),
        (lambda c: c["tokenizer"].update(file="/etc/passwd"), "tokenizer.file='/etc/passwd'"),
        (lambda c: c["tokenizer"].update(file="s3://bucket/key"), "tokenizer.file='s3:"),
        (lambda c: c["tokenizer"].update(file=["a"]), r"tokenizer.file=\['a'\]"),
        (lambda c: c.update(tokenizer=[]), "no 'tokenizer'"),
        (lambda c: c.pop("model"), "no 'model'"),
    ],
)
def test_exports_that_name_files_elsewhere_or_are_none(export, tmp_path, change, message):
    config = json.loads((export / "config.json").read_text())
    change(config)
    del config[json_files.SEAL_KEY]  # a stranger's folder: its checksum, if any, is of what it says
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "params.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        export_format.vocabulary_path(tmp_path)


@pytest.mark.parametrize("names", [("a", "a/b"), ("a/b", "a"), ("/".join("a" * 100),)])
def test_arrays_that_fit_no_tree(names):
    with pytest.raises(ValueError, match="fits no tree"):
        export_format.unflatten({name: np.zeros(1) for name in names})


def test_the_command(source, commands, tmp_path):
    def run(*arguments):
        return commands.run(["convert", *arguments], tmp_path)

    done = run(f"--input={source}", f"--out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["tensors"] == len(Layout(SMALL).tensors())
    assert result["parameters"] == count(Layout(SMALL).parameters())
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").write_bytes(b"")
    given = [f"--input={source}", f"--out={source}"]
    for out, says in (
        (source, f"--out={source} is the folder of --input={source}; give another one"),
        (f"{source}/../{source.name}", "is the folder of --input="),
        (tmp_path / "photos", "photos holds something else (a.jpg); give a new folder"),
    ):
        given[1] = f"--out={out}"
        with pytest.raises(ValueError) as told:
            convert._check_out(str(source), str(out))
        assert says in str(told.value)
    done = run(*given)
    assert done.returncode == 2 and "holds something else (a.jpg)" in done.stderr
    convert._check_out(str(source), str(tmp_path / "out"))  # again
    missing = run(f"--input={tmp_path / 'none.bin'}", f"--out={tmp_path / 'other'}")
    assert missing.returncode == 2
    assert (
        missing.stderr.strip() == f"error: --input={tmp_path / 'none.bin'}: no such file or folder"
    )
