"""A model as ONNX files, for onnxruntime and what else reads them; see export.py for the files.

jax2onnx converts what JAX has traced. Traced with concrete weights and without JIT, the loop over
layers is written out, so that a layer's weights are constants of the graph, as quantisation needs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from coca_jax.inference import export_folder, export_programs
from coca_jax.inference.model import CoCaModel
from coca_jax.interop import export_format
from coca_jax.models.image_encoder import normalise_pixels
from coca_jax.runtime import extras, storage

NAMES = ("encode_image", "encode_text", "decode_start", "decode_step")
LARGEST_FILE = 1 << 30  # bytes; a protocol buffer ends at twice that, so weights go beside it


def packages() -> tuple[types.ModuleType, types.ModuleType, types.ModuleType]:
    """(jax2onnx, onnx, onnxruntime). Raises ValueError that says how to install what is missing."""
    for name in ("jax2onnx", "onnx_ir"):  # each import and shape is a warning of theirs
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        import jax2onnx
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ValueError(f"--format=onnx needs {error.name}: {extras.remedy('onnx')}") from None
    onnxruntime.set_default_logger_severity(4)
    return jax2onnx, onnx, onnxruntime


def export(model: CoCaModel, out: str, *, batch: int = 1, int8: bool = False) -> dict[str, Any]:
    """Writes the folder `out`: an export's own files and onnx/*.onnx for batches of `batch` rows.

    int8: also onnx/*.int8.onnx, whose products have weights of 8 bits (onnxruntime's dynamic
    quantisation). Returns {files, differences: of each program to the model; with int8 also
    int8: {image_cosine, text_cosine: the least of a row; log_prob: the largest difference}}.

    The programs compute in float32, whatever the model does: onnxruntime has no products of
    bfloat16 on a CPU.

    Raises:
        ValueError: a package is missing, or a program differs by more than 1e-4 from the model in
            float32 on a CPU.
    """
    packages()
    stored, model = model, in_float32(model)
    arrays = Arrays(model, batch)
    functions = export_programs.functions_of(model, ["cpu"], layout="kernel")
    with (
        storage.local_folder(out) as folder,
        tempfile.TemporaryDirectory(prefix=".onnx-", dir=folder) as scratch,
    ):
        os.mkdir(os.path.join(scratch, export_format.ONNX))
        for name, (function, *arguments) in programs(functions, model, arrays).items():
            write(function, arguments, name, file(scratch, name))
        found = Found(model, arrays, scratch, "")
        result: dict[str, Any] = dict(differences=found.differences())
        for name, difference in result["differences"].items():
            if not difference <= 1e-4:
                raise ValueError(f"onnx/{name}.onnx differs from the model by {difference}")
        if int8:
            for name in NAMES:
                quantise(file(scratch, name), file(scratch, name, ".int8"))
            result["int8"] = Found(model, arrays, scratch, ".int8").losses()
        names = _take_place(scratch, folder, out)
        export_folder.write(stored, folder, programs=names)
        result["files"] = export_folder.sizes(folder)
    return result


def in_float32(model: CoCaModel) -> CoCaModel:
    """The model as onnxruntime computes it: in float32 and, where this process has one beside its
    accelerator, on a CPU."""
    platforms = {device.platform for x in jax.tree.leaves(model.params) for device in x.devices()}
    if model.config.model.dtype == "float32" and platforms == {"cpu"}:
        return model
    devices = None
    with contextlib.suppress(RuntimeError):  # JAX_PLATFORMS leaves no CPU
        devices = jax.devices("cpu")[:1]
    return type(model)(
        model.config.change({"model.dtype": "float32"}),
        jax.tree.map(lambda x: np.asarray(x, np.float32), model.params),
        model.vocabulary,
        batch_size=model.batch_size,
        num_frames=model.num_frames,
        devices=devices,
        class_names=model.class_names,
    )


def _take_place(scratch: str, folder: str, out: str) -> list[str]:
    """Moves what is written and checked to `folder`, which belongs at `out`, where no program of an
    earlier export stays. Returns the files' names in it."""
    for name in NAMES:
        for path in (file(out, name), file(out, name, ".int8"), _beside(out, name)):
            storage.remove(path)
    os.makedirs(os.path.join(folder, export_format.ONNX), exist_ok=True)
    names = sorted(os.listdir(os.path.join(scratch, export_format.ONNX)))
    names = [f"{export_format.ONNX}/{name}" for name in names]
    for name in names:
        os.replace(os.path.join(scratch, name), os.path.join(folder, name))
    return names


def file(folder: str, name: str, kind: str = "") -> str:
    """The path of a program's file; kind: '' or '.int8'."""
    return os.path.join(folder, export_format.ONNX, f"{name}{kind}.onnx")


def _beside(folder: str, name: str) -> str:
    """The path of a large program's weights."""
    return os.path.join(folder, export_format.ONNX, f"{name}.weights")


class Arrays:
    """Inputs of the sizes of `model`, `batch` rows: image uint8 [N, S, T, 3], of clips with the
    axis of frames behind N; tokens int32 [N, L] with valid bool [N, L]."""

    def __init__(self, model: CoCaModel, batch: int) -> None:
        rng, vocabulary = np.random.default_rng(0), model.vocabulary
        shape = (batch, model.max_len)
        shape_of_image = (batch, *export_folder.image_shape_of(model))
        self.image = rng.integers(0, 256, shape_of_image, dtype=np.uint8)
        self.tokens = rng.integers(0, vocabulary.size, shape).astype(np.int32)
        ends = (vocabulary.eos_id, vocabulary.hidden_id)
        self.tokens[np.isin(self.tokens, [i for i in ends if i is not None])] = vocabulary.bos_id
        self.valid = np.ones(shape, bool)


def programs(functions: Any, model: CoCaModel, arrays: Arrays) -> dict[str, tuple]:
    """{name: (function with the weights inside, *arguments)}, in the order of NAMES.

    The part of a state that no step changes, what the decoder reads of the image, is apart.
    """
    flat = export_format.flatten(model.params)
    weights = functions.decode_weights(flat)
    _, image_tokens = functions.encode_image(flat, arrays.image)

    def start(image_tokens: jax.Array) -> tuple[Any, dict]:
        state = functions.decode_start(weights, image_tokens)
        return state.pop("image"), state

    def step(image: Any, state: dict, token: jax.Array, place: jax.Array) -> tuple:
        found, after = functions.decode_step(weights, dict(state, image=image), token, place)
        return found, {name: value for name, value in after.items() if name != "image"}

    return dict(
        encode_image=(lambda image: functions.encode_image(flat, image), arrays.image),
        encode_text=(
            lambda tokens, valid: functions.encode_text(flat, tokens, valid),
            arrays.tokens,
            arrays.valid,
        ),
        decode_start=(start, image_tokens),
        decode_step=(step, *start(image_tokens), arrays.tokens[:, 0], np.int32(0)),
    )


def write(function: Callable, arguments: list, name: str, path: str) -> None:
    """Traces, converts and writes one program. A tree of arguments or results becomes a row of
    inputs or outputs, `in_0`, `in_1`, ... and `out_0`, ..., in the order of its leaves."""
    jax2onnx, onnx, _ = packages()
    leaves, tree = jax.tree.flatten(arguments)
    shapes = [jax.ShapeDtypeStruct(np.shape(x), np.asarray(x).dtype) for x in leaves]

    def flat(*given: Any) -> list:
        return jax.tree.leaves(function(*jax.tree.unflatten(tree, given)))

    with jax.disable_jit():
        traced = jax.make_jaxpr(flat)(*shapes)
    count = len(traced.out_avals)
    graph = jax2onnx.to_onnx(
        jax.extend.core.jaxpr_as_fun(traced),
        inputs=shapes,
        model_name=name,
        input_names=[f"in_{i}" for i in range(len(leaves))],
        output_names=[f"out_{i}" for i in range(count)],
    )
    large = graph.ByteSize() > LARGEST_FILE
    onnx.save(graph, path, save_as_external_data=large, location=f"{name}.weights")


def quantise(source: str, target: str) -> None:
    """Weights of products in 8 bits, a scale a column; activations are scaled as they come.

    JAX traces what is done to constants too; onnxruntime's own pass does it first, so that the
    operands of products are constants. The names of inputs stay.
    """
    from onnxruntime import quantization
    from onnxruntime.quantization import shape_inference

    with tempfile.TemporaryDirectory() as scratch:
        folded = os.path.join(scratch, "folded.onnx")
        shape_inference.quant_pre_process(source, folded, skip_symbolic_shape=True)
        quantization.quantize_dynamic(folded, target, per_channel=True)


class Found:
    """What the files of one kind give for `arrays`, beside the model's own."""

    def __init__(self, model: CoCaModel, arrays: Arrays, folder: str, kind: str) -> None:
        self.image, image_tokens = run(file(folder, "encode_image", kind), arrays.image)
        (self.text,) = run(file(folder, "encode_text", kind), arrays.tokens, arrays.valid)
        decoder = Decoder(folder, image_tokens, kind)
        size = model.vocabulary.size  # of ids beyond, the programs give -inf
        self.log_probs = np.stack([decoder.step(token)[:, :size] for token in arrays.tokens.T], 1)
        pixels = np.asarray(normalise_pixels(jnp.asarray(arrays.image), model.config.model))
        wanted = model.forward(pixels, arrays.tokens)
        self.wanted = wanted.image_embedding, wanted.text_embedding
        self.wanted_log_probs = np.asarray(jax.nn.log_softmax(wanted.logits))[..., :size]

    def differences(self) -> dict[str, float]:
        """The largest absolute difference of each program that gives a result."""
        image, text = self.wanted
        return dict(
            encode_image=float(np.abs(self.image - image).max()),
            encode_text=float(np.abs(self.text - text).max()),
            decode_step=float(np.abs(self.log_probs - self.wanted_log_probs).max()),
        )

    def losses(self) -> dict[str, float]:
        """What fewer bits cost: the least cosine of a row's embedding to the model's, and the
        largest difference of a log probability."""
        image, text = self.wanted
        return dict(
            image_cosine=float((self.image * image).sum(1).min()),
            text_cosine=float((self.text * text).sum(1).min()),
            log_prob=float(np.abs(self.log_probs - self.wanted_log_probs).max()),
        )


class Decoder:
    """Captions of image tokens [N, Q, D] by the written programs, token by token."""

    def __init__(self, folder: str, image_tokens: np.ndarray, kind: str = "") -> None:
        state = run(file(folder, "decode_start", kind), image_tokens)
        self._session = session(file(folder, "decode_step", kind))
        self._place = 0
        # All inputs but the token and its place are the state; outputs name what changes of it.
        changing = len(self._session.get_outputs()) - 1
        self._image, self._state = state[:-changing], state[-changing:]

    def step(self, token: np.ndarray) -> np.ndarray:
        """token int32 [N] -> log probabilities of the next one, float32 [N, V]."""
        inputs = (*self._image, *self._state, token, np.int32(self._place))
        found, *self._state = answer(self._session, *inputs)
        self._place += 1
        return found


def session(path: str) -> Any:
    """The program of a file, loaded by onnxruntime for the CPU."""
    return packages()[2].InferenceSession(path, providers=["CPUExecutionProvider"])


def answer(loaded: Any, *inputs: Any) -> list[np.ndarray]:
    """Its outputs in order."""
    return loaded.run(None, {f"in_{i}": np.asarray(x) for i, x in enumerate(inputs)})


def run(path: str, *inputs: np.ndarray) -> list[np.ndarray]:
    """The outputs of a file's program."""
    return answer(session(path), *inputs)
