"""How often to save, and what share of its time a run that fails now and then has left for steps.

Failures come independently of each other (exponential times between them, memoryless). The formulas
are Daly's, "A higher order estimate of the optimum checkpoint interval for restart dumps" (2006);
`simulate` plays the same run out, and the tests compare the two.
"""

from __future__ import annotations

import math
import random
from typing import Any

# Llama 3 405B: 419 unexpected interruptions of 2,048 hosts of 8 GPUs in 54 days (Grattafiori et al.
# 2024, section 3.3.4): a host fails every 6,335 hours.
HOST_HOURS = 2048 * 54 * 24 / 419


def best_interval(save: float, between: float) -> float:
    """Seconds of training between two saves that waste the least time (Daly, equation 37); Young's
    sqrt(2 save between) is its first term.

    save: seconds that a save holds the steps up, above 0. between: mean seconds between failures.
    """
    if save >= 2 * between:
        return between
    ratio = save / (2 * between)
    return math.sqrt(2 * save * between) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save


def expected(interval: float, save: float, restart: float, between: float) -> float:
    """The share of time that steps have which are not lost (Daly, equation 20).

    interval: seconds of training between two saves. restart: seconds from a failure to the first
    step after it, which may fail as well. All else as in `best_interval`.
    """
    exponent = (interval + save) / between
    if exponent + restart / between > 700:
        return 0.0
    return interval / (between * math.exp(restart / between) * math.expm1(exponent))


def simulate(
    interval: float, save: float, restart: float, between: float, *, saves: int, seed: int = 0
) -> float:
    """`expected` as it came out in one run of so many saves, failure by failure."""
    draw = random.Random(seed)
    total, next_failure = 0.0, draw.expovariate(1 / between)
    for _ in range(saves):
        while next_failure < interval + save:
            total += next_failure
            while (next_failure := draw.expovariate(1 / between)) < restart:
                total += next_failure
            total += restart
            next_failure -= restart
        total += interval + save
        next_failure -= interval + save
    return saves * interval / total


def estimate(hosts: int, host_hours: float, save: float, restart: float) -> dict[str, Any]:
    """What to expect of a run on so many hosts: {'hours_between_failures', 'checkpoint_seconds',
    'expected_goodput', 'simulated_goodput'}.

    host_hours: mean hours between failures of one host. save, restart: seconds.
    """
    between = host_hours * 3600 / hosts
    interval = best_interval(save, between)
    goodput = expected(interval, save, restart, between)
    result = dict(
        hosts=hosts,
        hours_between_failures=between / 3600,
        checkpoint_seconds=interval,
        expected_goodput=goodput,
    )
    if goodput > 0.01:  # else the simulation does not come to an end
        result["simulated_goodput"] = simulate(interval, save, restart, between, saves=20_000)
    return result
