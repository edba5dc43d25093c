"""Why an import holds nothing, told from what it wrote so far."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from coca_jax.data import files
from coca_jax.importers import remarks, shards
from coca_jax.importers.items import Options, Unit


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
    more = of_where(work, filtered) + "".join(f"; {line}" for line in said)
    options = kept["request"]["options"]
    return remarks.nothing_usable(input, read, listed, filtered, options) + more


def of_where(work: str, filtered: Mapping[str, int]) -> str:
    """What is said of --where, if it left out examples of an import of which nothing is left."""
    if not filtered.get("where"):
        return ""
    kept = json.loads(files.read(files.join(work, "plan.json")))
    module, options = shards.importer(kept["request"]["format"]), kept["request"]["options"]
    units = (Unit(**unit) for group in kept["groups"] for unit in group)
    items = (item for unit in units for item in module.read(unit, Options(**options)))
    return remarks.of_where(dict(options["where"]), items)
