"""Fused differentiable functions: pure, no modules, no state."""

from visionlora.ops.dense import Change, changed_weight, dense_linear
from visionlora.ops.lora import Branch, Frozen, lora_linear, multiply_adds
from visionlora.ops.rebuilt import Rebuilt
from visionlora.ops.row_gain import row_norms, scale_gradient, with_gain

__all__ = [
    "Branch",
    "Change",
    "Frozen",
    "Rebuilt",
    "changed_weight",
    "dense_linear",
    "lora_linear",
    "multiply_adds",
    "row_norms",
    "scale_gradient",
    "with_gain",
]
