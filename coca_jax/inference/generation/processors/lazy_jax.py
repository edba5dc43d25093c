"""jax and jax.numpy, imported at first use.

Commands read the options that processors and strategies declare for `--help` and to check flags;
importing JAX for that would take longer than everything else they do.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__all__ = ["jax", "jnp"]

if TYPE_CHECKING:
    import jax
    import jax.numpy as jnp
else:

    class _Lazy:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            return getattr(importlib.import_module(self._name), attribute)

    jax, jnp = _Lazy("jax"), _Lazy("jax.numpy")
