"""The table of an ablation: a TOML file of a recipe, seeds and variants."""

from __future__ import annotations

import dataclasses
import difflib
import pathlib
import re
import tomllib
from collections.abc import Mapping
from typing import Any

from coca_jax.config import Config, fields
from coca_jax.config.fields import dotted, plain
from coca_jax.training import recipes

KEYS = ("config", "seeds", "metrics", "overrides", "variants")
_MOST_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of the table.

    Attributes:
        name: also of its folder.
        recipe: what `--config` may name.
        values: {dotted key: value} that the recipe has otherwise.
    """

    name: str
    recipe: str
    values: Mapping[str, Any]

    def config(self, values: Mapping[str, Any] | None = None) -> Config:
        """Its config, with `values` besides. Raises ValueError, in one line, for one that cannot
        be."""
        typed = recipes.typed(recipes.load(self.recipe))
        try:
            return recipes.change(typed, {**self.values, **(values or {})})
        except ValueError as error:
            raise ValueError(f"variant {self.name}: {error}") from None


@dataclasses.dataclass(frozen=True)
class Table:
    """seeds: of each variant; metrics: names of eval.json that are shown, () for the headlines."""

    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    metrics: tuple[str, ...]


def read(path: str, values: Mapping[str, Any]) -> Table:
    """Reads a table; `values` go over those of every variant.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no table, or one of its configs cannot be: a line with file and key.
    """
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; give the TOML file of a table")
    with open(path, "rb") as file:
        data = file.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise ValueError(f"{path}: more than {_MOST_BYTES} bytes; give the TOML file of a table")
    try:
        found = tomllib.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no TOML file: {error}; docs/training.md shows one") from None
    try:
        return _table(found, values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _table(found: Mapping[str, Any], values: Mapping[str, Any]) -> Table:
    for key in found:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1, cutoff=0.6)
            guess = f"did you mean {near[0]}?" if near else f"a table has {', '.join(KEYS)}"
            raise ValueError(f"no key {key!r}; {guess}")
    seeds, metrics = found.get("seeds", [0]), found.get("metrics", [])
    if not _list_of(seeds, int) or not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={seeds!r}: give different whole numbers, as [0, 1, 2]")
    for seed in seeds:
        if not fields.SEED.holds(seed):
            raise ValueError(f"seeds={seeds!r}: {seed} is none; give {fields.SEED.words}")
    if not _list_of(metrics, str):
        raise ValueError(f"metrics={metrics!r}: give names of eval.json, as ['retrieval/x/r1']")
    common = _mapping(found.get("overrides", {}), "overrides")
    rows = _mapping(found.get("variants", {}), "variants")
    if not rows:
        raise ValueError("no variants; give [variants.NAME] with the keys that it has otherwise")
    variants = []
    for name, row in rows.items():
        if not re.fullmatch(r"[A-Za-z0-9][\w.+=-]{0,99}", name):
            raise ValueError(f"variant {name!r}: its folder has this name; use letters and digits")
        row = dict(_mapping(row, f"variants.{name}"))
        for key in row:
            # As no key of a recipe is called: TOML has taken a name apart.
            if not key.replace(".", "_").isidentifier():
                raise ValueError(
                    f"variant {name}: no key {key!r}; a name with a dot stands in quotes, "
                    f'[variants."{name}.{key}"]'
                )
        recipe = row.pop("config", found.get("config"))
        if not isinstance(recipe, str) or not recipe:
            raise ValueError(f"variant {name}: no recipe; give config = 'NAME' above the tables")
        given = {**dotted(Config, common), **dotted(Config, row), **values}
        if "seed" in given:
            raise ValueError(f"variant {name}: its seeds are those of the table; leave out seed")
        variant = Variant(name, recipe, {key: plain(value) for key, value in given.items()})
        variant.config()
        variants.append(variant)
    return Table(tuple(variants), tuple(seeds), tuple(metrics))


def _list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(one) is kind for one in value)


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name}={value!r}: give a TOML table, [{name}]")
    return value
