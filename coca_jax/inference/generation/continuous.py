"""Continuous batching: a row whose caption has ended takes the next image while the others go on.

`loop.decode` runs a batch until its longest caption has ended: rows that are done wait. Here `size`
rows are in flight; as soon as a whole block of images finds room the loop pauses, the images take
the places of captions that have ended, and it goes on. What is compiled are two programs: `burst`,
the loop until enough rows are free, and `take_in`, a block into free rows.

All rows share the cache slot that a step writes, as in `loop`: slots are used round and round, and
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

from coca_jax.inference.generation.base import Fixed, Loop, Plan
from coca_jax.inference.generation.config import Settings
from coca_jax.inference.generation.generate import Captions, begin, captions_of, planned, step_of
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
    spec: Decoder, weights: dict, blocks: Iterable[Block], settings: Settings, size: int
) -> Captions:
    """The captions of all images of all blocks, in order, as NumPy arrays.

    size: B, rows in flight, at least R. An image's captions are those that `loop.generate` gives,
    up to the rounding of sums that run over the cache in another order; the same blocks always
    give the same bits. Raises ValueError as `loop.generate`.
    """
    found: list[tuple[np.ndarray, ...]] = []
    state: _State | None = None
    owner = np.full(size, -1)
    for block in blocks:
        if state is None:
            state = _State(spec, weights, settings, block, size)
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
        self, spec: Decoder, weights: dict, settings: Settings, block: Block, size: int
    ) -> None:
        self._spec, self._weights, self._settings = spec, weights, settings
        self._plan = planned(spec, block.prompt_len, settings, None, None)[0]
        self._slots = block.prompt.shape[1]
        numbers = self._numbers(np.ones(size, np.int32), np.zeros(size, np.uint32), 0)
        self._fixed, self._loop = nothing_in_flight(
            spec, self._plan, weights, block.image_tokens, block.prompt, numbers, size=size
        )

    def _numbers(self, prompt_len: np.ndarray, rows: np.ndarray, count: int) -> dict:
        active = np.arange(len(rows)) < count
        return planned(self._spec, prompt_len, self._settings, rows, active)[1]

    def burst(self, enough: int) -> None:
        """Runs until at least `enough` rows are free."""
        self._loop = burst(
            self._spec,
            self._plan,
            self._weights,
            self._fixed,
            self._loop,
            np.int32(enough),
            slots=self._slots,
        )

    def take_in(self, block: Block, free: np.ndarray) -> None:
        """Puts the images of a block into free rows."""
        size, room = len(self._loop.done), len(block.rows)
        places = np.concatenate([free, np.full(room - len(free), size)]).astype(np.int32)
        self._fixed, self._loop = take_in(
            self._spec,
            self._plan,
            self._weights,
            self._fixed,
            self._loop,
            block.image_tokens,
            block.prompt,
            block.prompt_len,
            self._numbers(block.prompt_len, block.rows, block.used),
            places,
        )

    def harvest(self, owner: np.ndarray, found: list[tuple[np.ndarray, ...]]) -> None:
        """Moves captions that have ended to the places of their images; their rows are free."""
        done = np.asarray(self._loop.done).all(1)
        ended = np.flatnonzero(done & (owner >= 0))
        captions = [
            np.asarray(x) for x in _written(self._spec, self._plan, self._slots, self._loop)
        ]
        for row in ended:
            found[owner[row]] = tuple(x[row].copy() for x in captions)
        owner[ended] = -1


@functools.partial(jax.jit, static_argnames=("spec", "plan", "size"))
def nothing_in_flight(
    spec: Decoder,
    plan: Plan,
    weights: dict,
    image_tokens: jax.Array,
    prompt: jax.Array,
    numbers: dict,
    *,
    size: int,
) -> tuple[Fixed, Loop]:
    """The state of `size` rows that are all free, for images and prompts of these shapes."""
    fixed, loop = jax.eval_shape(
        functools.partial(begin, spec, plan),
        weights,
        jax.ShapeDtypeStruct((size, *image_tokens.shape[1:]), image_tokens.dtype),
        jax.ShapeDtypeStruct((size, prompt.shape[1]), jnp.int32),
        jax.ShapeDtypeStruct((size,), jnp.int32),
        numbers,
    )
    fixed, loop = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (fixed, loop))
    return fixed._replace(numbers=numbers), loop._replace(done=jnp.ones_like(loop.done))


@functools.partial(jax.jit, static_argnames=("spec", "plan", "slots"), donate_argnames=("loop",))
def burst(
    spec: Decoder,
    plan: Plan,
    weights: dict,
    fixed: Fixed,
    loop: Loop,
    enough: jax.Array,
    *,
    slots: int,
) -> Loop:
    """Steps until at least `enough` rows are done."""

    def busy(loop: Loop) -> jax.Array:
        return loop.done.all(1).sum() < enough

    return jax.lax.while_loop(
        busy, functools.partial(step_of, spec, plan, weights, fixed, slots), loop
    )


@functools.partial(jax.jit, static_argnames=("spec", "plan"), donate_argnames=("fixed", "loop"))
def take_in(
    spec: Decoder,
    plan: Plan,
    weights: dict,
    fixed: Fixed,
    loop: Loop,
    image_tokens: jax.Array,
    prompt: jax.Array,
    prompt_len: jax.Array,
    numbers: dict,
    places: jax.Array,
) -> tuple[Fixed, Loop]:
    """The state with R images in rows `places` int32 [R]; of a place B nothing is kept."""
    new_fixed, new_loop = begin(
        spec,
        plan,
        weights,
        image_tokens,
        prompt,
        prompt_len,
        numbers,
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


_written = functools.partial(jax.jit, static_argnums=(0, 1, 2))(captions_of)
