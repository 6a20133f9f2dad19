"""GOT-10k's own scores: average overlap and success rates of all visible frames together.

    AO = mean IoU,    SR_t = #(IoU > t) / #frames,    t = .5 and .75

Boxes and truth are clipped to the image, the given first frame is left out, and so are frames of
which nothing can be seen (`cover` 0). Frames of all sequences are pooled, as the public validation
code does; the server averages over classes of objects instead.

Huang, Zhao, Huang, "GOT-10k", 2018, arXiv:1810.11981.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from tasks.tracking.boxes import iou, xywh_to_xyxy
from tasks.tracking.evaluation.metrics import Boxes, Values, share_above
from visionlora.errors import DataError

THRESHOLDS = np.linspace(0.0, 1.0, 101)
AT_50, AT_75 = 50, 75


@dataclass(frozen=True)
class Got10kScores:
    """Figures in percent, and the success curve in 0..1."""

    ao: float
    sr50: float
    sr75: float
    curve: Float[np.ndarray, " 101"]


def visible_overlaps(
    truth: Boxes,
    predicted: Boxes,
    size: tuple[int, int],
    absent: Bool[np.ndarray, " frames"] | None = None,
) -> Values:
    """Return the IoU of the frames that count, of `xywh` boxes in an image of width and height.

    Raises:
        DataError: there are more or fewer boxes than annotations.
    """
    if len(predicted) != len(truth):
        raise DataError(f"{len(predicted)} boxes for {len(truth)} annotated frames")
    overlaps = iou(xywh_to_xyxy(_bounded(predicted, size)), xywh_to_xyxy(_bounded(truth, size)))
    visible = np.ones(len(truth), dtype=bool) if absent is None else ~absent
    return overlaps[1:][visible[1:]]


def pooled(overlaps: Sequence[Values]) -> Got10kScores:
    """Score the frames of all sequences together."""
    every = np.concatenate(overlaps) if overlaps else np.empty(0)
    if not len(every):
        raise DataError("no visible frame to score")
    curve = share_above(every, THRESHOLDS)
    return Got10kScores(
        100 * float(every.mean()), 100 * float(curve[AT_50]), 100 * float(curve[AT_75]), curve
    )


def _bounded(boxes: Boxes, size: tuple[int, int]) -> Boxes:
    """Clip the corner, then the size, as the toolkit does.

    A box that begins left of the image keeps its whole width: this is no intersection.
    """
    corner = np.clip(boxes[:, :2], 0.0, size)
    return np.concatenate([corner, np.clip(boxes[:, 2:], 0.0, np.array(size) - corner)], axis=1)
