"""Continuous batching: a row whose caption has ended takes the next image while the others go on.

`driver.decode` runs a batch until its longest caption has ended: rows that are done wait. Here `size`
rows are in flight; as soon as a whole block of images finds room the loop pauses, the images take
the places of captions that have ended, and it goes on. What is compiled are two programs: `burst`,
the loop until enough rows are free, and `take_in`, a block into free rows.

All rows share the cache slot that a step writes, as in `driver`: slots are used round and round, and
a mask says which are a row's own. A caption has at most as many tokens as there are slots.

Shape letters: B rows, R images of a block, W captions or beams of an image, P prompt slots, S new
tokens, Q image tokens, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from coca_jax.inference.generation import driver
from coca_jax.inference.generation.config import GenerationConfig
from coca_jax.inference.generation.driver import Captions, Images, Method
from coca_jax.inference.generation.strategies.base import Fixed, Loop
from coca_jax.models.text_decoder import Decoder


class Block(NamedTuple):
    """R images: their tokens [R, Q, D]; prompt int32 [R, P], right-aligned; prompt_len int32 [R];
    rows uint32 [R], what makes random numbers an image's own; used: the first so many are images,
    the others pad the block. R and P are the same for all blocks."""

    image_tokens: jax.Array
    prompt: np.ndarray
    prompt_len: np.ndarray
    rows: np.ndarray
    used: int


def generate(
    spec: Decoder, weights: dict, blocks: Iterable[Block], config: GenerationConfig, size: int
) -> Captions:
    """The captions of all images of all blocks, in order, as NumPy arrays.

    size: B, rows in flight, at least R. An image's captions are those that `driver.generate` gives,
    up to the rounding of sums that run over the cache in another order; the same blocks always
    give the same bits. Raises ValueError as `driver.generate`.
    """
    found: list[tuple[np.ndarray, ...]] = []
    state: _State | None = None
    owner = np.full(size, -1)
    for block in blocks:
        if state is None:
            state = _State(spec, weights, config, block, size)
        while (owner < 0).sum() < block.used:
            state.burst(len(block.rows))
            state.harvest(owner, found)
        free = np.flatnonzero(owner < 0)[: block.used]
        state.take_in(block, free)
        owner[free] = np.arange(len(found), len(found) + block.used)
        found += [()] * block.used
    while state is not None and (owner >= 0).any():
        state.burst(size)
        state.harvest(owner, found)
    empty = np.zeros((0, 1), np.int32)
    columns: Any = (empty[..., None], empty, empty.astype(np.float32))
    if found:
        columns = [np.stack(column) for column in zip(*found)]
    return Captions(*columns)


class _State:
    """Rows in flight, all of them free at first."""

    def __init__(
        self, spec: Decoder, weights: dict, config: GenerationConfig, block: Block, size: int
    ) -> None:
        self._spec, self._weights, self._config = spec, weights, config
        self._steps, self._method, _ = driver.prepare(spec, config, block.prompt_len, None, None)
        self._slots = block.prompt.shape[1]
        images = self._images(np.ones(size, np.int32), np.zeros(size, np.uint32), 0)
        self._fixed, self._loop = nothing_in_flight(
            spec,
            self._steps,
            self._method,
            weights,
            block.image_tokens,
            block.prompt,
            images,
            size=size,
        )

    def _images(self, prompt_len: np.ndarray, rows: np.ndarray, count: int) -> Images:
        active = np.arange(len(rows)) < count
        return driver.prepare(self._spec, self._config, prompt_len, rows, active)[2]

    def burst(self, enough: int) -> None:
        """Runs until at least `enough` rows are free."""
        self._loop = burst(
            self._spec,
            self._slots,
            self._method,
            self._weights,
            self._fixed,
            self._loop,
            np.int32(enough),
        )

    def take_in(self, block: Block, free: np.ndarray) -> None:
        """Puts the images of a block into free rows."""
        size, room = len(self._loop.done), len(block.rows)
        places = np.concatenate([free, np.full(room - len(free), size)]).astype(np.int32)
        self._fixed, self._loop = take_in(
            self._spec,
            self._steps,
            self._method,
            self._weights,
            self._fixed,
            self._loop,
            block.image_tokens,
            block.prompt,
            block.prompt_len,
            self._images(block.prompt_len, block.rows, block.used),
            places,
        )

    def harvest(self, owner: np.ndarray, found: list[tuple[np.ndarray, ...]]) -> None:
        """Moves captions that have ended to the places of their images; their rows are free."""
        done = np.asarray(self._loop.done).all(1)
        ended = np.flatnonzero(done & (owner >= 0))
        written = _captions(self._spec, self._slots, self._method.strategy, self._loop)
        captions = [np.asarray(x) for x in written]
        for row in ended:
            found[owner[row]] = tuple(x[row].copy() for x in captions)
        owner[ended] = -1


@functools.partial(jax.jit, static_argnames=("spec", "steps", "size"))
def nothing_in_flight(
    spec: Decoder,
    steps: int,
    method: Method,
    weights: dict,
    image_tokens: jax.Array,
    prompt: jax.Array,
    images: Images,
    *,
    size: int,
) -> tuple[Fixed, Loop]:
    """The state of `size` rows that are all free, for images and prompts of these shapes."""
    fixed, loop = jax.eval_shape(
        functools.partial(driver.begin, spec, steps, method.strategy),
        weights,
        jax.ShapeDtypeStruct((size, *image_tokens.shape[1:]), image_tokens.dtype),
        jax.ShapeDtypeStruct((size, prompt.shape[1]), jnp.int32),
        jax.ShapeDtypeStruct((size,), jnp.int32),
        images,
    )
    fixed, loop = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (fixed, loop))
    fixed = fixed._replace(limit=images.limit, rows=images.rows)
    return fixed, loop._replace(done=jnp.ones_like(loop.done))


@functools.partial(jax.jit, static_argnames=("spec", "slots"), donate_argnames=("loop",))
def burst(
    spec: Decoder,
    slots: int,
    method: Method,
    weights: dict,
    fixed: Fixed,
    loop: Loop,
    enough: jax.Array,
) -> Loop:
    """Steps until at least `enough` rows are done."""

    def busy(loop: Loop) -> jax.Array:
        return loop.done.all(1).sum() < enough

    step = functools.partial(driver.advance, spec, slots, method, weights, fixed)
    return jax.lax.while_loop(busy, step, loop)


@functools.partial(jax.jit, static_argnames=("spec", "steps"), donate_argnames=("fixed", "loop"))
def take_in(
    spec: Decoder,
    steps: int,
    method: Method,
    weights: dict,
    fixed: Fixed,
    loop: Loop,
    image_tokens: jax.Array,
    prompt: jax.Array,
    prompt_len: jax.Array,
    images: Images,
    places: jax.Array,
) -> tuple[Fixed, Loop]:
    """The state with R images in rows `places` int32 [R]; images of a place B are dropped."""
    new_fixed, new_loop = driver.begin(
        spec,
        steps,
        method.strategy,
        weights,
        image_tokens,
        prompt,
        prompt_len,
        images,
        prompts_alone=True,
    )

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[places].set(new, mode="drop") if old.ndim else old

    known = prompt.shape[1] - 1
    caches = loop.caches
    if known:
        caches = jax.tree.map(
            lambda old, new: old.at[places, :, :known].set(new, mode="drop"),
            caches,
            new_loop.caches,
        )
    fixed = jax.tree.map(put, fixed, new_fixed)
    rest = jax.tree.map(put, loop._replace(caches=[]), new_loop._replace(caches=[]))
    return fixed, rest._replace(caches=caches)


_captions = functools.partial(jax.jit, static_argnames=("spec", "slots"))(driver.captions)
