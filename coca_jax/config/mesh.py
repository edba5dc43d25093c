"""The device mesh: `config.mesh`."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator
from pydantic.dataclasses import dataclass

from coca_jax.config.base import STRICT, Section, option


def _devices(value: int) -> int:
    if not -1 <= value <= 1 << 20 or value == 0:
        raise ValueError("give a whole number of devices, 1 or more, or -1 for all that are left")
    return value


def _devices_or_auto(value: int) -> int:
    if not -1 <= value <= 1 << 20:
        raise ValueError(
            "give a whole number of devices, 0 for an automatic choice, or -1 for all that are left"
        )
    return value


Devices = Annotated[int, AfterValidator(_devices)]
DevicesOrAuto = Annotated[int, AfterValidator(_devices_or_auto)]


@dataclass(frozen=True, config=STRICT)
class Mesh(Section):
    """The number of devices along each axis."""

    data: Devices = option(-1, "Data parallelism: parts of the batch, each with all parameters.")
    fsdp: DevicesOrAuto = option(
        0,
        "FSDP: parts of the batch, with the parameters sharded over them. 0: chosen from the "
        "model's size, and the devices' number, memory and links.",
    )
    tensor: DevicesOrAuto = option(
        0, "Tensor parallelism: parts of each layer. 0: 1, or more if the batch has few rows."
    )
