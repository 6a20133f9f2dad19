"""A small tracker that trains in seconds, and sequences for it; run as a program, one of a pair."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer

from tasks.tracking.model.variants import VARIANTS, TrackerShape, Variant
from tasks.tracking.training import train
from tasks.tracking.training.config import TrainConfig

SHAPE = TrackerShape(template_px=28, search_px=56)
WIDTH = 32
TOY = Variant("toy", "toy_vit", SHAPE, WIDTH, depth=2, heads=2, into=128, out_of=128, rank=4)

__all__ = ["toy_vit", "toy_vit_wide"]


@register_model
def toy_vit(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """A ViT of two blocks."""
    return _vit(WIDTH, 2, options)


@register_model
def toy_vit_wide(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """One that can learn 64 pairs."""
    return _vit(128, 8, options)


def _vit(width: int, heads: int, options: dict[str, Any]) -> VisionTransformer:
    sizes = {"img_size": 56, "patch_size": 14, "embed_dim": width, "depth": 2, "num_heads": heads}
    known = {name: options[name] for name in ("num_classes", "dynamic_img_size")}
    return VisionTransformer(**sizes, **known)


def write_sequence(folder: Path, count: int = 6, seed: int = 0) -> np.ndarray:
    """Write own data: a bright patch that moves over noise. Returns its boxes, xywh."""
    rng = np.random.default_rng(seed)
    (folder / "img").mkdir(parents=True)
    ground = rng.integers(0, 80, (48, 64, 3), dtype=np.uint8)
    start, colour = rng.integers(4, 20, 2), rng.integers(120, 255, 3)
    boxes = np.array([[start[0] + 2 * i, start[1] + i, 14, 12] for i in range(count)], float)
    for number, (x, y, w, h) in enumerate(boxes.astype(int)):
        frame = ground.copy()
        frame[y : y + h, x : x + w] = colour
        Image.fromarray(frame).save(folder / "img" / f"{number:04d}.png")
    np.savetxt(folder / "groundtruth.txt", boxes, fmt="%g", delimiter=",")
    return boxes


def write_data(root: Path, sequences: int = 3) -> str:
    """Write several sequences and return how a command line names them."""
    for number in range(sequences):
        write_sequence(root / f"video-{number}", seed=number)
    return f"folder:{root}"


def toy_config(data: str, output: Path, **options: Any) -> TrainConfig:
    """Settings of a short run."""
    VARIANTS.setdefault("toy", TOY)
    usual = {"steps": 4, "batch_size": 4, "lr": 1e-3, "checkpoint_every": 0, "device": "cpu"}
    own = {"tracker": "toy", "backbone_weights": "random", "data": [data], "output": str(output)}
    return TrainConfig(**{**usual, **own, **options})


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    train.run(toy_config(arguments.pop("data"), Path(arguments.pop("output")), **arguments))
