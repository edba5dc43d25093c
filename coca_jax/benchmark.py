"""`python -m coca_jax.benchmark train|encode|caption|input|losses --config=configs/X.py`.

Medians and spread over --repeats after one warm-up; random weights and inputs at the config's
sizes. `losses` needs no config. A time alone means little: compare two lines of the same session.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from coca_jax import benchmark_losses, cli, decoding, partitioning, run_config, train_step
from coca_jax.models import coca


def timed(function: Callable[[], Any], repeats: int) -> dict[str, float]:
    """{seconds: median, seconds_low, seconds_high} of calls, each until its arrays are there."""
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return dict(seconds=statistics.median(times), seconds_low=min(times), seconds_high=max(times))


def random_batch(config: ConfigDict, size: int) -> dict[str, np.ndarray]:
    """`size` rows as the pipeline gives them: random pixels, captions of 3 to max_len tokens."""
    rng = np.random.default_rng(config.seed)
    side, text = config.model.image_size, config.model.text
    lengths = rng.integers(3, text.max_len + 1, size)
    return dict(
        image=rng.integers(0, 256, (size, side, side, 3), dtype=np.uint8),
        tokens=rng.integers(5, text.vocab_size, (size, text.max_len)).astype(np.int32),
        text_valid=np.arange(text.max_len)[None] < lengths[:, None],
        is_label=np.arange(size) % 2 == 0,
        text_id=rng.integers(0, 2**31 - 1, (size, 2)).astype(np.int32),
    )


def train(config: ConfigDict, repeats: int) -> dict[str, float]:
    """The whole train step at config.batch_size: pairs_per_second and its inputs."""
    mesh = partitioning.make_mesh(**config.mesh)
    run_config.check_batch(config, partitioning.batch_parts(mesh), jax.process_count())
    with jax.set_mesh(mesh):
        model = build(config)
        state = train_step.init_state(model, config, mesh)
        _, shardings = train_step.state_shardings(model, config, mesh)
        steps = config.steps or 1000
        step = jax.jit(
            train_step.make_train_step(model, config, steps),
            donate_argnums=0,
            out_shardings=(shardings, None),
        )
        batch = partitioning.place_batch(mesh, random_batch(config, config.batch_size))

        def once() -> Any:
            nonlocal state
            state, metrics = step(state, batch)
            return metrics

        result = timed(once, repeats)
    return result | {"pairs_per_second": config.batch_size / result["seconds"]}


def encode(config: ConfigDict, batch: int, repeats: int) -> dict[str, float]:
    """Image embeddings of a batch: images_per_second."""
    model, params = build(config), make_params(config)
    pixels = random_batch(config, batch)["image"]

    @jax.jit
    def embed(params: Any, image: jax.Array) -> jax.Array:
        normal = train_step.normalise_pixels(image, config.model)
        return model.apply({"params": params}, normal, method="encode_image")[0]

    result = timed(lambda: embed(params, pixels), repeats)
    return result | {"images_per_second": batch / result["seconds"]}


def caption(
    config: ConfigDict, batch: int, tokens: int, beams: int, repeats: int
) -> dict[str, float]:
    """Captions of `tokens` tokens for a batch: tokens_per_second (of what is returned)."""
    text = config.model.text
    params = make_params(config)
    eos = text.vocab_size - 1
    spec = decoding.decoder(config.model, num_ids=text.vocab_size, eos_id=eos)
    blocked = jax.default_backend() == "cpu"  # as inference.CoCaModel does
    weights = decoding.prepare(params, config.model.dtype, blocked)
    queries = config.model.pooler.num_queries - (config.model.pooler.kind == "open_clip")
    rng = np.random.default_rng(config.seed)
    image_tokens = jnp.asarray(rng.normal(size=(batch, queries, text.width)), jnp.float32)
    settings = decoding.Settings(max_tokens=tokens, min_tokens=tokens, num_beams=beams)
    prompt = np.full((batch, 1), 3, np.int32)

    def once() -> Any:
        lengths = np.ones((batch,), np.int32)
        return decoding.generate(spec, weights, image_tokens, prompt, lengths, settings)

    result = timed(once, repeats)
    return result | {"tokens_per_second": batch * tokens / result["seconds"]}


def build(config: ConfigDict) -> coca.CoCa:
    """The config's model for this machine's devices."""
    sigmoid = config.loss.contrastive == "sigmoid"
    return coca.build(config.model, remat=config.remat, sigmoid=sigmoid)


def make_params(config: ConfigDict) -> Any:
    """Fresh parameters from config.seed."""
    model = build(config)
    return jax.jit(lambda k: partitioning.unbox(coca.init(model, k)))(jax.random.key(config.seed))


def define_flags() -> None:
    """Defines the command's flags; importing this module defines none."""
    config_flags.DEFINE_config_file("config", None, "Recipe, a file with get_config().")
    flags.DEFINE_integer("repeats", 5, "Timed repetitions.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 0, "Images at a time in encode and caption; 0: 16.")
    flags.DEFINE_integer("tokens", 60, "Tokens a caption; the end symbol is kept away.")
    flags.DEFINE_integer("beams", 1, "Beams in caption.", lower_bound=1)
    flags.DEFINE_float("seconds", 10.0, "How long `input` reads.")


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Command-line entry."""
    kinds = ("train", "encode", "caption", "input", "losses")
    if len(argv) != 2 or argv[1] not in kinds:
        raise ValueError(f"give one of {', '.join(kinds)}, and --config=configs/X.py")
    kind, repeats, batch = argv[1], flags.FLAGS.repeats, flags.FLAGS.batch_size or 16
    if kind == "losses":
        return benchmark_losses.run(repeats)
    if flags.FLAGS.config is None:
        raise ValueError(f"benchmark {kind} needs --config=configs/X.py")
    config = flags.FLAGS.config
    if kind == "input":
        from coca_jax.data import pipeline

        result = pipeline.measure_input(config, flags.FLAGS.seconds)
    elif kind == "train":
        result = train(config, repeats)
    elif kind == "encode":
        result = encode(config, batch, repeats)
    else:
        result = caption(config, batch, flags.FLAGS.tokens, flags.FLAGS.beams, repeats)
    device = jax.devices()[0]
    for name, value in result.items():
        print(f"{name:24s} {value:12.4f}")
    return {"benchmark": kind, "device": device.device_kind, "devices": jax.device_count()} | result


if __name__ == "__main__":
    define_flags()
    cli.run(main)
