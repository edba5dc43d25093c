"""Optional packages: the line that says how to install what is missing."""

from __future__ import annotations

import importlib.metadata
import shlex

from packaging.requirements import Requirement


def remedy(extra: str) -> str:
    """How to install an extra of setup.py, as `pip install 'av>=18.1'` and its name.

    The packages are named, since that works from anywhere; the package itself may have come from a
    clone or a wheel file.
    """
    try:
        wanted = [Requirement(text) for text in importlib.metadata.requires("coca_jax") or ()]
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        wanted = []
    names = [
        f"{need.name}[{','.join(need.extras)}]{need.specifier}"
        if need.extras
        else f"{need.name}{need.specifier}"
        for need in wanted
        if need.marker is not None and need.marker.evaluate({"extra": extra})
    ]
    if not names:
        return f"in a clone of coca_jax, pip install '.[{extra}]'"
    return f"pip install {shlex.join(sorted(names))} (coca_jax's extra '{extra}')"
