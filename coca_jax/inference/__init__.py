"""A trained model as people use it: embeddings, captions, scores, zero-shot classes.

    model = coca_jax.load("runs/demo")
    model.caption(["cat.jpg", "dog.jpg"])

The way of a photo: model.py (what `load` returns) asks read_images.py for pixels, programs.py for
what the network makes of them, generation/ for tokens and tokenization.py for words. loading.py turns a
folder, a file or a name into a model. TensorFlow is never imported here; JAX is with the first of
the names below, so that a command may check its settings before.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from coca_jax.inference.loading import load
    from coca_jax.inference.model import CoCaModel
    from coca_jax.inference.programs import Forward
    from coca_jax.inference.tokenization import Caption

__all__ = ["Caption", "CoCaModel", "Forward", "load"]
_HOMES = dict(Caption="tokenization", CoCaModel="model", Forward="programs", load="loading")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
