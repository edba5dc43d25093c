"""Programs of a model that need none of this package, made by `jax.export`; see export.py for what
each of them takes and gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from etils import epath

from coca_jax import export_format
from coca_jax.config import Model, read
from coca_jax.files import storage
from coca_jax.inference import export_folder
from coca_jax.inference.model import CoCaModel
from coca_jax.models import coca, decoding, roles
from coca_jax.models.pixels import normalise_pixels
from coca_jax.ops.packed import Layout


def make_programs(model: CoCaModel, platforms: Sequence[str]) -> dict[str, bytes]:
    """The five programs by name, serialised. Raises ValueError for an unknown platform."""
    export_format.check_platforms(platforms)
    functions = functions_of(model, platforms)
    batch = jax.export.symbolic_shape("b")[0]
    length, shape_of_one = model.max_len, export_folder.image_shape_of(model)

    def array(shape: tuple, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    flat = {k: array(v.shape, np.float32) for k, v in export_format.flatten(model.params).items()}
    programs: dict[str, bytes] = {}

    def save(name: str, *arguments: Any) -> Any:
        function = jax.jit(getattr(functions, name))
        exported = jax.export.export(function, platforms=platforms)(*arguments)
        programs[name] = bytes(exported.serialize())
        return jax.tree.unflatten(
            exported.out_tree, [array(a.shape, a.dtype) for a in exported.out_avals]
        )

    tokens = save("encode_image", flat, array((batch, *shape_of_one), np.uint8))[1]
    save("encode_text", flat, array((batch, length), np.int32), array((batch, length), bool))
    weights = save("decode_weights", flat)
    state = save("decode_start", weights, tokens)
    save("decode_step", weights, state, array((batch,), np.int32), array((), np.int32))
    return programs


def functions_of(
    model: CoCaModel, platforms: Sequence[str], layout: Layout | None = None
) -> Functions:
    """The five functions that the programs are made of; layout: of the packed weights, by default
    the platforms'."""
    sizes, vocabulary = model.config.model, model.vocabulary
    if platforms[0] == "cpu" and sizes.implementation == "auto":
        sizes = read(Model, sizes.to_dict() | {"implementation": "xla"}, "model")  # no C++ of ours
    return Functions(
        sizes,
        coca.build(
            sizes, sigmoid=roles.sigmoid_bias(model.params) is not None, platform=platforms[0]
        ),
        decoding.decoder(
            sizes,
            num_ids=vocabulary.size,
            eos_id=vocabulary.eos_id,
            hidden_id=vocabulary.hidden_id,
            platform=platforms[0],
        ),
        layout or ("transposed" if list(platforms) == ["cpu"] else "kernel"),
    )


class Functions(NamedTuple):
    """What the programs compute: of a module, and of the decoder that `spec` describes, in
    `layout`. A state is a dict of lists of tuples, which a reader without this package can pass."""

    sizes: Any  # config.model
    module: coca.CoCa
    spec: decoding.Decoder
    layout: Layout

    def encode_image(self, flat: dict, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        params = {"params": export_format.unflatten(flat)}
        pixels = normalise_pixels(image, self.sizes)
        out: Any = self.module.apply(params, pixels, method="encode_image")
        return out

    def encode_text(self, flat: dict, tokens: jax.Array, valid: jax.Array) -> jax.Array:
        params = {"params": export_format.unflatten(flat)}
        out: Any = self.module.apply(params, tokens, valid, method="encode_text")
        return out

    def decode_weights(self, flat: dict) -> dict:
        return decoding.pack(self.spec, export_format.unflatten(flat), self.layout)

    def decode_start(self, weights: dict, image_tokens: jax.Array) -> dict:
        length = self.spec.max_len
        image = decoding.image_caches(self.spec, weights, image_tokens)
        caches = decoding.empty_caches(self.spec, weights, image_tokens.shape[0], length)
        state: dict[str, Any] = dict(
            image=[tuple(c) for c in image], caches=[tuple(c) for c in caches]
        )
        if self.spec.hidden_id is not None:
            state["shown"] = jnp.ones((image_tokens.shape[0], length), bool)
        return state

    def decode_step(
        self, weights: dict, state: dict, token: jax.Array, step: jax.Array
    ) -> tuple[jax.Array, dict]:
        spec, length, rows = self.spec, self.spec.max_len, (token.shape[0], 1)
        shown = state.get("shown")
        if shown is not None and not spec.hides_next:
            shown = shown.at[:, step].set(token != spec.hidden_id)
        states, caches = decoding.run_tokens(
            spec,
            weights,
            token[:, None],
            jnp.broadcast_to(step, rows),
            jnp.broadcast_to(jnp.arange(length) <= step, rows + (length,)),
            step,
            [decoding.Cache(*c) for c in state["caches"]],
            [decoding.Cache(*c) for c in state["image"]],
            shown,
        )
        log_probs = decoding.log_probs_of(weights, states)[:, 0]
        if spec.num_ids < spec.vocab_size:  # no texts have such ids
            known = jnp.arange(spec.vocab_size) < spec.num_ids
            log_probs = jnp.where(known, log_probs, -jnp.inf)
        log_probs = jnp.where(step < length, log_probs, jnp.nan)  # the caches have no such place
        state = dict(state, caches=[tuple(c) for c in caches])
        if shown is not None:
            if spec.hides_next:  # past the end: dropped
                shown = shown.at[:, step + 1].set(token != spec.hidden_id)
            state["shown"] = shown
        return log_probs, state


def export(model: CoCaModel, out: str, platforms: Sequence[str] = ("cpu",)) -> dict:
    """Writes the folder `out`; returns its files and their sizes in bytes.

    Raises ValueError for an unknown platform, before anything is written.
    """
    programs = make_programs(model, platforms)
    with storage.local_folder(out) as folder:
        for name, data in programs.items():
            storage.write_bytes(_program(folder, name), data)
        names = [f"{export_format.PROGRAMS}/{_program(folder, name).name}" for name in programs]
        export_folder.write(model, folder, programs=names)
        return export_folder.sizes(folder)


def _program(out: str, name: str) -> epath.Path:
    return storage.place(out) / export_format.PROGRAMS / f"{name}.jax_export"


def check(model: CoCaModel, out: str) -> dict[str, float]:
    """Runs the written programs on the written weights beside the model: the largest absolute
    difference of each output. Raises ValueError when one is above 1e-4 (bfloat16: 0.1)."""
    flat = export_format.flatten(export_format.read_export(out)[0])
    flat = {name: jnp.asarray(value) for name, value in flat.items()}
    calls = {}
    for name in ("encode_image", "encode_text", "decode_weights", "decode_start", "decode_step"):
        calls[name] = jax.export.deserialize(bytearray(_program(out, name).read_bytes())).call
    rng = np.random.default_rng(0)
    count, length = 3, model.max_len
    shape = (count, *export_folder.image_shape_of(model))
    image = rng.integers(0, 256, shape, dtype=np.uint8)
    tokens = rng.integers(0, model.vocabulary.size, (count, length)).astype(np.int32)
    tokens[tokens == model.vocabulary.eos_id] = model.vocabulary.bos_id
    if model.vocabulary.hidden_id is not None:
        tokens[0, length // 2] = model.vocabulary.hidden_id
    pixels = np.asarray(normalise_pixels(jnp.asarray(image), model.config.model))
    wanted = model.forward(pixels, tokens)
    valid = np.ones(tokens.shape, bool)
    if model.vocabulary.hidden_id is not None:
        valid = tokens != model.vocabulary.hidden_id
    embedding, image_tokens = calls["encode_image"](flat, image)
    found = dict(
        encode_image=np.abs(embedding - wanted.image_embedding).max(),
        encode_text=np.abs(calls["encode_text"](flat, tokens, valid) - wanted.text_embedding).max(),
    )
    weights = calls["decode_weights"](flat)
    state = calls["decode_start"](weights, image_tokens)
    expected = jax.nn.log_softmax(wanted.logits)
    worst = 0.0
    for step in range(length):
        log_probs, state = calls["decode_step"](weights, state, tokens[:, step], np.int32(step))
        known = np.s_[:, : model.vocabulary.size]  # of the others there is none
        worst = max(worst, float(np.abs(log_probs[known] - expected[:, step][known]).max()))
    found["decode_step"] = worst
    limit = 1e-4 if model.config.model.dtype == "float32" else 0.1
    for name, difference in found.items():
        if not difference <= limit:
            raise ValueError(f"{out}: {name} differs from the model by {difference}; do not use it")
    return {name: float(value) for name, value in found.items()}
