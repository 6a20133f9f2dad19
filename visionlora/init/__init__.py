"""The initialisers: one file each or a few that belong together, registered on import."""

from visionlora.init import (
    corda,
    eva,
    lora_ga,
    lora_one,
    lora_sb,
    milora,
    nlora,
    random,
    spectral,
    svd,
)
from visionlora.init.base import Given, Initialiser, SiteStats, Start

__all__ = [
    "Given",
    "Initialiser",
    "SiteStats",
    "Start",
    "corda",
    "eva",
    "lora_ga",
    "lora_one",
    "lora_sb",
    "milora",
    "nlora",
    "random",
    "spectral",
    "svd",
]
