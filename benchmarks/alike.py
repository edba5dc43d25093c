"""A train step of ours and of PyTorch's model that is alike layer for layer, call by call in turn.

    taskset -c 0 python benchmarks/alike.py --repeats=7
    taskset -c 0 python benchmarks/alike.py --config=emoji --lengths 16 8 --dtype=bfloat16

One core, or as many as it is given. Random pixels and captions at the config's sizes, both models
in --dtype, PyTorch's in bfloat16 by its autocast; for each of --lengths captions of 3 tokens to so
many, padded alike in both; and the convolutional stem alone, forward and backward. Prints a JSON
line: of each {cpu_seconds, peer_cpu_seconds: medians of processor time, cpu_times_peer: the
quotient, above 1 where ours is faster; seconds...: wall time}, and the parameters of both.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

import jax
import numpy as np
import torch
from torch_alike import Alike, normalised, rounded, stepper

from coca_jax import ops
from coca_jax.apps import benchmark
from coca_jax.apps.benchmark import build, make_params, random_batch, timed
from coca_jax.config import Config, typed
from coca_jax.models.image_encoder import ConvStem, normalise_pixels
from coca_jax.training import recipes


def captions(config: Config, length: int) -> dict[str, np.ndarray]:
    """A batch whose captions have at most `length` tokens, and one that has them all."""
    batch = random_batch(config, config.batch_size)
    counts = 3 + np.arange(config.batch_size) % (length - 2)
    batch["text_valid"][:] = np.arange(config.model.text.max_len) < counts[:, None]
    return batch


def cut(batch: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    return batch | {name: batch[name][:, :length] for name in ("tokens", "text_valid")}


def steps(config: Config, lengths: list[int], repeats: int) -> dict[str, Any]:
    """Times of whole steps by length."""
    ours = benchmark.ours(config)
    twin, theirs = stepper(config)
    own = sum(int(x.size) for x in jax.tree.leaves(make_params(config)))
    found: dict[str, Any] = dict(parameters=own)
    found["peer_parameters"] = sum(p.numel() for p in twin.parameters())
    for length in lengths:
        batch = captions(config, length)
        chosen = benchmark.lengths_of(batch, config)[1]
        short = cut(batch, chosen)

        def one(batch: dict[str, np.ndarray] = batch) -> Any:
            return ours(batch)

        def other(batch: dict[str, np.ndarray] = short) -> float:
            return theirs(batch)

        found[f"step_{chosen}"] = timed(one, repeats, other)
    return found


def stem(config: Config, repeats: int) -> dict[str, float]:
    """Times of the stem, forward and backward, on a batch of pixels."""
    encoder, params = build(config).encoder, make_params(config)["image_encoder"]["stem"]
    sizes = encoder.conv_widths, encoder.conv_depths
    options = encoder.options
    module = ConvStem(*sizes, options.activation, options.dtype, options.ops)
    pixels = random_batch(config, config.batch_size)["image"]
    normal = jax.jit(lambda x: normalise_pixels(x, config.model))(pixels)
    shape = jax.eval_shape(lambda p: module.apply({"params": p}, normal), params).shape
    slope = np.random.default_rng(0).standard_normal(shape, np.float32)

    def gradients(params: Any, pixels: jax.Array, slope: jax.Array) -> Any:
        found, pull = jax.vjp(lambda p: module.apply({"params": p}, pixels), params)
        return found, pull(slope)

    run = jax.jit(gradients, compiler_options=ops.compiler_options("cpu"))
    placed = jax.device_put(slope)
    twin = Alike(config.model).stem
    seen = normalised(pixels, config.model)
    back = torch.from_numpy(slope).permute(0, 3, 1, 2)

    def theirs() -> int:
        twin.zero_grad()
        with rounded(config):
            found = twin(seen)
        found.float().backward(back)
        return 0

    return timed(lambda: run(params, normal, placed), repeats, theirs)


def main() -> None:
    """The command; see the module's docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="emoji")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 8])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    changed = {"text_lengths": tuple(given.lengths), "text_parts": 1, "model.dtype": given.dtype}
    config = typed(recipes.load(given.config)).change(changed)
    found = steps(config, given.lengths, given.repeats)
    found["stem"] = stem(config, 3 * given.repeats)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
