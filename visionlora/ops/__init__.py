"""Fused differentiable functions: pure, no modules, no state."""

from visionlora.ops.dense import Change, changed_weight, dense_linear
from visionlora.ops.lora import Branch, lora_linear

__all__ = ["Branch", "Change", "changed_weight", "dense_linear", "lora_linear"]
