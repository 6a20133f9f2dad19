"""PEFT's file format: reading, writing, and one mapping per method."""

from visionlora.io.peft import lora
from visionlora.io.peft.config import is_peft, read_peft
from visionlora.io.peft.read import read_as_native, translate
from visionlora.io.peft.write import write_peft

__all__ = ["is_peft", "lora", "read_as_native", "read_peft", "translate", "write_peft"]
