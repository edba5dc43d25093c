"""Why an import holds nothing, told from what it wrote so far."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from coca_jax.data import files
from coca_jax.importers import dedup, remarks, shards
from coca_jax.importers.items import Options, Unit


class NothingLeft(ValueError):
    """An import that leaves no example: what it listed and filtered, and what else is said."""

    def __init__(
        self,
        request: dict[str, Any],
        read: int,
        listed: Sequence[Mapping[str, str]],
        filtered: Mapping[str, int],
        more: str,
    ):
        self.listed, self.filtered, self.more = listed, filtered, more
        input, options = request["input"], request["options"]
        super().__init__(remarks.nothing_usable(input, read, listed, filtered, options) + more)

    def left_out(self, rows: int) -> Counter[str]:
        """What was filtered of a split of so many rows, by reason; 'where' without those of other
        splits."""
        found = Counter({k: n for k, n in self.filtered.items() if k != "where"})
        return found + Counter(where=rows - len(self.listed) - found.total())


def why(work: str, input: str) -> str:
    """The line for an import whose shards are there and hold nothing; '' for any other."""
    names = [n for n in files.listing(work) if re.fullmatch(r"part-\d+\.json", n)]
    accounts = [json.loads(files.read(files.join(work, name))) for name in names]
    listed = [entry for account in accounts for entry in account["quarantined"]]
    filtered = {"where": n} if (n := sum(a["filtered"].get("where", 0) for a in accounts)) else {}
    if not (listed or filtered) or any(account["count"] for account in accounts):
        return ""
    read = sum(account["read"] for account in accounts)
    kept = json.loads(files.read(files.join(work, "plan.json")))
    said = remarks.of_encoding((unit["path"] for group in kept["groups"] for unit in group), listed)
    more = of_where(work, listed, filtered) + "".join(f"; {line}" for line in said)
    options = kept["request"]["options"]
    return remarks.nothing_usable(input, read, listed, filtered, options) + more


def of_where(work: str, listed: Sequence[Mapping[str, str]], filtered: Mapping[str, int]) -> str:
    """What is said of --where, if it left out all examples of an import of which nothing is left;
    '' where some that it chose are `listed`, as their likeness is looked at last."""
    if not filtered.get("where") or any(entry["reason"] in dedup.REASONS for entry in listed):
        return ""
    kept = json.loads(files.read(files.join(work, "plan.json")))
    module, options = shards.importer(kept["request"]["format"]), kept["request"]["options"]
    units = (Unit(**unit) for group in kept["groups"] for unit in group)
    items = (item for unit in units for item in module.read(unit, Options(**options)))
    return remarks.of_where(dict(options["where"]), items)
