"""Correlation of frozen features: the object as a stamp of what a network sees in it.

    init     128-px crop of area factor 2 -> 8 x 8 features; T: cells with their centre in the box
    track    256-px crops of area factor 4 at 3 sizes -> 16 x 16 features each: S
             score(u) = mean over the cells c of T of cosine(T_c, S_{u + c})
             penalised = (1 - w) penalty_size score + w Hann,        w = 0.3
             the best place moves the box; the best size changes it by the share 0.59

Nothing is trained. With the ImageNet features of EfficientNet-Lite0 at stride 16 this is a good
deal better than a tracker trained for minutes; both crops have the same scale, as in Bertinetto et
al. 2016, "Fully-Convolutional Siamese Networks for Object Tracking", arXiv:1606.09549, from which
sizes and penalty are taken.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from tasks.shared.tiny_vit.teacher import Teacher
from tasks.tracking.boxes import Boxes, clip, xywh_to_xyxy, xyxy_to_xywh
from tasks.tracking.geometry.crop import Mapping, channel_mean, crop, crop_mapping, widen
from tasks.tracking.geometry.post import hann, next_state
from tasks.tracking.trackers.base import Frame, Output, checked_box
from visionlora.errors import AdapterStateError

TEMPLATE_PX, SEARCH_PX, STRIDE = 128, 256, 16
TEMPLATE_FACTOR, SEARCH_FACTOR = 2.0, 4.0
SIZES = (0.964, 1.0, 1.0375)
"""Sizes of the object that are tried, relative to the last."""
PENALTY, WINDOW, RATE = 0.975, 0.3, 0.59
"""Factor for a changed size, share of the window, share of a new size that is believed."""
FINE = 16
"""Places per cell between which the best is chosen: those of pixels."""

Extract = Callable[[Float[Tensor, "b 3 h w"]], Float[Tensor, "b n c"]]
"""Features of every cell, row by row, of pixels in 0 .. 1."""


@dataclass(eq=False)
class _State:
    stamp: Float[Tensor, "1 c h w"]
    offset: Float[np.ndarray, "2"]
    """Centre of the object from the centre of the stamp: columns and rows, in crop pixels."""
    fill: Float[Tensor, "3"]
    box: Boxes


class FeatureCorrelation:
    """Follows the features of the first box.

    Args:
        extract: The network; EfficientNet-Lite0 up to stride 16 by default.
        name: What results are filed under.
    """

    def __init__(self, extract: Extract | None = None, name: str = "lite0") -> None:
        self.name = name
        self.extract = Teacher() if extract is None else extract
        self._state: _State | None = None

    @torch.inference_mode()
    def init(self, image: Frame, box: ArrayLike) -> None:
        """Take the features of the object; see `Tracker`."""
        corners = xywh_to_xyxy(checked_box(box, image))
        pixels = _pixels(image)
        fill = channel_mean(pixels)
        mapping = crop_mapping(corners, TEMPLATE_PX, TEMPLATE_FACTOR)
        template, mapping = crop(pixels, mapping, TEMPLATE_PX, fill)
        inside = mapping.apply(corners)
        columns, rows = (_covered(inside[axis], inside[axis + 2]) for axis in (0, 1))
        whole = self._map(template[None])
        stamp = whole[:, :, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        middle = STRIDE * np.array([columns.mean() + 0.5, rows.mean() + 0.5])
        self._state = _State(stamp, (inside[:2] + inside[2:]) / 2 - middle, fill, corners)

    @torch.inference_mode()
    def track(self, image: Frame) -> Output:
        """Return the best of three sizes at the best place; see `Tracker`."""
        state = self._state
        if state is None:
            raise AdapterStateError("a tracker needs init(image, box) before track(image)")
        pixels = _pixels(image)
        cut = [self._search(pixels, state, size) for size in SIZES]
        score = similarity(self._map(torch.stack([part for part, _ in cut])), state.stamp)
        score = F.interpolate(score, scale_factor=FINE, mode="bicubic", align_corners=False)[:, 0]
        changed = torch.tensor([1.0 if size == 1.0 else PENALTY for size in SIZES])
        penalised = (1 - WINDOW) * score * changed[:, None, None]
        penalised += WINDOW * hann(*score.shape[1:])
        size, row, column = np.unravel_index(int(penalised.argmax()), penalised.shape)
        # Centre of the window of the search crop that is like the stamp.
        height, width = state.stamp.shape[2:]
        place = np.array([column + 0.5, row + 0.5]) * STRIDE / FINE
        place += STRIDE / 2 * np.array([width - 1, height - 1]) + state.offset
        state.box, box = _moved(state.box, cut[size][1], place, SIZES[size], image)
        return Output(xyxy_to_xywh(box), float(score[size, row, column]))

    def _search(
        self, pixels: Tensor, state: _State, size: float
    ) -> tuple[Float[Tensor, "3 s s"], Mapping]:
        """Return the crop in which an object of `size` would look as it did in the template."""
        box = widen(state.box)
        middle, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 2 * size
        mapping = crop_mapping(
            np.concatenate([middle - half, middle + half]), SEARCH_PX, SEARCH_FACTOR
        )
        return crop(pixels, mapping, SEARCH_PX, state.fill)

    def _map(self, crops: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b c g g"]:
        """Return the features of crops with values 0 .. 255 as maps."""
        side = crops.shape[-1] // STRIDE
        return self.extract(crops / 255).transpose(1, 2).unflatten(2, (side, side))


def similarity(
    search: Float[Tensor, "b c g g"], stamp: Float[Tensor, "1 c h w"]
) -> Float[Tensor, "b 1 g2 g3"]:
    """Return the mean cosine between the cells of the stamp and of every window of its size."""
    height, width = stamp.shape[2:]
    return F.conv2d(F.normalize(search, dim=1), F.normalize(stamp, dim=1)) / (height * width)


def _covered(first: float, last: float) -> Int[np.ndarray, "n"]:
    """Return the cells of the template with their centre in a stretch, or the one nearest to it."""
    centres = STRIDE * (np.arange(TEMPLATE_PX // STRIDE) + 0.5)
    found = np.flatnonzero((centres > first) & (centres < last))
    return found if found.size else np.abs(centres - (first + last) / 2).argmin(keepdims=True)


def _moved(
    last: Boxes, mapping: Mapping, place: Float[np.ndarray, "2"], size: float, image: Frame
) -> tuple[Boxes, Boxes]:
    """Return the next state and the answer: the last box at its new place and size."""
    centre = mapping.invert(np.tile(place, 2))[:2]
    half = (last[2:] - last[:2]) / 2 * (1 - RATE + RATE * size)
    box = np.concatenate([centre - half, centre + half])
    height, width = image.shape[:2]
    seen = next_state(box, (width, height))
    return (last if seen is None else box), clip(box, width, height)


def _pixels(image: Frame) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
