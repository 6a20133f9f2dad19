"""LPIPS, the distance of two pictures in the features of AlexNet (Zhang et al. 2018, 1801.03924).

It comes from the package `lpips`, which needs torchvision's weights of AlexNet. Nothing is
downloaded here: where one of them is missing, it is said how to get it.
"""

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8

Picture8 = UInt8[np.ndarray, "h w 3"]
Distance = Callable[[Picture8, Picture8], float]
ALEXNET = "alexnet-owt-7be5be79.pth"
"""Under this name torchvision keeps the weights."""
SOURCE = f"https://download.pytorch.org/models/{ALEXNET}"
SMALLEST = 64
"""Side below which AlexNet has no features left."""


def load_lpips(device: torch.device | str = "cpu") -> Distance | str:
    """Return LPIPS of pictures of one size, or what is missing and how to get it."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    missing = [] if find_spec("lpips") else ["pip install lpips"]
    if not (folder / ALEXNET).is_file():
        missing.append(f"put {SOURCE} into {folder}")
    if missing:
        return f"LPIPS is left out: {', and '.join(missing)}"
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks torchvision in an old way
        network = lpips.LPIPS(net="alex", verbose=False).to(device).eval()

    @torch.inference_mode()
    def distance(one: Picture8, other: Picture8) -> float:
        if min(one.shape[:2]) < SMALLEST:
            return float("nan")
        pair = (
            torch.from_numpy(picture.transpose(2, 0, 1)[None].astype(np.float32)).to(device)
            for picture in (one, other)
        )
        return float(network(*(picture / 127.5 - 1 for picture in pair)))

    return distance
