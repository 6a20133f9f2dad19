"""PEFT's file format: reading, writing, and one mapping per method."""

from visionlora.io.peft import adalora, banks, bases, lora, lycoris, products, rotations, spectra
from visionlora.io.peft.config import is_peft, read_peft
from visionlora.io.peft.read import read_as_native, translate
from visionlora.io.peft.write import write_peft

__all__ = [
    "adalora",
    "banks",
    "bases",
    "is_peft",
    "lora",
    "lycoris",
    "products",
    "read_as_native",
    "read_peft",
    "rotations",
    "spectra",
    "translate",
    "write_peft",
]
