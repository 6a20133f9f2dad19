"""All training dynamics: importing this file registers them.

The package itself imports none of them, because methods with a training-time policy build on
`visionlora.dynamics.base`, and the dynamics in turn look at methods.
"""

from visionlora.dynamics import (
    allora,
    ggpo,
    glad,
    hft,
    lisa,
    lora_plus,
    lora_pro,
    mgpo,
    projected,
    relora,
    sam,
)

__all__ = [
    "allora",
    "ggpo",
    "glad",
    "hft",
    "lisa",
    "lora_plus",
    "lora_pro",
    "mgpo",
    "projected",
    "relora",
    "sam",
]
