"""Random initial parameters: what is drawn, and how a whole model's draws compile together.

Flax derives a key for each parameter and draws each by itself. Each key and each draw is a program
of its own to XLA, twenty rounds of Threefry and an inverse error function: for a small model that
compiles for longer than its gradient. `together` evaluates the same function so that all keys that
are ready are derived at once, and all small arrays are drawn as one flat array. Threefry's bits
depend on a key and an element's place in its array alone, so the numbers are the same to the bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jax.extend.random import threefry2x32_p
from jax.interpreters import partial_eval
from jax.scipy.special import erfinv

Initializer = Callable[..., jax.Array]

# Arrays of more elements are drawn by themselves: their place on a mesh is their own, and compiling
# is not what they cost.
SMALL = 1 << 20
CHUNK = 1 << 16  # elements drawn at a time
_ROOT_2 = np.float32(math.sqrt(2))


def truncated_normal(std: float) -> Initializer:
    """Normal numbers within two standard deviations, times `std`, float32."""

    def init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        return (_draw_truncated(key, tuple(shape)) * jnp.float32(std)).astype(dtype)

    return init


def normal(std: float) -> Initializer:
    """Normal numbers of standard deviation `std`, float32."""
    scale = _ROOT_2 * np.float32(std)  # one product, as XLA makes it of two constants

    def init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
        return (_draw_normal(key, tuple(shape)) * scale).astype(dtype)

    return init


@functools.partial(jax.jit, static_argnums=1)
def _draw_truncated(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return _truncated(jax.random.bits(key, shape, jnp.uint32))


@functools.partial(jax.jit, static_argnums=1)
def _draw_normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return _normal(jax.random.bits(key, shape, jnp.uint32))


def _uniform(bits: jax.Array, low: Any, high: Any) -> jax.Array:
    """From 32 random bits, as jax.random.uniform has it: 23 of them after a leading 1."""
    ones = (bits >> 9) | np.float32(1).view(np.uint32)
    between = jax.lax.bitcast_convert_type(ones, jnp.float32) - 1
    return jnp.maximum(low, between * (high - low) + low)


def _truncated(bits: jax.Array) -> jax.Array:
    low, high = (jax.lax.erf(jnp.float32(x) / _ROOT_2) for x in (-2, 2))
    drawn = _ROOT_2 * erfinv(_uniform(bits, low, high))
    return jnp.clip(drawn, *(jnp.nextafter(jnp.float32(x), jnp.float32(0)) for x in (-2, 2)))


def _normal(bits: jax.Array) -> jax.Array:
    """Without the square root of 2."""
    return erfinv(_uniform(bits, np.nextafter(np.float32(-1), np.float32(0)), np.float32(1)))


# What runs a jaxpr once, by the names of several versions of jax; the last two are nn.remat's.
CALLS = ("jit", "pjit", "closed_call", "checkpoint", "remat2")
# The draws by the names that their calls have in a jaxpr.
_KINDS = dict(_draw_truncated=_truncated, _draw_normal=_normal)


def together(function: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
    """`function` of a key, a typed scalar, with its keys and small draws computed together.

    Equal to `function` to the bit where jax's keys are those of Threefry; nothing is changed
    where they are not. `function` is traced once, whatever the result is asked for.
    """

    @functools.cache
    def traced(key: Any, wide: bool, mesh: Any) -> tuple[Jaxpr, Sequence[Any], Any]:
        """The function's draws, their constants and the tree of the results. key: its dtype; wide,
        mesh: whether numbers may have 64 bits and where they lie, which a trace reads itself."""
        scalar = jax.ShapeDtypeStruct((), key)
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(scalar)
        # Without the forward pass in which the parameters are made.
        jaxpr, _ = partial_eval.dce_jaxpr(
            closed.jaxpr, [True] * len(closed.jaxpr.outvars), instantiate=True
        )
        return jaxpr, closed.consts, jax.tree.structure(shapes)

    def evaluated(key: jax.Array) -> Any:
        by_place = jax.config.jax_threefry_partitionable  # type: ignore[attr-defined]
        if not by_place or str(jax.random.key_impl(key)) != "threefry2x32":
            return function(key)
        wide = jax.config.jax_enable_x64  # type: ignore[attr-defined]
        jaxpr, consts, tree = traced(key.dtype, wide, jax.sharding.get_abstract_mesh())
        return jax.tree.unflatten(tree, _run(jaxpr, consts, [key]))

    return evaluated


def _run(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """The jaxpr's results, its equations in waves: in each, all whose operands are there."""
    known: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args)))

    def value(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else known[atom]

    def shape(eqn: JaxprEqn) -> tuple[int, ...]:
        aval: Any = eqn.outvars[0].aval
        return tuple(aval.shape)

    left = list(jaxpr.eqns)
    while left:
        waiting: list[JaxprEqn] = []
        keys: list[JaxprEqn] = []
        drawn: dict[str, list[JaxprEqn]] = {kind: [] for kind in _KINDS}
        for eqn in left:
            name = str(eqn.params.get("name", eqn.primitive.name))
            if not all(isinstance(x, Literal) or x in known for x in eqn.invars):
                waiting.append(eqn)
            elif eqn.primitive.name == "random_fold_in" and not shape(eqn):
                keys.append(eqn)
            elif name in _KINDS and math.prod(shape(eqn)) <= SMALL:
                drawn[name].append(eqn)
            else:
                results = _run_one(eqn, [value(x) for x in eqn.invars])
                known.update(zip(eqn.outvars, results))
        if keys:
            folded = _fold_in([[value(x) for x in eqn.invars] for eqn in keys])
            known.update((eqn.outvars[0], key) for eqn, key in zip(keys, folded))
        for kind, eqns in drawn.items():
            arrays = _draw(kind, [value(eqn.invars[0]) for eqn in eqns], list(map(shape, eqns)))
            known.update((eqn.outvars[0], array) for eqn, array in zip(eqns, arrays))
        left = waiting
    return [value(x) for x in jaxpr.outvars]


def _run_one(eqn: JaxprEqn, values: list[Any]) -> list[Any]:
    """One equation; the body of a scan (a stack of layers) and of a call in waves too."""
    params = eqn.params
    if eqn.primitive.name in CALLS:
        return _run(*_body(eqn), values)
    if eqn.primitive.name != "scan":
        results = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(params))
        return list(results) if eqn.primitive.multiple_results else [results]
    jaxpr, held = _body(eqn)
    # Told by their ranks, for versions of jax name them differently: what is the same in all rounds
    # and what is carried come first and are as the body sees them; a round takes and gives an item
    # of each of the others.
    carried = sum(map(_same_rank, eqn.outvars, jaxpr.outvars))
    whole = sum(map(_same_rank, eqn.invars, jaxpr.invars))
    consts = whole - carried

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        results = _run(jaxpr, held, [*values[:consts], *carry, *xs])
        return results[:carried], results[carried:]

    carry, stacked = jax.lax.scan(
        body,
        values[consts:whole],
        values[whole:],
        length=params["length"],
        reverse=params["reverse"],
    )
    return [*carry, *stacked]


def _body(eqn: JaxprEqn) -> tuple[Jaxpr, Sequence[Any]]:
    """The jaxpr that a call or a scan runs, and its constants."""
    closed = eqn.params["jaxpr"]
    return getattr(closed, "jaxpr", closed), getattr(closed, "consts", ())


def _same_rank(outside: Any, inside: Any) -> bool:
    return len(outside.aval.shape) == len(inside.aval.shape)


def _fold_in(pairs: Sequence[Sequence[Any]]) -> list[jax.Array]:
    """jax.random.fold_in of (key, number) each."""
    if len(pairs) == 1:
        return [jax.random.fold_in(*pairs[0])]
    keys = jnp.stack([key for key, _ in pairs])
    return list(jax.vmap(jax.random.fold_in)(keys, jnp.stack([number for _, number in pairs])))


def _draw(kind: str, keys: Sequence[jax.Array], shapes: Sequence[Sequence[int]]) -> list[jax.Array]:
    """Arrays of the shapes, each from its key, drawn as one flat array."""
    if not keys:
        return []
    sizes = [math.prod(shape) for shape in shapes]
    starts = jnp.asarray(np.cumsum([0, *sizes[:-1]]), jnp.uint32)
    words = jnp.stack([jax.random.key_data(key) for key in keys])  # [K, 2]
    # In a loop of two rounds or more: XLA would otherwise put all of this into the program of each
    # part, as far as it reads it.
    rounds = max(2, -(-sum(sizes) // CHUNK))
    chunk = -(-sum(sizes) // rounds)

    def some(first: jax.Array) -> jax.Array:
        index = first + jax.lax.iota(jnp.uint32, chunk)
        of = (index[:, None] >= starts[1:]).sum(1)  # whose key: the last whose start is not behind
        place = index - starts[of]
        # What partitionable Threefry computes for an array of fewer than 2**32 elements.
        high, low = threefry2x32_p.bind(words[of, 0], words[of, 1], jnp.zeros_like(place), place)
        return _KINDS[kind](high ^ low)

    flat = jax.lax.map(some, jnp.arange(rounds, dtype=jnp.uint32) * chunk).reshape(-1)
    ends = np.cumsum(sizes)
    return [flat[e - n : e].reshape(shape) for e, n, shape in zip(ends, sizes, shapes)]
