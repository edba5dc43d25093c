"""Where version 0.1 had the settings of captions: inference/generation/config.py has them."""

from __future__ import annotations

from typing import Any

from coca_jax.config import renamed

NOW = "coca_jax.inference.generation.config"


def __getattr__(name: str) -> Any:
    if name != "Settings":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; see {NOW}")
    from coca_jax.inference.generation.config import Settings

    renamed.say(f"{__name__}.{name}", f"{NOW}.{name}")
    return Settings
