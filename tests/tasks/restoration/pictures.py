"""Small pictures on disk for tests."""

from pathlib import Path

import numpy as np

from tasks.restoration.images import Picture, write_picture


def waves(seed: int, height: int = 40, width: int = 48) -> np.ndarray:
    """Return a smooth colourful picture in [0, 1]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 10
    phases, slopes = rng.uniform(0, 6, 3), rng.uniform(-1, 1, (3, 2))
    layers = [
        np.sin(a * x * 2 + b * y * 2 + phase) for (a, b), phase in zip(slopes, phases, strict=True)
    ]
    return (np.stack(layers, axis=2) * 0.4 + 0.5).astype(np.float32)


def write(path: Path, pixels: np.ndarray) -> Path:
    """Write a picture of 8 bits."""
    return write_picture(path, pixels, Picture(np.zeros((1, 1, 3), np.uint8)))


def write_pairs(root: Path, count: int = 4, size: tuple[int, int] = (40, 48)) -> Path:
    """Write pairs of noisy and clean pictures."""
    for number in range(count):
        clean = waves(number, *size)
        noise = np.random.default_rng((number, 1)).normal(0, 0.1, clean.shape)
        write(root / "target" / f"{number}.png", clean)
        write(root / "input" / f"{number}.png", (clean + noise).astype(np.float32))
    return root
