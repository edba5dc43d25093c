"""Logits processors, one file each; see base.Processor."""

from __future__ import annotations

import sys

from coca_jax.inference.generation.processors import base

ALL: list[type[base.Processor]] = sorted(
    base.discover(sys.modules[__name__], base.Processor), key=lambda one: one.order
)
