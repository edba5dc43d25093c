"""Decoding strategies, one file each; see base.Strategy."""

from __future__ import annotations

import sys

from coca_jax.inference.generation.processors.base import discover
from coca_jax.inference.generation.strategies import base

ALL: list[type[base.Strategy]] = sorted(
    discover(sys.modules[__name__], base.Strategy), key=lambda one: -one.priority
)
