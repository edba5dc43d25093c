"""What a program that trains does before all else, even before its imports."""

from __future__ import annotations

import pathlib
import sys

from coca_jax.runtime import huge_pages, signals


def begin() -> None:
    """Takes huge pages, and watches the signals that end a run."""
    with_huge_pages()
    signals.install()


def with_huge_pages() -> None:
    """Starts once more with huge pages where that helps, if this process is a command of this
    package and not one that calls its functions."""
    main = sys.modules["__main__"]
    module = getattr(getattr(main, "__spec__", None), "name", "")
    script = pathlib.Path(getattr(main, "__file__", None) or "").name
    if module.split(".")[0] == "coca_jax" or script == "coca-jax":
        huge_pages.begin_again()
