"""Times of a model with random weights: image encoding, captions, a token."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from coca_jax import partitioning
from coca_jax.benchmarking import peer_times
from coca_jax.config import Config
from coca_jax.data import batches
from coca_jax.data.mixture import head_classes
from coca_jax.inference.generation import loop
from coca_jax.inference.generation.settings import Settings
from coca_jax.models import coca, decoding
from coca_jax.models.pixels import normalise_pixels
from coca_jax.training.state import build_model

Call = Callable[[], Any]
USUAL_TOKENS = 60  # of a caption that is timed


def timed(function: Call, repeats: int, peer: Call | None = None) -> dict[str, float]:
    """{seconds: median, seconds_low, seconds_high, cpu_seconds: median of processor time} of
    calls, each until its arrays are there.

    With `peer`, its calls alternate with ours: also {peer_seconds..., times_peer, cpu_times_peer:
    the quotients of the medians}.
    """
    calls = {"": function} if peer is None else {"": function, "peer_": peer}
    times: dict[str, list[float]] = {name: [] for name in calls}
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(repeats):
        for name, call in calls.items():
            start, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
            spent[name].append(time.process_time() - cpu)
    result = {}
    for name, taken in times.items():
        result[f"{name}seconds"] = statistics.median(taken)
        result |= {f"{name}seconds_low": min(taken), f"{name}seconds_high": max(taken)}
        result[f"{name}cpu_seconds"] = statistics.median(spent[name])
    if peer is not None:
        result["times_peer"] = result["peer_seconds"] / result["seconds"]
        result["cpu_times_peer"] = result["peer_cpu_seconds"] / max(1e-9, result["cpu_seconds"])
    return result


def random_batch(config: Config, size: int) -> dict[str, np.ndarray]:
    """`size` rows of a batch: random pixels, captions of 3 to max_len tokens. Raises ValueError for
    a config that trains on kept features in place of pixels."""
    if config.data.features:
        raise ValueError(
            f"data.features={config.data.features}: a benchmark draws pixels, and this config "
            "trains on what an image encoder has made of them; give --config.data.features=''"
        )
    rng = np.random.default_rng(config.seed)
    text = config.model.text
    lengths = rng.integers(3, text.max_len + 1, size)
    batch = batches.empty(config, size)
    batch["image"][:] = rng.integers(0, 256, batch["image"].shape, dtype=np.uint8)
    batch["tokens"][:] = rng.integers(5, text.vocab_size, (size, text.max_len))
    batch["text_valid"][:] = np.arange(text.max_len)[None] < lengths[:, None]
    batch["is_label"][:] = np.arange(size) % 2 == 0
    batch["text_id"][:] = rng.integers(0, 2**31 - 1, (size, 2))
    batch["prompt_len"][:] = lengths
    return batch


def encode(config: Config, batch: int, repeats: int, compare: bool = False) -> dict[str, float]:
    """Image embeddings of a batch: images_per_second."""
    peer = peer_times.build(config.model) if compare else None
    model, params = build(config), make_params(config)
    pixels = random_batch(config, batch)["image"]

    @jax.jit
    def embed(params: Any, image: jax.Array) -> jax.Array:
        normal = normalise_pixels(image, config.model)
        return model.apply({"params": params}, normal, method="encode_image")[0]

    result = timed(
        lambda: embed(params, pixels),
        repeats,
        (lambda: peer_times.encode(peer, pixels)) if compare else None,
    )
    return result | {"images_per_second": batch / result["seconds"]}


def caption(
    config: Config, batch: int, tokens: int, beams: int, repeats: int, compare: bool = False
) -> dict[str, float]:
    """Captions of `tokens` tokens from a batch of pixels: tokens_per_second (of what is returned),
    encode_seconds, and the step's time by position, see `token_times`.

    tokens: 0 for USUAL_TOKENS, or what the model writes at most. Raises ValueError for more.
    """
    text = config.model.text
    most = text.max_len - 1  # after the symbol of the begin
    if tokens > most:
        raise ValueError(
            f"--tokens={tokens}: the model writes {most} at most "
            f"(model.text.max_len={text.max_len}); give --tokens={most} or less"
        )
    tokens = tokens or min(USUAL_TOKENS, most)
    peer = peer_times.build(config.model) if compare else None
    model, params = build(config), make_params(config)
    spec = decoding.decoder(config.model, num_ids=text.vocab_size, eos_id=text.vocab_size - 1)
    # As inference.CoCaModel does.
    spec, layout = decoding.fastest(spec, params)
    weights = decoding.pack(spec, params, layout)
    pixels = random_batch(config, batch)["image"]
    prompt, lengths = np.full((batch, 1), 3, np.int32), np.ones((batch,), np.int32)

    @jax.jit
    def look(params: Any, image: jax.Array) -> Any:
        normal = normalise_pixels(image, config.model)
        return model.apply({"params": params}, normal, method="encode_image")[1]

    def write(count: int) -> Any:
        settings = Settings(max_tokens=count, min_tokens=count, num_beams=beams)
        image_tokens = look(params, pixels)
        return loop.generate(spec, weights, image_tokens, prompt, lengths, settings)

    result = timed(
        lambda: write(tokens),
        repeats,
        (lambda: peer_times.caption(peer, pixels, tokens, beams)) if compare else None,
    )
    result["encode_seconds"] = timed(lambda: look(params, pixels), repeats)["seconds"]
    image_tokens = jax.block_until_ready(look(params, pixels))
    result |= token_times(spec, weights, image_tokens, beams, tokens, repeats)
    return result | {"tokens": tokens, "tokens_per_second": batch * tokens / result["seconds"]}


SPAN = 8  # tokens timed together, so that a call is long beside its start


def token_times(
    spec: decoding.Decoder,
    weights: dict,
    image_tokens: jax.Array,
    width: int,
    tokens: int,
    repeats: int,
) -> dict[str, float]:
    """Seconds of one token of a batch around token 5 and at the end of captions of `tokens` tokens.

    One program, with the cache of the whole caption, runs SPAN steps of the decoder and takes the
    most probable token of each; the two places are timed in turn, call by call. image_tokens:
    float32 [B, Q, D]. Returns medians early_token_seconds, late_token_seconds and
    late_over_early.
    """
    batch, span = len(image_tokens), min(SPAN, tokens)
    look = functools.partial(decoding.image_caches, spec, width=width)
    image = jax.jit(look)(weights, image_tokens)
    caches = decoding.empty_caches(spec, weights, batch, tokens * width)

    @jax.jit
    def steps(weights: dict, image: Any, caches: Any, start: jax.Array) -> Any:
        def step(i: jax.Array, state: Any) -> Any:
            token, caches = state
            slot = (start + i) * width
            mask = jnp.broadcast_to(
                jnp.arange(tokens * width) < slot + width, (batch, width, tokens * width)
            )
            place = jnp.broadcast_to(start + i, (batch, width))
            states, caches = decoding.run_tokens(
                spec, weights, token, place, mask, slot, caches, image
            )
            return decoding.log_probs_of(weights, states).argmax(-1).astype(jnp.int32), caches

        return jax.lax.fori_loop(0, span, step, (jnp.zeros((batch, width), jnp.int32), caches))[0]

    def at(start: int) -> Call:
        return lambda: steps(weights, image, caches, np.int32(start))

    found = timed(at(min(1, tokens - span)), repeats, at(tokens - span))
    early, late = found["seconds"] / span, found["peer_seconds"] / span
    return dict(early_token_seconds=early, late_token_seconds=late, late_over_early=late / early)


def build(config: Config) -> coca.CoCa:
    """The config's model for this machine's devices."""
    return build_model(config, None, len(head_classes(config)))


def make_params(config: Config) -> Any:
    """Fresh parameters from config.seed."""
    model = build(config)
    return jax.jit(lambda k: partitioning.unbox(coca.init(model, k)))(jax.random.key(config.seed))
