"""Fused differentiable functions: pure, no modules, no state."""

from visionlora.ops.lora import Branch, lora_linear

__all__ = ["Branch", "lora_linear"]
