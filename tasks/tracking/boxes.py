"""Boxes as corners and as sizes, and their overlap.

`xyxy` is `x1, y1, x2, y2`, `xywh` is `x, y, width, height`; both are continuous, pixel 0 spans
[0, 1). What is measured is numpy in float64; what is trained through is torch.

    GIoU(a, b) = IoU(a, b) - (|hull| - |a or b|) / |hull|,    hull = smallest box around both

GIoU: Rezatofighi et al., "Generalized Intersection over Union", 2019, arXiv:1902.09630.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

EPS = 1e-6
"""Least area by which `overlap` divides."""

Boxes = Float[np.ndarray, "*n 4"]


def xywh_to_xyxy(boxes: npt.ArrayLike) -> Boxes:
    """Return corners of boxes given by corner and size."""
    boxes = np.asarray(boxes, dtype=np.float64)
    return np.concatenate([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], axis=-1)


def xyxy_to_xywh(boxes: npt.ArrayLike) -> Boxes:
    """Return corner and size of boxes given by corners."""
    boxes = np.asarray(boxes, dtype=np.float64)
    return np.concatenate([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], axis=-1)


def clip(boxes: npt.ArrayLike, width: float, height: float) -> Boxes:
    """Return the parts of `xyxy` boxes inside [0, width] x [0, height]; may be empty."""
    limits = np.array([width, height, width, height], dtype=np.float64)
    return np.clip(np.asarray(boxes, dtype=np.float64), 0.0, limits)


def iou(a: npt.ArrayLike, b: npt.ArrayLike) -> Float[np.ndarray, "*n"]:
    """Return the intersection over union of `xyxy` boxes; 0 where the union is empty."""
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    shared = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    intersection = shared.clip(min=0.0).prod(axis=-1)
    union = _area(a) + _area(b) - intersection
    return np.divide(intersection, union, out=np.zeros_like(intersection), where=union > 0)


def overlap(
    a: Float[Tensor, "*n 4"], b: Float[Tensor, "*n 4"]
) -> tuple[Float[Tensor, "*n"], Float[Tensor, "*n"]]:
    """Return IoU and GIoU of `xyxy` boxes, differentiable in both."""
    corner, far = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    intersection = (far - corner).clamp(min=0).prod(dim=-1)
    union = _area(a) + _area(b) - intersection
    around = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    hull = around.prod(dim=-1)
    ratio = intersection / union.clamp(min=EPS)
    return ratio, ratio - (hull - union) / hull.clamp(min=EPS)


def _area(boxes: Any) -> Any:
    """Return the areas of an array or a tensor of `xyxy` boxes."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
