"""Our TPU kernels alone, by the compiler's schedule: bundles of instructions a head on v4.

    python benchmarks/tpu_kernels.py        # needs libtpu, no TPU

Prints a line of JSON: for 12 heads of 64 and 16 of 88, forward and backward, bundles of a row of
the batch over its heads, by queries x keys (256 of an image, 64 or 65 of a text, which is masked);
and for 16 heads of 1,024 queries over 1,024 keys, in blocks, bundles times steps.
"""

from __future__ import annotations

import json

from coca_jax.estimate import chips, tpu

BATCH = 8
WIDTHS = {64: 12, 88: 16}  # of a head: how many heads
LONG_WIDTHS = {64: 16, 88: 16}
LENGTHS = ((256, 256), (65, 65), (64, 64), (64, 256))
LONG = 1024


def types(queries: int, keys: int, width: int, masked: bool, gradient: bool) -> list[str]:
    """Operands of a call as HLO has them."""
    query, key = (f"bf16[{BATCH},{n},{width}]" for n in (queries, keys))
    found = ["s32[1]", query, key, key]
    if gradient:
        found += [query, query]
    if masked:
        found.append(f"f32[1,{queries},{keys}]")
    return found


def long_types(width: int, gradient: bool) -> list[str]:
    each = f"bf16[{BATCH},{LONG},{width}]"
    found = ["s32[1]", each, each, each]
    return [*found, each, each, f"f32[{BATCH},{LONG},128]"] if gradient else found


def measure() -> dict[str, dict[str, float]]:
    """The rows."""
    chip, calls, places = chips.TPUS["v4"], [], []
    for head, count in WIDTHS.items():
        for way, part in (("forward", ""), ("backward", "gradient_")):
            name = f"attention_{part}{count}_heads"
            for n, m in LENGTHS:
                if head == 88 and n == 65 or (head, n, m, way) == (88, 64, 64, "forward"):
                    continue
                calls.append((name, types(n, m, head * count, n == m < 256, bool(part))))
                places.append((f"{way}_{head}", f"{n}_x_{m}", 1 / count))
            heads = LONG_WIDTHS[head]
            name = f"long_attention_{part}{heads}_heads"
            calls.append((name, long_types(head * heads, bool(part))))
            steps = tpu.work(*calls[-1])[0] / BATCH
            places.append((f"long_{head}", way, steps / heads))
    topology = f"{chip.name}:{chip.smallest}"
    counted = tpu.count_bundles(topology, dict(chip.options), calls)
    rows: dict[str, dict[str, float]] = {}
    for (row, key, factor), bundles in zip(places, counted, strict=True):
        rows.setdefault(row, {})[key] = round(bundles * factor, 1)
    return rows


if __name__ == "__main__":
    print(json.dumps(measure()))
