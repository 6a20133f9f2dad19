"""PROD: pre-training with degradations in random order (Park et al. 2024, arXiv 2408.01099).

    y = clamp(f_k(... clamp(f_1(x)))),    f_1 .. f_k distinct, drawn without replacement

of the functions blur, motion, rain, noise and jpeg. Modes:

    prod          k ~ U{1, .., 5}, any order
    single        one function
    fixed         all five, always in the order above
    fixed-subset  as prod, but in the order above

That a random selection is applied in random order is the paper's; how many, and the identity share,
are derived.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import numpy as np

from tasks.restoration.degradations.base import Degradation, Drawn, Image
from tasks.restoration.degradations.blur import blur, motion
from tasks.restoration.degradations.jpeg import jpeg
from tasks.restoration.degradations.noise import noise
from tasks.restoration.degradations.rain import rain
from visionlora.errors import ConfigError, nearest

Mode = Literal["prod", "single", "fixed", "fixed-subset"]
MODES: tuple[str, ...] = get_args(Mode)
ORDER = ("blur", "motion", "rain", "noise", "jpeg")
FULL_PATCH = 256
"""Side of a patch for which lengths are given."""
SHORTEST = 0.5
"""Least factor of lengths: small patches are cut from large pictures, whose blur is not smaller."""


@dataclass(frozen=True)
class Prod:
    """The degradation of pre-training.

    Args:
        mode: see above.
        most: largest number of functions.
        identity: share of pictures that stay clean.
        patch: side of the patches; blur, streaks and paths are shortened with it.
    """

    mode: str = "prod"
    most: int = len(ORDER)
    identity: float = 0.0
    patch: int = FULL_PATCH

    def __post_init__(self) -> None:
        """Check the options."""
        if self.mode not in MODES:
            raise ConfigError(
                f"unknown mode {self.mode!r}{nearest(self.mode, MODES)}; known: {', '.join(MODES)}"
            )
        if not 1 <= self.most <= len(ORDER):
            raise ConfigError(f"between 1 and {len(ORDER)} functions, got {self.most}")
        if not 0 <= self.identity <= 1:
            raise ConfigError(f"the identity share must lie in [0, 1], got {self.identity}")

    def __call__(self, image: Image, rng: np.random.Generator) -> tuple[Image, Drawn]:
        """Degrade a picture."""
        chosen = self.choose(rng)
        functions = self.functions
        steps = []
        for name in chosen:
            image, drawn = functions[name](image, rng)
            image = np.clip(image, 0, 1)
            steps.append({"function": name, **drawn})
        return image, {"steps": steps}

    def choose(self, rng: np.random.Generator) -> list[str]:
        """Draw which functions are applied, in order."""
        if self.identity and rng.random() < self.identity:
            return []
        if self.mode == "fixed":
            return list(ORDER)
        count = 1 if self.mode == "single" else int(rng.integers(1, self.most + 1))
        chosen = rng.choice(len(ORDER), count, replace=False)
        if self.mode == "fixed-subset":
            chosen = np.sort(chosen)
        return [ORDER[index] for index in chosen]

    @property
    def functions(self) -> dict[str, Degradation]:
        """The functions by name, their lengths fitted to the patch."""
        scale = min(1.0, max(SHORTEST, self.patch / FULL_PATCH))
        return {
            "blur": partial(blur, scale=scale),
            "motion": partial(motion, scale=scale),
            "rain": partial(rain, scale=scale),
            "noise": noise,
            "jpeg": jpeg,
        }
