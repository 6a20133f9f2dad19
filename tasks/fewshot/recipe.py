"""The recipe: what a run has unless the user says otherwise, and how it was chosen.

CLIP-LoRA's (2024, arXiv 2405.18541) for CLIP models; what is the tiny model's or timm's own was
chosen on validation images, with the commands below.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.fewshot.backbones import TINY
from tasks.fewshot.vision_only import PREFIX
from visionlora.compose import parse

ADAM_BETAS = (0.9, 0.999)
WEIGHT_DECAY = 1e-2
ETA_MIN = 1e-6
"""The cosine schedule ends at this learning rate."""

RATES = Path(__file__).with_name("rates.json")
"""Learning rates of methods on the tiny model, as multiples of the recipe's."""

RECIPE = {"rank": 2, "alpha": 1.0, "scaling": "rslora", "dropout": 0.25}
"""CLIP-LoRA's adapter options, for methods that train a factor pair; `--adapter.*` overrides."""
VISION_RECIPE = {"rank": 8, "alpha": 8.0, "scaling": "standard", "dropout": 0.0}
"""The same for timm backbones, with which a convolution gets a change of the factors' own size."""
NARROW: dict[str, dict[str, Any]] = {"vb-lora": {"block": 64}}
"""Options that the 64 features of the tiny model ask for."""


@dataclass(frozen=True)
class Preset:
    """Learning rate and length that suit a backbone."""

    lr: float
    steps_per_shot: int
    base_to_new_steps_per_shot: int
    """Fewer, since long training on the base classes costs accuracy on the new ones."""


PRESETS = {
    # CLIP-LoRA's published recipe; it has none for base-to-new, a fifth of the steps is our choice.
    "default": Preset(lr=2e-4, steps_per_shot=500, base_to_new_steps_per_shot=100),
    # Chosen on validation images of clothing10, see benchmarks/clothing10.py.
    "timm": Preset(lr=3e-4, steps_per_shot=10, base_to_new_steps_per_shot=10),
    # Chosen on validation images from the digits' training pool, never on test, with
    #   python scripts/fewshot.py --test-on val --seed 1 2 --lr LR --steps STEPS
    # Accuracy in % after 16-shot Block-LoRA (zero-shot 64.2), mean of both seeds:
    #   lr     160 steps  320 steps  640 steps
    #   2e-3   80.9       82.8       -
    #   5e-3   82.4       87.3       90.0
    #   1e-2   87.0       87.5       -
    # 4 shots at 5e-3: 77.7 after 80 steps, 81.9 after 160. 1 shot: 67.4 after 20, 68.6 after 80.
    # With --setting base-to-new, harmonic mean (zero-shot 73.3): 82.3 at 5e-3 and 78.5 at 1e-2
    # after 320 steps; at 5e-3 with --seed 1 2 3 (base / new / harmonic mean), differences within
    # the seeds' spread:
    #   80 steps 99.1 / 69.6 / 81.8   160: 99.1 / 70.7 / 82.6
    #   320      98.7 / 68.7 / 81.0   640: 98.0 / 69.6 / 81.4
    "tiny": Preset(lr=5e-3, steps_per_shot=40, base_to_new_steps_per_shot=10),
}


def preset_of(backbone: str) -> Preset:
    """Return learning rate and length that suit a backbone."""
    return PRESETS.get(backbone, PRESETS["timm" if backbone.startswith(PREFIX) else "default"])


def usual_options(backbone: str, method: str, low_rank: bool) -> dict[str, Any]:
    """Return the options of a method that differ from its own defaults on this backbone.

    Args:
        backbone: Its name.
        method: A registered method.
        low_rank: Whether the method trains a factor pair.
    """
    pair = VISION_RECIPE if backbone.startswith(PREFIX) else RECIPE
    narrow = NARROW.get(method, {}) if backbone == TINY else {}
    return {**(pair if low_rank else {}), **narrow}


def rate_of(method: str) -> float:
    """Return the learning rate of a method or product on the tiny model, relative to the recipe's.

    The rates were chosen on validation images (`python benchmarks/methods.py --choose`). Other
    backbones keep their published recipe: nothing was measured there.
    """
    rates: dict[str, float] = json.loads(RATES.read_text(encoding="utf-8"))
    return rates.get(method, rates.get(parse(method).method, 1.0))
