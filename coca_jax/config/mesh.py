"""The device mesh: `config.mesh`."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator
from pydantic.dataclasses import dataclass

from coca_jax.config.base import STRICT, Section, option


def _devices(value: int) -> int:
    if value != -1 and not 1 <= value <= 1 << 20:
        raise ValueError("give a whole number of devices, 1 or more, or -1 for all that are left")
    return value


Devices = Annotated[int, AfterValidator(_devices)]


@dataclass(frozen=True, config=STRICT)
class Mesh(Section):
    """The number of devices along each axis."""

    data: Devices = option(-1, "Data parallelism: parts of the batch, each with all parameters.")
    fsdp: Devices = option(1, "FSDP: parts of the batch, with the parameters sharded over them.")
    tensor: Devices = option(1, "Tensor parallelism: parts of each layer.")
