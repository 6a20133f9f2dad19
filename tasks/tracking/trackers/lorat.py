"""LoRAT as a tracker: crop, predict, choose, map back; several objects in one batch.

    init     template crop -> tokens, kept for the whole video; channel mean of this frame, likewise
    track    search crop around the last box, widened to 10 px -> scores and boxes of all cells
             cell = argmax of (1 - w) sigmoid(score) + w Hann,   w = 0.45
             box of that cell -> frame, by the crop's corrected map -> clipped to the frame

The template is never updated, and boxes are not smoothed (Lin et al. 2024, 2403.05231). An object
whose box leaves the frame keeps the last one as its state, so that it is looked for there again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import ArrayLike
from torch import Tensor

from tasks.tracking.boxes import Boxes, clip, xywh_to_xyxy, xyxy_to_xywh
from tasks.tracking.geometry.crop import channel_mean, crop, crop_mapping, widen
from tasks.tracking.geometry.post import next_state, select
from tasks.tracking.geometry.raster import cells
from tasks.tracking.images import MEAN, STD
from tasks.tracking.model.lorat import LoRAT
from tasks.tracking.trackers.base import Counts, Frame, Output, checked_box
from visionlora.errors import AdapterStateError, DivergedError
from visionlora.training.device import autocast


@dataclass(eq=False)
class Slot:
    """What is remembered of one object."""

    tokens: Float[Tensor, "cells width"]
    """Of the template."""
    fill: Float[Tensor, "3"]
    """Channel mean of the first frame, which surrounds every later one."""
    box: Boxes
    """x1, y1, x2, y2 around which the next frame is searched."""


class LoRATTracker:
    """Follows objects with a LoRAT model, which is used as it is: merge it before, for speed.

    Args:
        model: The network.
        name: What results are filed under.
        device: Where the model is moved to.
        precision: fp32, or bf16 or fp16 on devices that have them.
    """

    def __init__(
        self,
        model: LoRAT,
        name: str = "lorat",
        *,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
    ) -> None:
        self.name = name
        self.device = torch.device(device)
        self.precision = precision
        self.counts = Counts(
            sum(p.numel() for p in model.parameters() if p.requires_grad),
            sum(p.numel() for p in model.parameters()),
        )
        self.model = model.to(self.device).eval()
        scale = torch.tensor(STD, device=self.device) * 255
        self._scale = scale[:, None, None]
        self._shift = torch.tensor(MEAN, device=self.device)[:, None, None] * 255
        self._slot: Slot | None = None

    def init(self, image: Frame, box: ArrayLike) -> None:
        """Start on the object in `box`; see `Tracker`."""
        self._slot = self.start(image, box)

    def track(self, image: Frame) -> Output:
        """Find the object in the next frame; see `Tracker`."""
        if self._slot is None:
            raise AdapterStateError("a tracker needs init(image, box) before track(image)")
        return self.advance([self._slot], [image])[0]

    @torch.inference_mode()
    def start(self, image: Frame, box: ArrayLike) -> Slot:
        """Return the slot of a new object; see `LockstepTracker`."""
        corners = xywh_to_xyxy(checked_box(box, image))
        shape = self.model.shape
        pixels = self._pixels(image)
        fill = channel_mean(pixels)
        mapping = crop_mapping(corners, shape.template_px, shape.template_factor)
        template, mapping = crop(pixels, mapping, shape.template_px, fill)
        mask = cells(mapping.apply(corners), shape.template_px, shape.template_grid)
        with autocast(self.precision, self.device.type):
            foreground = torch.from_numpy(mask).long().to(self.device)
            tokens = self.model.remember(self._normalised(template[None]), foreground[None])
        return Slot(tokens[0], fill, corners)

    @torch.inference_mode()
    def advance(self, slots: Sequence[Any], images: Sequence[Frame]) -> list[Output]:
        """Advance every slot by one frame; see `LockstepTracker`."""
        side, factor = self.model.shape.search_px, self.model.shape.search_factor
        pairs = [
            crop(self._pixels(image), crop_mapping(widen(slot.box), side, factor), side, slot.fill)
            for slot, image in zip(slots, images, strict=True)
        ]
        with autocast(self.precision, self.device.type):
            tokens = torch.stack([slot.tokens for slot in slots])
            search = self._normalised(torch.stack([pixels for pixels, _ in pairs]))
            prediction = self.model.locate(tokens, search)
        chosen, confidence = select(prediction.score, prediction.boxes)
        found = chosen.cpu().double().numpy() * side
        scores = confidence.cpu().tolist()
        if not np.isfinite(found).all() or not np.isfinite(scores).all():
            raise DivergedError(
                f"{self.name} predicts values that are not finite in {self.precision}"
                + ("" if self.precision == "fp32" else "; use fp32 or bf16")
            )
        outputs = []
        for slot, image, (_, mapping), box, score in zip(
            slots, images, pairs, found, scores, strict=True
        ):
            height, width = image.shape[:2]
            box = mapping.invert(box)
            following = next_state(box, (width, height))
            slot.box = slot.box if following is None else following
            outputs.append(Output(xyxy_to_xywh(clip(box, width, height)), score))
        return outputs

    def _pixels(self, image: Frame) -> UInt8[Tensor, "3 height width"]:
        """Return a frame on the device, channels first; only what is cropped is converted."""
        return torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1).to(self.device)

    def _normalised(self, crops: Float[Tensor, "n 3 side side"]) -> Float[Tensor, "n 3 side side"]:
        return (crops - self._shift) / self._scale
