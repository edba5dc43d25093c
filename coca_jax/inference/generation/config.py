"""How to write captions; apart from the decoding, so that commands check it without JAX."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import typing
import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Self

import numpy as np
from annotated_types import Interval

from coca_jax.config import base
from coca_jax.inference.generation import processors, strategies
from coca_jax.inference.generation.processors.base import Processor, option
from coca_jax.inference.generation.strategies.base import Strategy
from coca_jax.runtime import storage

FILE = "generation_config.json"
# Fields of transformers' file that say nothing about how a caption is chosen here.
_IGNORED = {
    "bos_token_id",
    "decoder_start_token_id",
    "eos_token_id",
    "pad_token_id",
    "transformers_version",
    "use_cache",
}


@dataclasses.dataclass(frozen=True)
class _Length:
    max_new_tokens: Annotated[int, Interval(ge=1)] = option(
        64, "New tokens at most, the end symbol included; never past the model's max_len.", most=256
    )


_PARTS: list[type] = [_Length, *strategies.ALL, *processors.ALL]
KINDS: dict[str, Any] = {
    name: kind
    for part in _PARTS
    for name, kind in typing.get_type_hints(part, include_extras=True).items()
    if name in {field.name for field in dataclasses.fields(part)}
}
_FIELDS: dict[str, dataclasses.Field[Any]] = {
    field.name: field for part in _PARTS for field in dataclasses.fields(part)
}
_Fields: Any = dataclasses.make_dataclass(
    "_Fields",
    [
        (name, KINDS[name], dataclasses.field(default=one.default, metadata=one.metadata))
        for name, one in _FIELDS.items()
    ],
    frozen=True,
)


@dataclasses.dataclass(frozen=True)
class GenerationConfig(_Fields):
    """How to write captions, with the names and defaults of Hugging Face's `GenerationConfig`.

    Raises ValueError for a value that is not allowed, for values that exclude each other, and for
    options that the decoding strategy does not use.

    Fields:
    """

    def __post_init__(self) -> None:
        for name, kind in KINDS.items():
            value = base.plain(getattr(self, name))
            base.check_value(kind, value, name)
            if isinstance(_FIELDS[name].default, float):
                value = float(value)  # 1 and 1.0 share a program
            object.__setattr__(self, name, value)
        strategy = self._strategy
        for name, field in _FIELDS.items():
            value = getattr(self, name)
            if value in (field.default, field.metadata["off"]):
                continue
            users = [one for one in strategies.ALL if name in _names(one)]
            if users and strategy not in users:
                raise ValueError(
                    f"{name}={value!r}: only {users[0].title} uses it. {users[0].remedy}."
                )
            samplers = [one for one in processors.ALL if one.samples and name in _names(one)]
            if samplers and not self._samples:
                raise ValueError(
                    f"{name}={value!r}: only sampling uses it. Set do_sample=True and num_beams=1."
                )
        for part in (strategy, *processors.ALL):
            part.check(self)

    @property
    def _strategy(self) -> type[Strategy]:
        return next(one for one in strategies.ALL if one.is_asked(self))

    @property
    def _samples(self) -> bool:
        return bool(self.do_sample and "do_sample" in _names(self._strategy))

    @property
    def streams(self) -> bool:
        """Whether tokens may be shown as they are written."""
        return self._strategy.streams

    def strategy(self) -> Strategy:
        """The decoding strategy, with its options."""
        return self._strategy.from_config(self)

    def processors(self) -> list[Processor]:
        """The logits processors that have an effect, in order, with their options."""
        found = [
            one.from_config(self) for one in processors.ALL if self._samples or not one.samples
        ]
        return [one for one in found if one.is_on()]

    def check_ids(self, count: int) -> None:
        """Raises ValueError for options that a vocabulary of `count` ids can't satisfy."""
        for part in (self.strategy(), *self.processors()):
            part.check_ids(count)

    def updated(self, overrides: Mapping[str, Any]) -> Self:
        """A copy with other values. Raises ValueError for an unknown field."""
        for name in overrides:
            if name not in _FIELDS:
                near = difflib.get_close_matches(name, _FIELDS, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"generation: unknown field {name!r}.{hint} Fields: {', '.join(_FIELDS)}."
                )
        return dataclasses.replace(self, **overrides)

    def to_dict(self) -> dict[str, Any]:
        """{field: value} of the fields whose value is not the default, and max_new_tokens."""
        return {
            name: getattr(self, name)
            for name, field in _FIELDS.items()
            if getattr(self, name) != field.default or name == "max_new_tokens"
        }

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes generation_config.json, which transformers reads too."""
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        storage.write_text(os.path.join(os.fspath(folder), FILE), text)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> Self:
        """Reads generation_config.json, ours or that of transformers; the defaults where a folder
        has none. Fields that only transformers has are skipped with a warning."""
        path = storage.place(os.path.join(os.fspath(folder), FILE))
        if not path.exists():
            return cls()
        try:
            found = json.loads(path.read_text())
            given = {name: found[name] for name in found if found[name] is not None}
        except (ValueError, TypeError):
            raise ValueError(f"{path}: not a JSON object. Write it anew.") from None
        skipped = [n for n in given if n not in _FIELDS and n not in _IGNORED and n[0] != "_"]
        if skipped:
            warnings.warn(f"{path}: skipped {', '.join(skipped)}", stacklevel=2)
        try:
            return cls(**{name: given[name] for name in given if name in _FIELDS})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def _names(part: type) -> list[str]:
    return [field.name for field in dataclasses.fields(part)]


def defaults() -> dict[str, Any]:
    """{field: its default}."""
    return {name: field.default for name, field in _FIELDS.items()}


def metadata(name: str) -> Mapping[str, Any]:
    """What a field declares: its help, and `most`, the largest value that a server accepts."""
    return _FIELDS[name].metadata


def parse(name: str, text: str) -> Any:
    """The value of a field from a text, as flags and forms have it: 3, true, never, [[5], [7, 8]].
    Raises ValueError if the field does not take it."""
    try:
        value = base.plain(json.loads(text.lower()))
    except ValueError:
        value = text
    base.check_value(KINDS[name], value, name)
    return value


GenerationConfig.__doc__ = (GenerationConfig.__doc__ or "") + "".join(
    f"    {name} ({field.default!r}): {field.metadata['help']}\n    "
    for name, field in _FIELDS.items()
)


def own_seeds(seeds: Sequence[int] | None, count: int) -> np.ndarray:
    """The number of each of `count` images that makes its random numbers its own, uint32 [count]:
    `seeds`, or its place in the list. Raises ValueError for too few, too many, or one that does not
    fit."""
    if seeds is None:
        return np.arange(count, dtype=np.uint32)
    seeds = list(seeds)
    if len(seeds) != count:
        raise ValueError(f"{len(seeds)} seeds for {count} images; give one each")
    wrong = [seed for seed in seeds if not (base.is_whole(seed) and 0 <= seed < 1 << 32)]
    if wrong:
        raise ValueError(f"seeds: {wrong[0]!r}; give whole numbers from 0 and below 2**32")
    return np.asarray(seeds, np.uint32)
