"""The network: variants by name, their backbones, LoRAT itself, and files of trained trackers."""

from tasks.tracking.model.build import METHOD, add_adapter, build
from tasks.tracking.model.lorat import ADAPTED, TRAINED, LoRAT, Prediction
from tasks.tracking.model.variants import VARIANTS, TrackerShape, Variant, find_variant

__all__ = [
    "ADAPTED",
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
