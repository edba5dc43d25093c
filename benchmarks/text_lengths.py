"""What `config.text_lengths` and `config.text_parts` leave of the places of texts.

    python benchmarks/text_lengths.py

Lengths of captions are drawn: as alt text has them (log-normal, 17 tokens on average, a long
tail), as sentences (9) and as names (5.6). For each batch size the share of max_len=64 that is
computed, as the product cuts batches, with the lengths 8, 16, 24, 32 and 48, for 1, 4 and 8 parts,
and the number of graphs with 4. `base_step`: how many operations of coca_base's step, by formula,
two lengths save. Prints a line of JSON.
"""

from __future__ import annotations

import json

import numpy as np

from coca_jax.config import Config, typed
from coca_jax.estimate.flops import model_flops
from coca_jax.training import feed, recipes

LENGTHS = (8, 16, 24, 32, 48)
WHOLE = 64
KINDS = dict(alt=(17.4, 0.8), sentences=(8.8, 0.45), names=(5.6, 0.4))  # mean, log's deviation
BATCHES = dict(alt=(64, 256, 65_536), sentences=(256, 65_536), names=(256, 65_536))
COUNT = {64: 200, 256: 100, 65_536: 4}  # batches that are drawn


def config(parts: int) -> Config:
    made = typed(recipes.load("coca_base"))
    whole = {"model.text.max_len": WHOLE, "accumulate_steps": 1}
    return made.change(whole | {"text_lengths": LENGTHS, "text_parts": parts})


def counts(kind: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """Tokens of each caption of a batch."""
    mean, deviation = KINDS[kind]
    drawn = rng.lognormal(np.log(mean) - deviation**2 / 2, deviation, size)
    return drawn.round().clip(2, WHOLE).astype(int)


def cut(batch: np.ndarray, made: Config) -> feed.Lengths:
    """The two lengths of a batch of counts."""
    valid = np.arange(WHOLE) < batch[:, None]
    arranged = feed.arrange(dict(text_valid=valid), made)["text_valid"].sum(1)
    long = feed.long_rows(len(batch), made)
    rest = arranged if made.text_parts == 1 else arranged[~long]
    return feed.choose(made, (int(rest.max()), int(arranged.max())))


def share(found: feed.Lengths, parts: int) -> float:
    """Of the places of whole texts. A batch in one part is as long as its longest."""
    short, long = found
    return long / WHOLE if parts == 1 else ((parts - 1) * short + long) / parts / WHOLE


def measure() -> dict[str, dict[str, float]]:
    """The rows."""
    made = {parts: config(parts) for parts in (1, 4, 8)}
    rows: dict[str, dict[str, float]] = {}
    for kind, sizes in BATCHES.items():
        for size in sizes:
            rng = np.random.default_rng(0)
            batches = [counts(kind, size, rng) for _ in range(COUNT[size])]
            row = dict(mean_tokens=float(np.mean(batches)))
            for parts, one in made.items():
                found = [cut(batch, one) for batch in batches]
                row[f"parts_{parts}"] = float(np.mean([share(pair, parts) for pair in found]))
                if parts == 4:
                    row["graphs"] = len(set(found))
            rows[f"{kind}_{size}"] = row
    rows["base_step"] = {f"with_{n}": 100 * saved(n) for n in (24, 16)}
    return rows


def saved(short: int) -> float:
    """The share of operations that three quarters of the rows at this length save."""
    model = typed(recipes.load("coca_base")).model
    whole, cut = (model_flops(model.change({"text.max_len": length})) for length in (WHOLE, short))
    return 0.75 * (whole - cut) / whole


if __name__ == "__main__":
    print(json.dumps(measure()))
