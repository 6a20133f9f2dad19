"""Pictures for the few-shot tests."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def _write_images(folder: Path, count: int, size: tuple[int, int] = (24, 20)) -> None:
    """Write small pictures of noise, JPEG and PNG in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(str(folder)))
    for index in range(count):
        pixels = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03d}.{'jpg' if index % 2 else 'png'}")


@pytest.fixture
def write_images() -> Callable[..., None]:
    """Return `write_images(folder, count)`, which writes small PNG and JPEG files in turn."""
    return _write_images
