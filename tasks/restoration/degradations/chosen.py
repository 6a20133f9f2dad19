"""Which degradation the commands `preview` and `degrade` apply, and from which generator.

A picture's draw number n comes from a generator seeded by (seed, crc32 of its name, n) alone, so
neither the other pictures of a folder nor their order change it.
"""

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tasks.restoration.degradations.base import Degradation, Drawn, Image
from tasks.restoration.degradations.prod import FULL_PATCH, ORDER, Mode, Prod
from tasks.restoration.degradations.synthetic import TASKS
from tasks.restoration.images import Picture, pictures_below
from visionlora.errors import ConfigError, nearest


@dataclass(frozen=True, kw_only=True)
class ChosenConfig:
    """A degradation of pre-training, or one that stands for a task."""

    mode: Mode | None = None
    """Functions of pre-training: prod (the default), single, fixed or fixed-subset."""
    task: str | None = None
    """Instead: denoise, derain, dehaze, deblur, lowlight, jpeg or sr."""
    most: int = len(ORDER)
    """Largest number of functions that pre-training applies to a picture."""
    identity: float = 0.0
    """Share of pictures that pre-training leaves clean."""
    patch: int = FULL_PATCH
    """Side of training patches; below 256, blur, streaks and paths of pre-training shrink."""
    seed: int = 0
    """Seed of all draws."""

    def __post_init__(self) -> None:
        """Check the choice."""
        if self.task is not None and self.mode is not None:
            raise ConfigError("--mode is of pre-training, --task stands for a task; give one")
        if self.task is not None and self.task not in TASKS:
            raise ConfigError(
                f"unknown task {self.task!r}{nearest(self.task, TASKS)}; known: {', '.join(TASKS)}"
            )
        for name, least in {"patch": 1, "seed": 0}.items():
            if getattr(self, name) < least:
                raise ConfigError(f"--{name} must be at least {least}, got {getattr(self, name)}")
        if self.task is None:
            self.degradation()

    def degradation(self) -> Degradation:
        """Return what is done to a picture."""
        if self.task is not None:
            return TASKS[self.task]
        return Prod(self.mode or "prod", self.most, self.identity, self.patch)

    def described(self) -> dict[str, Any]:
        """Return the choice as it is written beside the drawn parameters."""
        if self.task is not None:
            return {"task": self.task, "seed": self.seed}
        return {
            "mode": self.mode or "prod",
            "most": self.most,
            "identity": self.identity,
            "patch": self.patch,
            "seed": self.seed,
        }

    def generator(self, name: str, number: int = 0) -> np.random.Generator:
        """Return the generator of a picture's draw."""
        return np.random.default_rng((self.seed, zlib.crc32(name.encode()), number))


def degraded(
    picture: Picture, pixels: Image, degradation: Degradation, rng: np.random.Generator
) -> tuple[Image, Drawn]:
    """Degrade pixels of a picture and clamp them; a grey one stays grey.

    A grey picture takes one channel of the result: their mean would weaken noise.
    """
    made, drawn = degradation(pixels, rng)
    if picture.grey:
        made = np.repeat(made[..., 1:2], 3, axis=2)
    return np.clip(made, 0, 1), drawn


def named_pictures(path: str) -> dict[str, Path]:
    """Return a picture, or those below a folder, by their names inside it.

    Raises:
        DataError: no picture is there.
    """
    at = Path(path).expanduser()
    if at.is_file():
        return {at.name: at}
    return {file.relative_to(at).as_posix(): file for file in pictures_below(at)}
