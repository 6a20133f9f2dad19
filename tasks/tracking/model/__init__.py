"""The network: variants by name, their backbones, LoRAT itself, and files of trained trackers."""

from tasks.tracking.model.adapter import AUTO, METHOD, add_adapter
from tasks.tracking.model.build import build
from tasks.tracking.model.lorat import ADAPTED, TRAINED, LoRAT, Prediction
from tasks.tracking.model.variants import VARIANTS, TrackerShape, Variant, find_variant

__all__ = [
    "ADAPTED",
    "AUTO",
    "METHOD",
    "TRAINED",
    "VARIANTS",
    "LoRAT",
    "Prediction",
    "TrackerShape",
    "Variant",
    "add_adapter",
    "build",
    "find_variant",
]
