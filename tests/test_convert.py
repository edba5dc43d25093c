"""open_clip weights in and out, without torch: golden outputs, refusals, memory, commands."""

import json
import pathlib
import tracemalloc

import jax
import numpy as np
import open_clip_cases as cases
import pytest
from ml_collections import ConfigDict

import coca_jax
from coca_jax import convert, export_format, partitioning, recipes, sealed_json, warm_start
from coca_jax.config import Model, read
from coca_jax.data import images
from coca_jax.inference import export_programs as programs
from coca_jax.interop import open_clip_config, safetensors_file
from coca_jax.interop.open_clip_layout import Layout, count
from coca_jax.interop.safetensors_file import Blocks
from coca_jax.models import coca
from coca_jax.ops.captioning import captioning_loss
from coca_jax.ops.contrastive import contrastive_loss
from coca_jax.training.state import init_state

GOLDEN = pathlib.Path(__file__).parent / "golden/open_clip.npz"
SMALL = read(Model, open_clip_config.to_model(cases.SMALL))


def small_weights():
    return {key: cases.redraw(key, shape) for key, shape in Layout(SMALL).tensors().items()}


def write_weights(path, tensors):
    safetensors_file.write(
        path, {k: Blocks(v.shape, lambda v=v: [np.asarray(v)]) for k, v in tensors.items()}
    )


def write_source(folder, tensors, config=cases.SMALL):
    """A folder as open_clip publishes it."""
    folder.mkdir(exist_ok=True)
    write_weights(folder / convert.WEIGHTS_NAME, tensors)
    (folder / convert.CONFIG_NAME).write_text(json.dumps(dict(model_cfg=config)))
    (folder / "vocabulary.bpe.gz").write_bytes(cases.small_merges())
    return folder


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


def forward(model, params, pixels, tokens):
    return jax.jit(model.apply)({"params": params}, pixels, tokens, tokens != 0)


def relative(value, reference):
    """Largest difference over the largest value."""
    return np.abs(np.asarray(value) - reference).max() / np.abs(reference).max()


@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-5), ("bfloat16", 2e-2)])
def test_outputs_equal_open_clip(export, golden, inputs, dtype, tolerance):
    params, config = export_format.read_export(export)
    config = config.change({"model.dtype": dtype})
    pixels, tokens = inputs
    out = forward(coca.build(config.model), params, pixels, tokens)
    assert relative(out.image_embedding, golden["image_embedding"]) < tolerance
    assert relative(out.text_embedding, golden["text_embedding"]) < tolerance
    logits = np.asarray(out.logits[:, :-1])[tokens[:, 1:] != 0]
    assert relative(logits, golden["logits"]) < tolerance


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float64", 1e-11)])
def test_losses_and_gradients_equal_open_clip(export, golden, inputs, dtype, tolerance):
    """Of a model in float64; in float64 here too, what is left is not rounding but a mistake."""
    params, config = export_format.read_export(export)
    config = config.change({"model.dtype": dtype})
    with jax.enable_x64(dtype == "float64"):
        found = list(each_loss(coca.build(config.model), params, *inputs))
    for (value, gradients), loss, digests in zip(found, golden["losses"], golden["gradients"]):
        assert value == pytest.approx(loss, rel=tolerance)
        wanted = dict(zip(golden["gradient_keys"], digests))
        assert_equal_digests(digests_of(as_tensors(config.model, gradients)), wanted, tolerance)


def digests_of(tensors):
    return {key: cases.digest(key, tensor) for key, tensor in tensors.items()}


def assert_equal_digests(found, wanted, tolerance):
    """Norm and product of each tensor, within tolerance of its norm."""
    assert set(found) == set(wanted)
    for key, digest in wanted.items():
        assert np.abs(found[key] - digest).max() <= tolerance * max(digest[0], 1e-12), key


def as_tensors(model, params):
    """Parameters or gradients here as open_clip's tensors, by key, in their own dtype."""
    flat = {path: np.asarray(leaf) for path, leaf in export_format.flatten(params).items()}
    layout = Layout(model)
    shapes = layout.tensors()
    return {
        key: np.concatenate([np.ravel(part.there(flat[part.path])) for part in parts]).reshape(
            shapes[key]
        )
        for key, parts in layout.by_key.items()
    }


def each_loss(model, params, pixels, tokens):
    """The contrastive, then the captioning loss by open_clip's conventions, unweighted, each with
    its gradients; all in the model's dtype."""
    dtype = model.dtype
    params, pixels = jax.tree.map(lambda x: np.asarray(x, dtype), (params, pixels))

    def total(params, weights):
        out = model.apply({"params": params}, pixels, tokens, tokens != 0)
        contrastive = contrastive_loss(
            out.image_embedding, out.text_embedding, out.scale, reduction="mean"
        )[0]
        captioning = captioning_loss(
            out.states[:, :-1], out.kernel, out.bias, tokens[:, 1:], tokens[:, 1:] != 0
        )[0]
        return weights[0] * contrastive + weights[1] * captioning

    run = jax.jit(jax.value_and_grad(total))
    for weights in np.eye(2, dtype=dtype):
        value, gradients = run(params, weights)
        yield float(value), gradients


def test_greedy_captions_equal_open_clip(export, golden, inputs):
    params, config = export_format.read_export(export)
    model = coca.build(config.model)
    tokens = greedy(model, params, inputs[0], SMALL.text.max_len, SMALL.text.vocab_size)
    np.testing.assert_array_equal(tokens, golden["greedy"])


def greedy(model, params, pixels, length, vocab_size):
    """Captions by the largest logit, the whole model on each prefix; zeros after the end."""
    tokens = np.zeros((len(pixels), length), np.int32)
    tokens[:, 0] = vocab_size - 2
    run = jax.jit(lambda p, t: model.apply({"params": p}, pixels, t, t != 0).logits)
    ended = np.zeros(len(pixels), bool)
    for step in range(1, length):
        logits = np.asarray(run(params, tokens))[:, step - 1]
        chosen = np.where(ended, 0, logits.argmax(-1))
        ended |= chosen == vocab_size - 1
        tokens[:, step] = chosen
    return tokens


def test_load_gives_the_same(export, golden, inputs):
    model = coca_jax.load(str(export))
    out = model.forward(*inputs)
    assert relative(out.image_embedding, golden["image_embedding"]) < 2e-5
    assert relative(out.text_embedding, golden["text_embedding"]) < 2e-5
    logits = np.asarray(out.logits)[:, :-1][inputs[1][:, 1:] != 0]
    assert relative(logits, golden["logits"]) < 2e-5


def test_exported_programs_hide_id_0_as_the_model_does(export, tmp_path):
    model = coca_jax.load(str(export))
    programs.export(model, str(tmp_path))
    assert max(programs.check(model, str(tmp_path)).values()) < 1e-5


def test_preprocessing_equals_torchvision(golden):
    reference = golden["pixels"]
    for image, wanted in zip(cases.odd_images(len(reference)), reference):
        got = images.preprocess_eval(images.decode(image), wanted.shape[0], "crop")
        difference = np.abs(got.astype(int) - wanted).max()
        assert difference <= 2, (image.mode, image.size, difference)


@pytest.mark.parametrize(
    "name, tensors, parameters",
    [("coca_ViT-B-32", 629, 253_560_065), ("coca_ViT-L-14", 773, 638_450_177)],
)
def test_sizes_of_the_released_models(name, tensors, parameters):
    model = read(Model, open_clip_config.to_model(open_clip_config.RELEASED[name]))
    layout = Layout(model)
    assert len(layout.tensors()) == tensors
    assert count(layout.tensors()) == count(layout.parameters()) == parameters
    assert shapes_of(model) == layout.parameters()


def test_the_later_layout_s_own_configuration_is_read():
    """coca2_ViT-B-32: coca_ViT-B-32 with two poolers and the corrected mask."""
    first = open_clip_config.RELEASED["coca_ViT-B-32"]
    fusion = first["multimodal_cfg"] | dict(attn_pooler_heads=8)
    changes = dict(
        vision_cfg=dict(attentional_pool="cascade"), text_cfg=dict(correct_cls_mask=True)
    )
    found = open_clip_config.to_model(with_keys(first, **changes) | dict(multimodal_cfg=fusion))
    model = read(Model, found)
    assert (model.pooler.kind, model.text.cls_mask) == ("cascade", "exact")
    layout = Layout(model)
    tensors = layout.tensors()
    assert "visual.proj" not in tensors and tensors["visual.ln_post.weight"] == (768,)
    assert tensors["visual.attn_pool_contrastive.query"] == (1, 512)
    assert tensors["visual.attn_pool_contrastive.attn.in_proj_weight"] == (1536, 512)
    # The second pooler (9 tensors, 4 D^2 + 9 D) for the projection; a norm of W for one of D.
    added = 9 * 512 + 4 * 512**2 - 512**2 + 2 * (768 - 512)
    assert len(tensors) == 629 + 9 - 1
    assert count(tensors) == count(layout.parameters()) == 253_560_065 + added


@pytest.mark.parametrize("pool", [True, "cascade", "parallel", False])
@pytest.mark.parametrize("quick_gelu", [True, False])
def test_every_arrangement_has_the_model_s_own_parameters(pool, quick_gelu):
    width = {} if pool else dict(width=48)
    keys = dict(attentional_pool=pool, no_ln_pre=quick_gelu) | width
    config = with_keys(cases.SMALL, vision_cfg=keys)
    config = config | dict(quick_gelu=quick_gelu)
    model = read(Model, open_clip_config.to_model(config))
    assert shapes_of(model) == Layout(model).parameters()
    back = open_clip_config.from_model(model)
    assert open_clip_config.to_model(back) == open_clip_config.to_model(config)


def shapes_of(model):
    built = coca.build(model)
    params = jax.eval_shape(lambda: partitioning.unbox(coca.init(built, jax.random.key(0))))
    return {path: leaf.shape for path, leaf in export_format.flatten(params).items()}


def with_keys(config, **sections):
    return config | {name: config[name] | keys for name, keys in sections.items()}


@pytest.mark.parametrize(
    "section, keys, message",
    [
        ("text_cfg", dict(hf_model_name="roberta-base"), "text_cfg.hf_model_name='roberta-base'"),
        ("text_cfg", dict(text_arch="modern"), "text_cfg.text_arch='modern': an unknown key"),
        ("text_cfg", dict(embed_cls=False), "text_cfg.embed_cls=False"),
        ("text_cfg", dict(pad_id=1), "text_cfg.pad_id=1"),
        ("text_cfg", dict(width=64), "text_cfg.width=64 differs from embed_dim=48"),
        (
            "vision_cfg",
            dict(attentional_pool=False),
            "text_cfg.width=48 differs from vision_cfg.width=64",
        ),
        (
            "vision_cfg",
            dict(attentional_pool=False, width=48, head_width=16, final_ln_after_pool=True),
            "final_ln_after_pool=True without attentional_pool",
        ),
        ("vision_cfg", dict(attentional_pool=1), "vision_cfg.attentional_pool=1; only true, fa"),
        ("vision_cfg", dict(scale_heads=True), "vision_cfg.scale_heads=True"),
        ("vision_cfg", dict(ls_init_value=-0.1), "vision_cfg.ls_init_value=-0.1: give a number"),
        ("text_cfg", dict(norm_kwargs=dict(bias=False)), "{'bias': False} is not supported"),
        ("text_cfg", dict(norm_kwargs=dict(eps=1)), "{'eps': 1}: give an eps from"),
        ("text_cfg", dict(act_kwargs=dict(approximate="erf")), "text_cfg.act_kwargs="),
        ("vision_cfg", dict(timm_model_name="vit"), "vision_cfg.timm_model_name='vit'"),
        ("vision_cfg", dict(image_size=[32, 64, 3]), "or height and width"),
        ("multimodal_cfg", dict(context_length=8), "multimodal_cfg.context_length=8"),
    ],
)
def test_arrangements_that_are_not_supported_are_named(section, keys, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        open_clip_config.to_model(with_keys(cases.SMALL, **{section: keys}))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: m.update(activation="gelu"), "model.activation='gelu' .multimodal."),
        (lambda m: m.update(norm="rms"), "model.norm='rms'"),
        (lambda m: m.update(bias=False), "model.bias=False"),
        (lambda m: m.update(gated_mlp=True), "model.gated_mlp=True"),
        (lambda m: m.update(positions="rope"), "model.positions='rope'"),
        (lambda m: m.update(norm_eps=1e-6), "model.norm_eps=1e-06 .multimodal."),
        (lambda m: m.update(qk_norm=True), "model.qk_norm_kind='rms' .image."),
        (lambda m: m.pooler.update(block=dict(norm_eps=1e-6)), "model.norm_eps=1e-06 .pooler."),
        (lambda m: m.image.update(registers=2), "model.image.registers=2"),
        (lambda m: m.text.update(kv_heads=1), "model.text.kv_heads=1"),
        (lambda m: m.text.update(cross="paper"), "model.text.cross='paper'"),
        (lambda m: m.text.update(tie_embeddings=True), "model.text.tie_embeddings=True"),
        (lambda m: m.image.update(final_norm=True), "model.image.final_norm=True"),
    ],
)
def test_models_that_open_clip_cannot_hold_are_refused(change, message):
    model = ConfigDict(SMALL.to_dict())
    change(model)
    with pytest.raises(ValueError, match=message):
        open_clip_config.from_model(model)


def test_going_back_gives_the_same_bytes(source, export, tmp_path):
    convert.to_open_clip(str(export), str(tmp_path))
    before = safetensors_file.read(source / convert.WEIGHTS_NAME)
    after = safetensors_file.read(tmp_path / convert.WEIGHTS_NAME)
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
    out = forward(coca.build(config.model, sigmoid=True), params, pixels, tokens)
    assert out.logit_bias == -9.5
    model, _ = convert.to_open_clip(str(tmp_path / "out"), str(tmp_path / "back"))
    assert model["init_logit_bias"] == -9.5
    assert safetensors_file.read(tmp_path / "back" / convert.WEIGHTS_NAME)["logit_bias"] == -9.5


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


def test_weights_start_a_run_straight_on_the_mesh(export):
    """Each device gets its part of each matrix; together they are the weights."""
    config = recipes.load(f"finetune_open_clip:{export}")
    mesh = partitioning.make_mesh(2, 4, 1)
    params = export_format.flatten(export_format.read_export(export)[0])
    with jax.set_mesh(mesh):
        state = init_state(coca.build(config.model), config, mesh)
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


def test_the_model_is_found_by_its_tensors_or_asked_for(tmp_path):
    shape = (50, 768)
    positions = {"visual.positional_embedding": np.broadcast_to(np.float32(0), shape)}
    found, *_ = convert._model_config(str(tmp_path / "x.bin"), "", positions)
    assert found is open_clip_config.RELEASED["coca_ViT-B-32"]
    with pytest.raises(ValueError, match="give its JSON configuration as --model"):
        convert._model_config(str(tmp_path / "x.bin"), "", {})
    with pytest.raises(FileNotFoundError, match="--model=coca_ViT-Z"):
        convert._model_config(str(tmp_path / "x.bin"), "coca_ViT-Z", {})


@pytest.mark.parametrize("key", ["interpolation", "resize_mode"])
def test_other_preprocessing_is_refused(key):
    with pytest.raises(ValueError, match=f"preprocess_cfg.{key}='other'"):
        open_clip_config.check_preprocess({key: "other"})


ODD = [  # keys of open_clip_config.json, what is said of them
    (dict(model_cfg=[1]), "the configuration is a list"),
    (dict(model_cfg=None), "the configuration is a NoneType"),
    (dict(vision_cfg=[1]), "has no vision_cfg"),
    (dict(vision_cfg=dict(width=None)), "vision_cfg.width=None: give a whole number"),
    (dict(vision_cfg=dict(layers=[3, 4, 6, 3])), r"vision_cfg.layers=\[3, 4, 6, 3\]: give a whole"),
    (dict(vision_cfg=dict(layers=10**9)), "vision_cfg.layers=1000000000: .* 1 to 1024"),
    (dict(vision_cfg=dict(width=True)), "vision_cfg.width=True"),
    (dict(vision_cfg=dict(head_width=0)), "vision_cfg.head_width=0"),
    (dict(vision_cfg=dict(head_width=7)), "vision_cfg.head_width=7 does not divide"),
    (dict(vision_cfg=dict(patch_size=[])), r"vision_cfg.patch_size=\[\]: give 1 to 16384"),
    (dict(vision_cfg=dict(image_size=[32, 0])), r"image_size=\[32, 0\]: .*, or height and width"),
    (dict(vision_cfg=dict(image_size=[8, 8, 8])), r"image_size=\[8, 8, 8\]: .*or height and width"),
    (dict(vision_cfg=dict(image_size=-32)), "vision_cfg.image_size=-32"),
    (dict(vision_cfg=dict(mlp_ratio=float("nan"))), "vision_cfg.mlp_ratio=nan"),
    (dict(vision_cfg=dict(patch_dropout="x")), "vision_cfg.patch_dropout='x'"),
    (dict(vision_cfg=dict(attentional_pool={})), "vision_cfg.attentional_pool={}"),
    (dict(text_cfg=dict(heads=0)), "text_cfg.heads=0"),
    (dict(text_cfg=dict(vocab_size="many")), "text_cfg.vocab_size='many'"),
    (dict(text_cfg=dict(act_kwargs="x" * 10_000)), "text_cfg.act_kwargs='x{70,76}\\.\\.\\. is not"),
    (dict(multimodal_cfg=dict(layers=1.5)), "multimodal_cfg.layers=1.5"),
    (dict(quick_gelu="no"), "quick_gelu='no': give true or false"),
    (dict(embed_dim=[48]), r"embed_dim=\[48\]"),
    (dict(preprocess_cfg=[1]), r"preprocess_cfg=\[1\]: not a JSON object"),
    (dict(preprocess_cfg=dict(mean=0.5)), "preprocess_cfg.mean=0.5: give three numbers"),
    (dict(preprocess_cfg=dict(mean=[0.5, 0.5])), r"preprocess_cfg.mean=\[0.5, 0.5\]: give three"),
    (dict(preprocess_cfg=dict(std=[0.5, 0, 0.5])), "preprocess_cfg.std=.*, above 0"),
    (dict(preprocess_cfg=dict(std=[0.5, float("inf"), 0.5])), "preprocess_cfg.std="),
]


@pytest.mark.parametrize("changes, message", ODD)
def test_odd_configurations_are_named(tmp_path, changes, message):
    config = cases.SMALL
    for key, value in changes.items():
        if key in config:
            value = config[key] | value if isinstance(value, dict) else value
            config = config | {key: value}
    text = dict(model_cfg=config) | {k: v for k, v in changes.items() if k not in cases.SMALL}
    (tmp_path / convert.CONFIG_NAME).write_text(json.dumps(text))
    found = convert._model_config(str(tmp_path / "x.bin"), "", {})
    with pytest.raises(ValueError, match=f"{convert.CONFIG_NAME}: .*{message}"):
        convert._config(*found)


@pytest.mark.parametrize(
    "text", ["[1]", "null", "[" * 5000, "{", "\xff", '{"a": ' + "1" * (5 << 20)]
)
def test_a_configuration_that_is_no_json_object(tmp_path, text):
    (tmp_path / convert.CONFIG_NAME).write_text(text, "latin-1")
    with pytest.raises(ValueError, match=f"{convert.CONFIG_NAME}: "):
        convert._model_config(str(tmp_path / "x.bin"), "", {})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_no_numbers(tmp_path, value):
    tensors = small_weights()
    tensors["visual.proj"] = tensors["visual.proj"].copy()
    tensors["visual.proj"][3, :2] = value
    source = write_source(tmp_path / "in", tensors)
    with pytest.raises(ValueError, match=f"{convert.WEIGHTS_NAME}: visual.proj has 2 values"):
        convert.from_open_clip(str(source), str(tmp_path / "out"))
    assert not list((tmp_path / "out").iterdir())


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
    del config[sealed_json.KEY]  # a stranger's folder: its checksum, if any, is of what it says
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
    missing = run(f"--input={tmp_path / 'none.bin'}", f"--out={tmp_path / 'other'}")
    assert missing.returncode == 2
    assert (
        missing.stderr.strip() == f"error: --input={tmp_path / 'none.bin'}: no such file or folder"
    )
