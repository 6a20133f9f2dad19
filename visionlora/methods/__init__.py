"""The parameterisations: one file each, registered on import."""

from visionlora.methods import (
    block_lora,
    dora,
    lora,
    lora_fa,
    rand_lora,
    vera,
)
from visionlora.methods.base import Delta, Layer, Shared

__all__ = [
    "Delta",
    "Layer",
    "Shared",
    "block_lora",
    "dora",
    "lora",
    "lora_fa",
    "rand_lora",
    "vera",
]
