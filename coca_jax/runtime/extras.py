"""Optional packages: the line that says how to install what is missing."""

from __future__ import annotations

import importlib.util


def remedy(extra: str) -> str:
    """The command that installs an extra of setup.py. pip and uv take the installed coca_jax for
    the one that is named here, wherever that came from."""
    return f"pip install 'coca_jax[{extra}]'"


def check(module: str, extra: str, use: str) -> None:
    """Raises ValueError where a module of an extra is not installed; use: what needs it."""
    if importlib.util.find_spec(module) is None:
        raise ValueError(f"{use} needs {module}: {remedy(extra)}")
