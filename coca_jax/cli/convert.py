"""Converts open_clip's CoCa weights to an export folder, and an export or a run to open_clip or to
PyTorch code for Hugging Face transformers.

CLIP, MetaCLIP, SigLIP (open_clip's or transformers' files), PE-Core, OpenVision and CLIPA
(open_clip's) become models without a decoder, for embeddings, zero-shot and search. DINOv2 and
DINOv3 (transformers' or Meta's files) and encoders in ONNX files become image encoders, from which
captioners are trained.

Examples:
  coca-jax convert --input=open_clip_pytorch_model.bin --out=weights
  coca-jax convert --input=dinov2-small --out=encoder --layers=10
  coca-jax convert --input=runs/tuned --out=for_open_clip --to=open_clip
  coca-jax convert --input=runs/demo --out=for_torch --to=transformers
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags, logging

from coca_jax.cli import main as cli
from coca_jax.config import Model, StoredConfig, heads, read
from coca_jax.data import vocabulary as vocabularies
from coca_jax.data.sources import files
from coca_jax.data.vocabulary import clip_bpe
from coca_jax.interop import (
    export_format,
    hub,
    onnx_file,
    open_clip_config,
    safetensors,
    towers_config,
    vision_weights,
    weights_files,
)
from coca_jax.interop.open_clip_weights import Layout, count
from coca_jax.interop.towers_weights import TowersLayout
from coca_jax.runtime import bounded_json, json_files, out_folder, storage, text_tables

CLIP_IDS = 49_408
WEIGHTS_NAME, CONFIG_NAME = open_clip_config.WEIGHTS_FILES[0], open_clip_config.CONFIG_FILE


def from_open_clip(
    weights: str,
    out: str,
    model: str = "",
    bpe: str = "",
    *,
    layers: int = 0,
    image_size: int = 0,
    progress: bool = False,
) -> tuple[dict[str, Any], Layout]:
    """Converts an open_clip checkpoint to the export folder `out`.

    Args:
        weights: a .safetensors file, a file of torch.save, or a folder with one of them.
        model: name of a released model or path of a JSON; '' finds it (see the flags).
        bpe: path of the tokenizer's merges; '': those beside the weights, else CLIP's.
        layers, image_size: of an image encoder alone, see the flags.
        progress: show a bar while the weights are written.

    Returns:
        (the configuration written, the layout).

    Raises:
        FileNotFoundError: no weights, no such tokenizer as `bpe`, or merges are missing that the
            configuration lists.
        ValueError: a file that cannot be read, an arrangement that is not supported, or tensors
            that do not fit the model (each named).
    """
    _check_bpe(bpe)
    weights = weights_files.find(weights)
    tensors = weights_files.read(weights)
    if not model and vision_weights.is_vision(tensors):
        sizes = dict(layers=layers, image_size=image_size)
        return from_vision(weights, tensors, out, progress=progress, **sizes)
    for name, value in (("layers", layers), ("image_size", image_size)):
        if value:
            raise ValueError(
                f"--{name}={value}: {weights} is not an image encoder alone. Leave it out."
            )
    towers = towers_config.find(weights, model)
    if towers is not None:
        return from_towers(weights, tensors, towers, out, bpe, progress=progress)
    config = _config(*_model_config(weights, model, tensors, bpe))
    described = read(Model, config["model"], f"{weights}: model")
    layout = Layout(described, logit_bias="logit_bias" in tensors)
    with naming(weights):
        layout.check(tensors)
    merges = clip_bpe.find_merges(os.path.dirname(weights), bpe)
    vocabulary = clip_bpe.ClipBpe(merges)
    described.check_vocabulary(vocabulary.size, "give the model's own as --bpe")
    write(out, weights, lambda: layout.read(tensors), config, vocabulary, ".bpe.gz", progress)
    return config, layout


def _check_bpe(given: str) -> None:
    """Raises FileNotFoundError for a tokenizer that is not there, before any weights are read."""
    if given and not files.exists(given):
        raise FileNotFoundError(
            f"--bpe={given}: no such file; give {clip_bpe.FILE_NAME} or tokenizer.json, or leave "
            "it out"
        )


@contextlib.contextmanager
def naming(weights: str) -> Iterator[None]:
    """Messages about what the weights hold begin with their path."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{weights}: {error}") from None


def write(
    out: str,
    weights: str,
    params: Callable[[], dict[str, Any]],
    config: dict[str, Any],
    vocabulary: vocabularies.Vocabulary,
    suffix: str,
    progress: bool,
) -> None:
    """Writes an export. Raises ValueError naming the weights, as for numbers that are none, and as
    `export_format.refuse_other`."""
    with tempfile.TemporaryDirectory() as scratch:
        path = os.path.join(scratch, f"vocabulary{suffix}")
        vocabulary.save(path)
        with naming(weights):
            tree = params()
            export_format.refuse_other(out, tree)
            export_format.write_export(out, tree, config, path, progress=progress)


def from_towers(
    weights: str,
    tensors: dict[str, np.ndarray],
    towers: dict[str, Any],
    out: str,
    bpe: str,
    *,
    progress: bool = False,
) -> tuple[dict[str, Any], Layout]:
    """Converts image and text towers to the export folder `out`; towers: of towers_config.find;
    progress: show a bar. Returns and raises as `from_open_clip`."""
    # Old files hold the numbers of the places, which are no parameters.
    tensors = {k: v for k, v in tensors.items() if not k.endswith(".position_ids")}
    numbers = {name: list(towers[name]) for name in ("mean", "std")}
    config: dict[str, Any] = dict(model=towers["model"])
    config |= dict(preprocess=dict(resize=towers["resize"], **numbers), tokenizer=dict(kind="own"))
    described = read(Model, config["model"], f"{weights}: model")
    with naming(weights):
        layout = TowersLayout(described, tensors, "logit_bias" in tensors)
        layout.check(tensors)
    vocabulary = towers_vocabulary(os.path.dirname(weights), described, bpe)
    described.check_vocabulary(vocabulary.size, "give the model's own as --bpe")
    if towers.get("eos_id", vocabulary.eos_id) != vocabulary.eos_id:
        raise ValueError(
            f"{weights}: texts are pooled at the id {towers['eos_id']}, and this tokenizer "
            f"ends them with {vocabulary.eos_id}; give the model's own as --bpe"
        )
    suffix = {b"\x1f": ".bpe.gz", b"{": ".json"}.get(vocabulary.data[:1], ".model")
    write(out, weights, lambda: layout.read(tensors), config, vocabulary, suffix, progress)
    return config, layout


def from_vision(
    weights: str,
    tensors: dict[str, np.ndarray],
    out: str,
    *,
    layers: int = 0,
    image_size: int = 0,
    progress: bool = False,
) -> tuple[dict[str, Any], Layout]:
    """Converts an image encoder alone (DINOv2, DINOv3) to the export folder `out`.

    layers: its first so many blocks, 0: all; image_size: of the model, 0: what the files say.
    Returns and raises as `from_open_clip`.
    """
    with naming(weights):
        tensors = vision_weights.canonical(tensors)
        found = vision_weights.find(weights, tensors, image_size)
        sizes = found["model"]
        if layers:
            tensors, sizes = vision_weights.first_blocks(tensors, sizes, layers)
        layout = vision_weights.VisionLayout(read(Model, sizes, "model"))
        layout.check(tensors)
    numbers = {name: list(found[name]) for name in ("mean", "std")}
    config: dict[str, Any] = dict(model=sizes, preprocess=dict(resize=found["resize"], **numbers))
    words = vocabularies.NoTexts()
    write(out, weights, lambda: layout.read(tensors), config, words, ".none", progress)
    return config, layout


def towers_vocabulary(folder: str, model: Model, given: str) -> vocabularies.Vocabulary:
    """The tokenizer `given`, or beside the weights, or CLIP's own for a model of CLIP's 49,408 ids.

    Raises ValueError where there is none."""
    names = (given,) if given else ("tokenizer.json", "spiece.model", "tokenizer.model")
    of_clip = heads.tower_kind(model.family).causal and model.text.vocab_size == CLIP_IDS
    if of_clip and (not given or not given.endswith(".model")):
        return clip_bpe.ClipBpe(clip_bpe.find_merges(folder, given))
    for name in names:
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return vocabularies.load(path)
    raise ValueError(
        f"{folder}: no tokenizer beside the weights ({', '.join(names)}); give it as --bpe=FILE"
    )


def _config(model_cfg: Any, preprocess_cfg: Any, place: str) -> dict[str, Any]:
    """The configuration of the export; errors name `place`, where open_clip's comes from."""
    try:
        preprocess = open_clip_config.read(preprocess_cfg)
        model = open_clip_config.to_model(model_cfg, preprocess_cfg)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    return dict(model=model, preprocess=preprocess, tokenizer=dict(kind="clip_bpe"))


_OTHER_TARGETS = (
    "Use --to=transformers (PyTorch), or `coca-jax export` for StableHLO, ONNX (--format=onnx) or "
    "coca_jax on the hub (--format=hub)"
)


def read_ours(source: str) -> tuple[dict, StoredConfig]:
    """Parameters and configuration of an export folder or a run.

    Raises FileNotFoundError where `source` is neither, ValueError for another program's weights.
    """
    if export_format.is_export(source):
        return export_format.read_export(source)
    weights_files.refuse(source)
    from coca_jax.checkpoints import manager  # orbax: only where a run is read

    return manager.load_params(source)


def to_transformers(source: str, out: str, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Writes an export folder or a run as a folder for transformers; returns its tensors.

    Raises FileNotFoundError and ValueError as `to_open_clip`, and as `transformers_folder.check`.
    """
    from coca_jax.interop import transformers_folder  # jax and flax

    params, config = read_ours(source)
    vocabulary = vocabularies.load(_vocabulary_of(source))
    name = os.path.basename(os.path.abspath(out))
    with naming(source):
        return transformers_folder.write(params, config, vocabulary, out, name, dtype)


def to_open_clip(source: str, out: str, *, progress: bool = False) -> tuple[dict[str, Any], Layout]:
    """Writes an export folder or a run as open_clip's safetensors and configuration; progress: show
    a bar.

    Returns:
        (open_clip's model configuration, the layout).

    Raises:
        FileNotFoundError: `source` is neither, or lacks its vocabulary.
        ValueError: `source` is another program's weights, or the model has an option that
            open_clip's CoCa lacks (named), or a vocabulary of another kind than CLIP's.
    """
    from coca_jax.models import param_groups  # jax and flax: not where weights are only read

    params, config = read_ours(source)
    try:
        preprocess = open_clip_config.write(config.model, config.data.resize)
        model_cfg = open_clip_config.from_model(config.model)
        merges = _own_merges(source)
    except ValueError as error:
        raise ValueError(
            f"{source}: open_clip cannot express this model: {error}. {_OTHER_TARGETS}"
        ) from None
    if param_groups.has_task_head(params):
        logging.warning("%s: its task head is left out; open_clip's CoCa has none", source)
        params = param_groups.without_task_head(params)
    if frames := config.data.num_frames:
        logging.warning("%s: a model of clips of %d frames; open_clip reads images", source, frames)
    params = param_groups.without_training_aids(params)
    bias = param_groups.sigmoid_bias(params)
    layout = Layout(config.model, logit_bias=bias is not None)
    if bias is not None:
        model_cfg["init_logit_bias"] = float(np.asarray(bias))
    tensors = layout.write(export_format.flatten(params))
    written = dict(model_cfg=model_cfg, preprocess_cfg=preprocess)
    export_format.refuse_other(out, tensors, WEIGHTS_NAME)
    with out_folder.gone_if_refused(out), storage.local_folder(out) as folder:
        safetensors.write(os.path.join(folder, WEIGHTS_NAME), tensors, progress=progress)
        file = os.path.join(folder, clip_bpe.FILE_NAME)
        storage.remove(file)  # of an earlier model, whose merges these are not
        if merges:
            storage.write_bytes(file, merges)
        names = [WEIGHTS_NAME, *[clip_bpe.FILE_NAME] * bool(merges)]
        written[json_files.FILES_KEY] = json_files.describe_files(folder, names)
        sealed = json.dumps(json_files.seal(written), indent=2)
        storage.write_text(os.path.join(folder, CONFIG_NAME), sealed)
        if merges:
            logging.warning(
                "%s has other merges than CLIP's: open_clip reads its texts by "
                "open_clip.get_tokenizer('local-dir:%s', bpe_path='%s')",
                *(source, out, os.path.join(out, clip_bpe.FILE_NAME)),
            )
    return model_cfg, layout


def _own_merges(source: str) -> bytes:
    """The file of a model's merges, where these are others than CLIP's; b'' where they are not.
    Raises ValueError for a model whose texts open_clip would read as others: its CoCas take CLIP's
    byte pairs."""
    vocabulary = vocabularies.load(_vocabulary_of(source))
    if not isinstance(vocabulary, clip_bpe.ClipBpe):
        raise ValueError("its vocabulary is not CLIP's byte pairs, which open_clip's CoCas read")
    merges, package = clip_bpe.parse_merges, os.path.dirname(clip_bpe.__file__)
    found = merges(vocabulary.data)
    if vocabulary.size == CLIP_IDS and found == merges(clip_bpe.find_merges(package)):
        return b""
    return clip_bpe.packed(found)


def _vocabulary_of(source: str) -> str:
    """The path of a model's vocabulary. Raises FileNotFoundError where there is none."""
    place = export_format.vocabulary_beside(source)
    if not place:
        raise FileNotFoundError(f"{source}: no vocabulary beside the weights. Copy it there.")
    return place


def _config_beside(weights: str) -> str:
    """The path of open_clip's configuration in the folder of a file of weights; '' without one."""
    folder = os.path.dirname(weights)
    path = os.path.join(folder, CONFIG_NAME)
    if os.path.isfile(path):
        return path
    path = os.path.join(folder, open_clip_config.BARE_CONFIG_FILE)
    if os.path.isfile(path):  # many libraries have one of that name
        found = bounded_json.parse(files.read_bounded(path))
        return path if isinstance(found, dict) and "multimodal_cfg" in found else ""
    return ""


def _model_config(
    weights: str, model: str, tensors: dict[str, np.ndarray], bpe: str = ""
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """open_clip's `model_cfg` and `preprocess_cfg`, not checked, and where they come from. Files
    that the configuration describes are compared with it, merges too where no `bpe` is given."""
    if model in open_clip_config.RELEASED:
        return open_clip_config.RELEASED[model], {}, model
    path = model or _config_beside(weights)
    if path:
        if not os.path.isfile(path):
            raise FileNotFoundError(
                f"--model={model}: no such file, and not one of "
                f"{', '.join(open_clip_config.RELEASED)}"
            )
        try:
            config = json_files.unseal(bounded_json.parse(files.read_bounded(path)), "the file")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        for name in (os.path.basename(weights), *[clip_bpe.FILE_NAME] * (not bpe)):
            json_files.check_files(os.path.dirname(weights), config, name)
        preprocess = config.get("preprocess_cfg")
        return config.get("model_cfg", config), {} if preprocess is None else preprocess, path
    positions = tensors.get("visual.positional_embedding")
    for name, config in open_clip_config.RELEASED.items():
        shapes = Layout(read(Model, open_clip_config.to_model(config), "model")).tensors()
        wanted = shapes["visual.positional_embedding"]
        if positions is not None and tuple(positions.shape) == wanted:
            return config, {}, name
    raise ValueError(
        f"{weights}: not a released model; put its open_clip_config.json beside it, or convert it "
        f"first: coca-jax convert --input={weights} --model=CONFIG.json --out=weights"
    )


def define_flags() -> None:
    """Defines the command's flags; importing this module defines none."""
    flags.DEFINE_string(
        "input",
        None,
        "Weights (.bin, .pt, .pth, .safetensors, .onnx[:OUTPUT]), their folder, or a name: hf-hub:org/name, "
        "coca_ViT-L-14:TAG.",
    )
    flags.DEFINE_string("out", None, "Folder to write.")
    flags.DEFINE_enum(
        "to",
        "coca_jax",
        ["coca_jax", "open_clip", "transformers"],
        "The format to write. transformers: a folder with PyTorch code for AutoModel.",
    )
    flags.DEFINE_enum(
        "dtype",
        "float32",
        ["float32", "bfloat16"],
        "Dtype of the weights written by --to=transformers; bfloat16 halves the file and rounds.",
    )
    flags.DEFINE_string(
        "model",
        "",
        f"Name ({', '.join(open_clip_config.RELEASED)}) or JSON file of the open_clip model; "
        f"default: {CONFIG_NAME} beside the weights, else the released model that fits.",
    )
    flags.DEFINE_string(
        "bpe",
        "",
        f"{clip_bpe.FILE_NAME} or tokenizer.json; default: beside the weights, else CLIP's own.",
    )
    flags.DEFINE_integer(
        "layers",
        0,
        "Number of blocks to convert of an image encoder alone, whose output is then that of the "
        "last of them, without a norm; 0: all.",
        0,
    )
    flags.DEFINE_integer(
        "image_size",
        0,
        "Image size of an image encoder alone, to which its positions are interpolated; 0: that of "
        "preprocessor_config.json, or 224.",
        0,
    )


def _check_out(source: str, out: str) -> None:
    """Raises ValueError for a folder that is the input's, or as `out_folder.check_model`."""
    place = os.path.realpath(storage.whole_path(out))
    given = os.path.realpath(storage.whole_path(source))
    if place in (given, os.path.dirname(given)) and os.path.exists(given):
        raise ValueError(f"--out={out} is the folder of --input={source}; give another one")
    out_folder.check_model(out)


def summary(result: dict[str, Any]) -> list[str]:
    """What was written, and how to use it."""
    lines = text_tables.fields(result)
    out = shlex.quote(result["out"])
    if result.get("family") == vision_weights.FAMILY:
        lines += text_tables.next_commands(
            f"coca-jax train --config=locked_captioner:{out} --data=DATA --workdir=DIR",
            f"coca-jax evaluate --checkpoint={out} --data=DATA --tasks=knn,linear_probe --out=SCORES",
        )
    elif result["format"] == "coca_jax":
        lines += text_tables.next_commands(
            f"coca-jax caption --checkpoint={out} IMAGE_OR_FOLDER",
            f"coca-jax evaluate --checkpoint={out} --data=DATA --out=SCORES",
        )
    return lines


def main(argv: Sequence[str]) -> dict[str, Any]:
    """The command; see the module's docstring."""
    del argv
    source, out, target = flags.FLAGS.input, flags.FLAGS.out, flags.FLAGS.to
    if not source or not out:
        raise ValueError("--input=FILE_OR_FOLDER and --out=FOLDER are both needed")
    for name in ("model", "bpe", "layers", "image_size"):
        if target != "coca_jax" and (given := flags.FLAGS[name].value):
            raise ValueError(
                f"--{name}={given}: --to={target} writes what --input says; leave out --{name}"
            )
    if flags.FLAGS.dtype != "float32" and target != "transformers":
        raise ValueError(
            f"--dtype={flags.FLAGS.dtype}: only --to=transformers has it. Leave it out"
        )
    _check_out(source, out)
    if target == "coca_jax" and onnx_file.is_onnx(source):
        path, output = onnx_file.split(source)
        if output or not vision_weights.is_vision(weights_files.read(path)):
            from coca_jax.interop import onnx_encoder  # jax and flax

            onnx_encoder.write(path, out, output, flags.FLAGS.image_size)
            cli.say(f"wrote {out}")
            return dict(out=out, format=target, family=vision_weights.FAMILY)
    source = hub.local(source)
    if target == "coca_jax":
        source = weights_files.find(source)
    layout: Layout | None = None
    bar, message = sys.stderr.isatty(), f"converting {source}"
    if bar:
        cli.say(message)
    with contextlib.nullcontext() if bar else cli.waiting(message):
        if target == "transformers":
            found = to_transformers(source, out, flags.FLAGS.dtype)
            tensors, parameters = len(found), sum(array.size for array in found.values())
        else:
            if target == "open_clip":
                _, layout = to_open_clip(source, out, progress=bar)
            else:
                given = flags.FLAGS.model, flags.FLAGS.bpe
                sizes = dict(layers=flags.FLAGS.layers, image_size=flags.FLAGS.image_size)
                _, layout = from_open_clip(source, out, *given, **sizes, progress=bar)
            tensors, parameters = len(layout.tensors()), count(layout.parameters())
    cli.say(f"wrote {out}")
    encoder = isinstance(layout, vision_weights.VisionLayout)
    family = dict(family=vision_weights.FAMILY) if encoder else {}
    return dict(out=out, format=target, tensors=tensors, parameters=parameters, **family)


if __name__ == "__main__":
    cli.command("convert")
