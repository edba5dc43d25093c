"""What a logits processor declares and sees.

Processors (and strategies) are frozen dataclasses whose fields are options: together the fields of
GenerationConfig. driver.py registers them as pytrees, so that a program is compiled once for a
strategy and a list of processors, and their values are arguments (except static ones, which shape
the program).

Shape letters: B images, W captions or beams of an image, P prompt slots, S new tokens, T = P + S,
V vocabulary.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import types
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from coca_jax.inference.generation.processors.lazy_jax import jax, jnp

NEVER = -1e30  # score of a token that must not come; a sum of many of them is still finite


def option(
    default: Any, help: str, *, off: Any = None, most: float | None = None, static: bool = False
) -> Any:
    """An option of a processor or strategy; its annotation says which values are allowed.

    off: the value that has no effect (default: the default). most: the largest value that a server
    accepts, as it costs time or another program. static: a program is compiled for each value.
    """
    off = default if off is None else off
    return dataclasses.field(
        default=default, metadata=dict(help=help, off=off, most=most, static=static)
    )


class Context(NamedTuple):
    """What a processor may read besides scores."""

    tokens: jax.Array  # int32 [B, W, T]: prompt and new tokens by slot, -1 where there is none
    written: jax.Array  # int32 [B]: new tokens so far
    slots: int  # P: new tokens follow in slots P, P + 1, ...
    eos_id: int

    def last(self, count: int) -> jax.Array:
        """The last `count` tokens of each caption, int32 [B, W, count]; -1 where there is none."""
        at = (self.slots + self.written)[:, None, None] - count + jnp.arange(count)
        found = jnp.take_along_axis(self.tokens, jnp.maximum(at, 0), axis=2)
        return jnp.where(at >= 0, found, -1)


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of a processor or strategy, which are fields of GenerationConfig too."""

    @property
    def values(self) -> dict[str, Any]:
        """{option: value}."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """With the values that a GenerationConfig has."""
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})

    @classmethod
    def check(cls, config: Any) -> None:
        """Raises ValueError for values of a GenerationConfig that exclude each other."""

    def check_ids(self, count: int) -> None:
        """Raises ValueError for options that a vocabulary of `count` ids can't satisfy."""

    def arrays(self) -> Self:
        """With arrays in place of the values that are not static: what a program takes."""
        kinds: dict[type, Any] = {int: np.int32, float: np.float32}
        return dataclasses.replace(
            self,
            **{
                field.name: kinds[type(value)](value)
                for field in dataclasses.fields(self)
                if not field.metadata["static"]
                and type(value := getattr(self, field.name)) in kinds
            },
        )


@dataclasses.dataclass(frozen=True)
class Processor(Options):
    """Changes the scores of the next token. Each subclass is a file of `processors`."""

    order: ClassVar[int]  # smaller first; those of transformers' GenerationMixin
    samples: ClassVar[bool] = False  # only sampling uses it

    def is_on(self) -> bool:
        """Whether it changes any score."""
        return any(
            getattr(self, field.name) != field.metadata["off"] for field in dataclasses.fields(self)
        )

    def __call__(self, scores: jax.Array, context: Context) -> jax.Array:
        """scores, and the result, float32 [B, W, V]: log probabilities, or what earlier processors
        made of them; NEVER for tokens that must not come."""
        raise NotImplementedError


def largest(x: jax.Array, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Mask [..., V] of the fewest largest floats x [..., V] that are `enough`; equal ones together.

    enough(mask) must turn from false to true only once as the mask grows. Halves the interval of
    bit patterns: exact, in 32 passes, and faster on a CPU than sorting.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    key = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # ordered like the floats
    low = jnp.full(x.shape[:-1], jnp.iinfo(jnp.int32).min, jnp.int32)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        ok = enough(key >= middle[..., None])
        return jnp.where(ok, middle, low), jnp.where(ok, high, middle)

    low, _ = jax.lax.fori_loop(0, 32, halve, (low, key.max(-1) + 1))
    return key >= low[..., None]


def discover(package: types.ModuleType, kind: type) -> list[type]:
    """The subclasses of `kind` that a package's modules define, by module name."""
    found = []
    for module in sorted(one.name for one in pkgutil.iter_modules(package.__path__)):
        names = vars(importlib.import_module(f"{package.__name__}.{module}"))
        found += [
            one
            for one in names.values()
            if isinstance(one, type)
            and issubclass(one, kind)
            and one is not kind
            and one.__module__ == f"{package.__name__}.{module}"
        ]
    return found
