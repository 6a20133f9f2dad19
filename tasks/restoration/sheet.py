"""A sheet of pictures: rows of cells, under each cell its caption; pixels stay as they are."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

Cell = tuple[UInt8[np.ndarray, "h w 3"], str]
"""A picture and what is written below it; a caption may have several lines."""
TEXT, LINE, GAP = 12, 15, 6
"""Size of letters, height of a line, and space between cells, in pixels."""
INDENT = "    "
"""Before the second and later parts of a line that is broken."""
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def sheet(rows: Sequence[Sequence[Cell]]) -> UInt8[np.ndarray, "h w 3"]:
    """Put cells side by side; columns are as wide as their widest picture."""
    font = ImageFont.load_default(TEXT)
    columns = max(map(len, rows))
    widths = [max(row[at][0].shape[1] for row in rows if at < len(row)) for at in range(columns)]
    texts = [
        [wrapped(caption, width, font) for (_, caption), width in zip(row, widths, strict=False)]
        for row in rows
    ]
    heights = [
        max(picture.shape[0] for picture, _ in row) + LINE * max(map(len, lines)) + 2 * GAP
        for row, lines in zip(rows, texts, strict=True)
    ]
    size = (sum(widths) + GAP * (columns + 1), sum(heights) + GAP)
    canvas = Image.new("RGB", size, WHITE)
    draw = ImageDraw.Draw(canvas)
    top = GAP
    for row, lines, height in zip(rows, texts, heights, strict=True):
        left = GAP
        below = top + max(picture.shape[0] for picture, _ in row) + GAP // 2
        for (picture, _), text, width in zip(row, lines, widths, strict=False):
            canvas.paste(Image.fromarray(np.ascontiguousarray(picture)), (left, top))
            for number, line in enumerate(text):
                draw.text((left, below + number * LINE), line, fill=BLACK, font=font)
            left += width + GAP
        top += height
    return np.asarray(canvas)


def wrapped(
    caption: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> list[str]:
    """Break the lines of a caption between words where they are wider than `width` pixels."""
    lines = []
    for whole in caption.splitlines():
        line = ""
        for word in whole.split():
            longer = f"{line} {word}" if line else word
            if line and font.getlength(longer) > width:
                lines.append(line)
                longer = INDENT + word
            line = longer
        lines.append(line)
    return lines
