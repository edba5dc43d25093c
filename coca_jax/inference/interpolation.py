"""Interpolates between a fine-tuned model and the one it was tuned from (WiSE-FT, Wortsman et al.
2022): such weights often do what tuning taught and still do what the base could."""

from __future__ import annotations

import reprlib

import numpy as np

from coca_jax.inference import fingerprint
from coca_jax.inference.model import CoCaModel
from coca_jax.interop import export_format


def interpolate(base: CoCaModel, tuned: CoCaModel, share: float) -> None:
    """Sets the tuned model's weights to base + share x (tuned - base), computed in float32.

    Raises:
        ValueError: the models differ in more than their weights.
    """
    _check_same_architecture(base, tuned)
    first, last = export_format.flatten(base.params), export_format.flatten(tuned.params)
    mixed = {}
    for name, x in last.items():
        start, end = np.asarray(first[name], np.float32), np.asarray(x, np.float32)
        mixed[name] = (1 - share) * start + share * end
    tuned.set_params(export_format.unflatten(mixed))


def _check_same_architecture(base: CoCaModel, tuned: CoCaModel) -> None:
    """Raises ValueError naming the first setting or weight in which the models differ."""
    differing, other = (
        fingerprint.rest(model.config.model, model.config.data, model.vocabulary)
        | dict(class_names=model.class_names, head=getattr(model.head_kind, "name", ""))
        | {name: np.shape(x) for name, x in export_format.flatten(model.params).items()}
        for model in (base, tuned)
    )
    for key in sorted(differing.keys() | other.keys()):
        if differing.get(key) != other.get(key):
            values = [reprlib.repr(x[key]) if key in x else "unset" for x in (differing, other)]
            raise ValueError(
                f"{key} is {values[0]} in --base and {values[1]} in the tuned model; give the base "
                "that it was tuned from"
            )
