"""A frame with the box and what the tracker thinks of it."""

import cv2
import numpy as np
from jaxtyping import Float

from tasks.tracking.images import Frame

GREEN, BLACK = (57, 255, 20), (0, 0, 0)
LINE_SHARE = 250
"""Lines are as wide as the picture's shorter side divided by this, at least 1 pixel."""


def annotate(image: Frame, box: Float[np.ndarray, "4"], text: str) -> Frame:
    """Return a copy of a frame with the box `x, y, w, h` and a line of text in its corner."""
    drawn = np.ascontiguousarray(image).copy()
    height, width = image.shape[:2]
    line = max(1, round(min(height, width) / LINE_SHARE))
    if box[2] > 0 and box[3] > 0:
        # The box ends between pixels: its last pixel is the one before its right and lower edge.
        first = (round(box[0]), round(box[1]))
        last = (
            max(first[0], round(box[0] + box[2]) - 1),
            max(first[1], round(box[1] + box[3]) - 1),
        )
        cv2.rectangle(drawn, first, last, BLACK, line + 2)
        cv2.rectangle(drawn, first, last, GREEN, line)
    else:
        text += "  lost"
    scale = max(0.4, min(height, width) / 700)
    place = (round(12 * scale), round(30 * scale))
    for colour, stroke in ((BLACK, line + 1), (GREEN, line)):
        cv2.putText(
            drawn, text, place, cv2.FONT_HERSHEY_SIMPLEX, scale, colour, stroke, cv2.LINE_AA
        )
    return drawn
