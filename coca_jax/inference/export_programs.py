"""Programs of a model that need none of this package, made by `jax.export`; see export.py for what
each of them takes and gives.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from etils import epath

from coca_jax.config import Model, read, shapes, typed
from coca_jax.data.evaluation_data import Records
from coca_jax.inference import export_folder
from coca_jax.inference import tokenization as text_arrays
from coca_jax.inference.model import CoCaModel
from coca_jax.interop import export_format
from coca_jax.models import coca, param_groups, text_decoder
from coca_jax.models.image_encoder import normalise_pixels
from coca_jax.ops.decode_layouts import Layout
from coca_jax.runtime import storage


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
            sizes,
            sigmoid=param_groups.sigmoid_bias(model.params) is not None,
            platform=platforms[0],
        ),
        text_decoder.decoder(
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
    spec: text_decoder.Decoder
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
        return text_decoder.pack(self.spec, export_format.unflatten(flat), self.layout)

    def decode_start(self, weights: dict, image_tokens: jax.Array) -> dict:
        length = self.spec.max_len
        image = text_decoder.image_caches(self.spec, weights, image_tokens)
        caches = text_decoder.empty_caches(self.spec, weights, image_tokens.shape[0], length)
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
        states, caches = text_decoder.run_tokens(
            spec,
            weights,
            token[:, None],
            jnp.broadcast_to(step, rows),
            jnp.broadcast_to(jnp.arange(length) <= step, rows + (length,)),
            step,
            [text_decoder.Cache(*c) for c in state["caches"]],
            [text_decoder.Cache(*c) for c in state["image"]],
            shown,
        )
        log_probs = text_decoder.log_probs_of(weights, states)[:, 0]
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


class Exported(NamedTuple):
    """What `export` wrote: bytes of each file, and what `check` found ({} where no device here runs
    the programs)."""

    files: dict[str, int]
    differences: dict[str, float]


def export(model: CoCaModel, out: str, platforms: Sequence[str] = ("cpu",)) -> Exported:
    """Writes the folder `out`, after running the written programs on the written weights.

    Raises ValueError for an unknown platform, before anything is written, and as `check`: then
    `out` stays as it was.
    """
    programs = make_programs(model, platforms)
    with storage.atomic_folder(out, last=export_format.CONFIG) as folder:
        for name, data in programs.items():
            storage.write_bytes(_program(folder, name), data)
        names = [f"{export_format.PROGRAMS}/{_program(folder, name).name}" for name in programs]
        export_folder.write(model, folder, programs=names)
        # A GPU's platform is 'cuda' or 'rocm'. Programs for a CPU run on any machine.
        here = jax.export.default_export_platform()
        run_on = next((name for name in (here, "cpu") if name in platforms), None)
        differences = check(model, folder, run_on) if run_on else {}
        return Exported(export_folder.sizes(folder), differences)


def _program(out: str, name: str) -> epath.Path:
    return storage.place(out) / export_format.PROGRAMS / f"{name}.jax_export"


class Examples(NamedTuple):
    """Inputs of `check`. image: uint8 [N, S, S, 3] or clips [N, T, S, S, 3]; tokens: int32 [N, L];
    length: int [N], tokens of each text with begin and end."""

    image: np.ndarray
    tokens: np.ndarray
    length: np.ndarray


def examples(model: CoCaModel, count: int = 3) -> Examples:
    """Images and texts of the data that the model was trained on, where they are on this machine;
    otherwise random pixels and tokens."""
    words, length = model.vocabulary, model.max_len
    for source in typed(model.config).data.sources:
        try:
            records = list(itertools.islice(Records(source.to_dict(), limit=count), count))
            images = np.stack([model.fit_image(record["image"]) for record in records])
        except (ValueError, OSError):  # moved, removed, or in a bucket that is out of reach
            continue
        found = [record["text"] or record.get("labels") for record in records]
        texts = [text if isinstance(text, str) else next(iter(text or ()), "") for text in found]
        tokens, valid = words.encode_batch(texts, length)
        return Examples(images, tokens, shapes.lengths(valid))
    rng = np.random.default_rng(0)
    shape = (count, *export_folder.image_shape_of(model))
    tokens = rng.integers(0, words.size, (count, length)).astype(np.int32)
    tokens[tokens == words.eos_id] = words.bos_id
    if words.hidden_id is not None:
        tokens[0, length // 2] = words.hidden_id
    lengths = np.full(count, length)
    return Examples(rng.integers(0, 256, shape, dtype=np.uint8), tokens, lengths)


_ROUNDING = 4.0  # programs may be this many times as inexact as the model in its own dtype
_FLOAT32 = 1e-4  # of the spread of an output; float32 differs by about 1e-6


def check(model: CoCaModel, out: str, platform: str = "cpu") -> dict[str, float]:
    """Runs the programs in `out` on the weights there, and compares them with the model.

    The reference is the model in float32, on real inputs where there are any (`examples`). In
    bfloat16 the model itself differs from that by its rounding errors, which grow with depth and
    with the size of log probabilities, so the programs are allowed a multiple of those.

    Returns the root mean square difference of each output from the reference.
    Raises ValueError when one is too large.
    """
    device = jax.devices(platform)[0]
    exact = _Outputs.of_model(model, "float32", device)
    with jax.default_device(device):
        found = _Outputs.of_programs(model, out, exact.inputs)
    dtype = model.config.model.dtype
    own = exact if dtype == "float32" else _Outputs.of_model(model, dtype, device, exact.inputs)
    differences = {}
    for name, wanted in exact.arrays.items():
        spread = float(np.std(wanted, axis=-1).mean())
        limit = max(_ROUNDING * _rms(own.arrays[name] - wanted), _FLOAT32 * spread, 1e-6)
        differences[name] = _rms(found.arrays[name] - wanted)
        if not differences[name] <= limit:
            raise ValueError(
                f"program {name}: its output differs from the model's by {differences[name]:.3g} "
                f"(root mean square; {dtype} rounding explains {limit:.3g}). Nothing was "
                "written; export on another machine or with another version of JAX, and report it"
            )
    return differences


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.square(x, dtype=np.float64).mean()))


class _Outputs(NamedTuple):
    """arrays: embeddings float32 [N, E], and log probabilities [tokens of all texts, ids]."""

    inputs: Examples
    arrays: dict[str, np.ndarray]

    @classmethod
    def of_model(
        cls, model: CoCaModel, dtype: str, device: jax.Device, inputs: Examples | None = None
    ) -> _Outputs:
        inputs = inputs or examples(model)
        config = typed(model.config).change({"model.dtype": dtype})
        params = jax.device_put(param_groups.without_task_head(model.params), device)
        same = CoCaModel(
            config, params, model.vocabulary, num_frames=model.num_frames, devices=[device]
        )
        pixels = np.asarray(normalise_pixels(jnp.asarray(inputs.image), model.config.model))
        out = same.forward(pixels, inputs.tokens)
        log_probs = np.asarray(jax.nn.log_softmax(out.logits))
        return cls._named(model, inputs, out.image_embedding, out.text_embedding, log_probs)

    @classmethod
    def of_programs(cls, model: CoCaModel, out: str, inputs: Examples) -> _Outputs:
        flat = export_format.flatten(export_format.read_export(out)[0])
        flat = {name: jnp.asarray(value) for name, value in flat.items()}

        def program(name: str) -> Any:
            return jax.export.deserialize(bytearray(_program(out, name).read_bytes())).call

        image, image_tokens = program("encode_image")(flat, inputs.image)
        valid = text_arrays.validity(model.vocabulary, inputs.tokens)
        text = program("encode_text")(flat, inputs.tokens, valid)
        weights = program("decode_weights")(flat)
        state = program("decode_start")(weights, image_tokens)
        decode_step = program("decode_step")
        steps = []
        for step, token in enumerate(inputs.tokens.T):
            log_probs, state = decode_step(weights, state, token, np.int32(step))
            steps.append(np.asarray(log_probs))
        return cls._named(model, inputs, image, text, np.stack(steps, 1))

    @classmethod
    def _named(
        cls, model: CoCaModel, inputs: Examples, image: Any, text: Any, log_probs: np.ndarray
    ) -> _Outputs:
        # Beyond a text's end decode_step sees padding that the model hides, and ids beyond the
        # vocabulary's have no probability.
        inside = np.arange(inputs.tokens.shape[1]) < inputs.length[:, None]
        known = log_probs[inside][:, : model.vocabulary.size]
        return cls(
            inputs,
            dict(encode_image=np.asarray(image), encode_text=np.asarray(text), decode_step=known),
        )
