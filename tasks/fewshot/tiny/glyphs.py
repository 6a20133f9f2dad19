"""Pictures for pretraining: characters drawn by fonts, bent and blurred until they look written.

Ten digits and 26 capital letters, drawn with three text faces of OpenCV and the outline font that
Pillow carries, then made thinner or thicker, slanted, turned, scaled and bent elastically.
Most are cropped to their ink and averaged to 8x8 pixels, which is how scikit-learn's handwritten
digits were made; the rest keep a margin. All randomness comes from one private generator.
"""

from dataclasses import dataclass
from typing import Any, Final

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from tasks.fewshot.tiny.model import prepare_images

CHARACTERS: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGIT_NAMES: Final = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
)  # fmt: skip
CLASS_NAMES: Final = (*DIGIT_NAMES, *(f"letter {letter}" for letter in CHARACTERS[10:]))

FACES: Final = (
    cv2.FONT_HERSHEY_SIMPLEX,
    cv2.FONT_HERSHEY_PLAIN,
    cv2.FONT_HERSHEY_SCRIPT_SIMPLEX,
)
"""OpenCV 4 draws these as strokes; OpenCV 5 as Rubik: regular, heavy and italic."""

_CANVAS: Final = 128
_GLYPH_HEIGHT: Final = 72

# Floats (height, width), ink 1 on 0.
Picture = NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class GlyphSettings:
    """How far a drawn glyph may stray from its font."""

    outline_font: float = 0.5
    """Share drawn with Pillow's font, the one that is the same under every OpenCV."""
    thinnest: int = -6
    """Most pixels of 128 by which strokes are made thinner."""
    thickest: int = 2
    """Most pixels of 128 by which strokes are made thicker."""
    rotation: float = 20.0
    """Largest turn in degrees, either way."""
    shear: float = 0.5
    """Largest slant, either way."""
    scale: tuple[float, float] = (0.7, 1.15)
    """Range of the size."""
    stretch: float = 0.25
    """Largest relative widening or narrowing."""
    elastic: float = 6.0
    """Largest standard deviation of the 4x4 displacement grid, in pixels of 128."""
    cropped: float = 0.85
    """Share of glyphs cropped to their ink and averaged to 8x8."""
    gain: tuple[float, float] = (0.7, 1.3)
    """Range of the brightness factor."""
    noise: float = 0.03
    """Standard deviation of the pixel noise."""


def render_glyphs(
    count: int, seed: int, settings: GlyphSettings | None = None
) -> tuple[Tensor, Tensor]:
    """Draw `count` glyphs, the classes in turn: `(count, 3, 16, 16)` in [-1, 1], and labels."""
    settings = settings or GlyphSettings()
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % len(CHARACTERS)
    faces = [_draw_all(face) for face in FACES]
    outlines = _draw_all(None)
    pictures = []
    for label in labels:
        outlined = generator.random() < settings.outline_font
        font = outlines if outlined else faces[generator.integers(len(faces))]
        pictures.append(_vary(font[label], settings, generator))
    return torch.stack(pictures), torch.from_numpy(labels)


def _vary(glyph: Picture, settings: GlyphSettings, generator: np.random.Generator) -> Tensor:
    pixels = int(generator.integers(settings.thinnest, settings.thickest + 1))
    glyph = _restroke(glyph, pixels)
    glyph = _bend(glyph, settings, generator)
    if generator.random() < settings.cropped:
        glyph = cv2.resize(_crop_to_ink(glyph), (8, 8), interpolation=cv2.INTER_AREA)
    else:
        glyph = cv2.resize(glyph, (32, 32), interpolation=cv2.INTER_AREA)
    glyph = glyph * generator.uniform(*settings.gain)
    glyph = glyph + generator.normal(0, settings.noise, glyph.shape)
    return prepare_images(torch.from_numpy(glyph.clip(0, 1).astype(np.float32))[None])


def _draw_all(face: int | None) -> list[Picture]:
    """Draw every character with one face (`None`: Pillow's font), centred, at one size."""
    draw = _draw_pillow if face is None else lambda character: _draw_opencv(character, face)
    return [_centre(draw(character)) for character in CHARACTERS]


def _draw_opencv(character: str, face: int) -> Picture:
    canvas = np.zeros((256, 256), np.uint8)
    (width, height), _ = cv2.getTextSize(character, face, 1.0, 1)
    size = 96 / max(width, height, 1)
    cv2.putText(canvas, character, (64, 192), face, size, 255, 6, cv2.LINE_AA)
    return canvas.astype(np.float32) / 255


def _draw_pillow(character: str) -> Picture:
    canvas = Image.new("L", (256, 256))
    font = ImageFont.load_default(96)
    ImageDraw.Draw(canvas).text((64, 64), character, fill=255, font=font)
    return np.asarray(canvas, np.float32) / 255


def _centre(drawn: Picture) -> Picture:
    ink = _crop(drawn)
    factor = _GLYPH_HEIGHT / max(ink.shape)
    height, width = (max(1, round(side * factor)) for side in ink.shape)
    resized = cv2.resize(ink, (width, height), interpolation=cv2.INTER_AREA)
    canvas = np.zeros((_CANVAS, _CANVAS), np.float32)
    top, left = (_CANVAS - height) // 2, (_CANVAS - width) // 2
    canvas[top : top + height, left : left + width] = resized
    return canvas


def _restroke(glyph: Picture, pixels: int) -> Picture:
    if pixels == 0:
        return glyph
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (abs(pixels) + 1, abs(pixels) + 1))
    changed = (cv2.dilate if pixels > 0 else cv2.erode)(glyph, kernel)
    # A stroke thinner than the kernel would vanish: keep the glyph as it was.
    return changed if changed.sum() > 0.25 * glyph.sum() else glyph


def _bend(glyph: Picture, settings: GlyphSettings, generator: np.random.Generator) -> Picture:
    """Apply the inverse map of turn, slant, size and elastic displacement in one resampling."""
    angle = np.deg2rad(generator.uniform(-settings.rotation, settings.rotation))
    shear = generator.uniform(-settings.shear, settings.shear)
    size = generator.uniform(*settings.scale)
    stretch = 1 + generator.uniform(-settings.stretch, settings.stretch)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    forward = turn @ np.array([[1, shear], [0, 1]]) @ np.diag([size * stretch, size / stretch])
    centre = (_CANVAS - 1) / 2
    rows, columns = np.mgrid[:_CANVAS, :_CANVAS] - centre
    source = np.tensordot(np.linalg.inv(forward), np.stack([columns, rows]), 1) + centre
    grid = generator.normal(0, generator.uniform(0, settings.elastic), (4, 4, 2))
    shift = cv2.resize(grid, (_CANVAS, _CANVAS), interpolation=cv2.INTER_CUBIC)
    x, y = (source + shift.transpose(2, 0, 1)).astype(np.float32)
    return cv2.remap(glyph, x, y, cv2.INTER_LINEAR)


def _crop_to_ink(glyph: Picture) -> Picture:
    """Crop to the ink, then pad the narrow side so that the aspect ratio survives."""
    ink = _crop(glyph)
    height, width = ink.shape
    side = max(height, width)
    canvas = np.zeros((side, side), np.float32)
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = ink
    return canvas


def _crop(glyph: Picture) -> Picture:
    rows, columns = np.nonzero(glyph > 0.2)
    return glyph[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
