"""A frozen image encoder in an ONNX file, run by onnxruntime on the host.

It stands in the model where `image_encoder.ImageEncoder` does and has no parameters. Programs call
out to the host for its tokens, so captions, search and evaluation need no other code. Training
reads the tokens from `data.features`, which computes them once.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from coca_jax.config import shapes
from coca_jax.config.shapes import Size
from coca_jax.models import layers
from coca_jax.runtime import extras


class Session(NamedTuple):
    """An open file: onnxruntime's session, its input, and how many images a call takes (0: any)."""

    runtime: Any
    input: str
    output: str
    batch: int

    def run(self, pixels: np.ndarray) -> np.ndarray:
        """Normalised pixels [B, S, T, 3] -> tokens float32 [B, N, W]; of an output [B, W] one
        token, of a map of features [B, W, R, C] its places row by row."""
        images = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32)
        size = self.batch or len(images)
        parts = []
        for start in range(0, len(images), size):
            part = images[start : start + size]
            short = size - len(part)  # only where the file has a fixed batch size
            full = np.pad(part, ((0, short), (0, 0), (0, 0), (0, 0)))
            (found,) = self.runtime.run([self.output], {self.input: full})
            parts.append(found[: len(part)])
        tokens = np.concatenate(parts).astype(np.float32, copy=False)
        if tokens.ndim == 2:
            return tokens[:, None]
        if tokens.ndim == 4:
            return tokens.reshape(*tokens.shape[:2], -1).transpose(0, 2, 1)
        return tokens


def sha256(path: str) -> str:
    """Of a file, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.lru_cache(maxsize=2)
def open_session(path: str, output: str = "", digest: str = "") -> Session:
    """Opens an ONNX file.

    output: the name of a tensor, one inside the graph too; '': the file's first output.
    digest: sha256 of the file, checked where it is given.
    Raises FileNotFoundError where there is no such file; ValueError where onnxruntime is missing,
    the file is another one, or it does not take images or give such a tensor.
    """
    extras.check("onnxruntime", "onnx", path)
    import onnxruntime

    if not os.path.isfile(path):
        known = f" (sha256 {digest[:16]})" if digest else ""
        raise FileNotFoundError(f"{path}: no such file; it is the model's image encoder{known}")
    if digest and sha256(path) != digest:
        raise ValueError(f"{path}: another file than the encoder of this model ({digest[:16]})")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    providers = [
        name for name in onnxruntime.get_available_providers() if not name.startswith("Tensorrt")
    ]
    try:
        session = onnxruntime.InferenceSession(path, options, providers=providers)
        if output and output not in [one.name for one in session.get_outputs()]:
            exposed = _with_output(path, output)
            session = onnxruntime.InferenceSession(exposed, options, providers=providers)
    except Exception as error:  # onnxruntime has a dozen types
        raise ValueError(f"{path}: onnxruntime cannot run it: {str(error)[:300]}") from None
    taken = session.get_inputs()
    if len(taken) != 1 or len(taken[0].shape) != 4 or taken[0].shape[1] != 3:
        inputs = ", ".join(f"{one.name} {one.shape}" for one in taken)
        raise ValueError(f"{path}: its inputs are {inputs}. Give a model of images [B, 3, H, W].")
    batch = taken[0].shape[0]
    name = output or session.get_outputs()[0].name
    return Session(session, taken[0].name, name, batch if isinstance(batch, int) else 0)


def _with_output(path: str, output: str) -> bytes:
    """The file with one of its inner tensors as an output."""
    extras.check("onnx", "onnx", path)
    import onnx

    model = onnx.load(path)
    made = {name for node in model.graph.node for name in node.output}
    if output not in made:
        raise ValueError(f"no tensor {output!r}")
    model.graph.output.append(onnx.helper.make_tensor_value_info(output, 1, None))
    data: bytes = model.SerializeToString()
    return data


class OnnxEncoder(nn.Module):
    """pixels float [B, S, T, 3], normalised -> tokens [B, N, D] in `dtype`.

    file, output, digest: see `open_session`. registers: tokens behind the class token that are left
    out. The other fields are those of ImageEncoder.
    """

    file: str
    output: str
    digest: str
    image_size: Size
    patch_size: Size
    width: int
    class_token: bool
    registers: int = 0
    options: layers.BlockOptions = layers.BlockOptions()

    def __call__(
        self, pixels: jax.Array, *, deterministic: bool = True, masked: jax.Array | None = None
    ) -> jax.Array:
        """masked: must be None. Raises ValueError for images of another size than the file's."""
        wanted = (*shapes.pair(self.image_size), 3)
        if masked is not None or pixels.shape[1:] != wanted:
            raise ValueError(
                f"{self.file}: pixels have shape {pixels.shape}, and this encoder takes {wanted}. "
                "Use square images of its size (data.resize='squash' or 'crop')."
            )
        classes = int(self.class_token)
        count = classes + shapes.patches(self.image_size, self.patch_size)

        def run(images: Any) -> np.ndarray:
            tokens = open_session(self.file, self.output, self.digest).run(np.asarray(images))
            kept = [tokens[:, :classes], tokens[:, classes + self.registers :]]
            return np.concatenate(kept, axis=1)

        shape = jax.ShapeDtypeStruct((len(pixels), count, self.width), jnp.float32)
        # The pixels are no function of parameters, so nothing asks for this call's gradient.
        tokens = jax.pure_callback(run, shape, jax.lax.stop_gradient(pixels))
        return tokens.astype(self.options.ops.stream_dtype(self.options.dtype))


def grid_of(count: int, image_size: int, patches: Sequence[int] = (14, 16, 32, 8)) -> tuple:
    """(patch size, whether there is a class token, registers) of `count` tokens of square images.

    Raises ValueError where they are no grid of patches.
    """
    if count == 1:
        return image_size, False, 0
    for classes in (1, 0):
        side = round((count - classes) ** 0.5)
        if side and side**2 == count - classes and image_size % side == 0:
            return image_size // side, bool(classes), 0
    for patch in patches:
        registers = count - 1 - (image_size // patch) ** 2
        if image_size % patch == 0 and 0 < registers <= 16:
            return patch, True, registers
    raise ValueError(
        f"{count} tokens of {image_size} x {image_size} pixels are not a grid of patches with or "
        "without a class token. Name another output of the file."
    )
