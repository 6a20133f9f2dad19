"""Pictures in memory: decoded once to `uint8`, prepared for evaluation, augmented in batches.

Nothing here uses a global random stream: a training batch is a function of the run seed and the
step alone, so a resumed run sees the same pixels.
"""

import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from tasks.fewshot.sampling import Item
from visionlora.errors import DataError

Augmentation = Literal["crop", "shift", "none"]

DECODE_THREADS = 4
CACHE_RATIO = 256 / 224
"""Training images keep a short side this much larger than the model's input."""
CROP_SCALE = (0.08, 1.0)
CROP_ASPECT = (3 / 4, 4 / 3)


class UnreadableImage(ValueError):
    """An image file that cannot be decoded; the message is the reason."""


@dataclass(frozen=True)
class Transform:
    """What a model expects: input size, value range, and how pictures are brought there."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    squash: bool = False
    """Resize both sides to `size` instead of resizing the short side and cropping the centre."""
    oversample: int = 1
    """Resize to this multiple of `size` first and average down: small pictures blur as the
    tiny model saw them in pretraining."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Transform":
        """Rebuild from `to_dict`."""
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


def open_image(source: Path | np.ndarray) -> Image.Image:
    """Decode to RGB, upright; 16-bit pictures are brought to 8 bits.

    Raises:
        UnreadableImage: the file is no image, truncated, or cannot be opened.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if isinstance(source, np.ndarray):
                return _upright_rgb(Image.fromarray(source))
            with Image.open(source) as image:
                return _upright_rgb(image)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UnreadableImage(str(error).splitlines()[0] if str(error) else repr(error)) from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) / 256).clip(0, 255).astype(np.uint8))
    elif image.mode == "P":
        image = image.convert("RGBA")
    return image.convert("RGB")


def evaluation_pixels(source: Path | np.ndarray, transform: Transform) -> Tensor:
    """Return `uint8 [3, size, size]`: resize the short side, crop the centre."""
    image = open_image(source)
    side = transform.size * transform.oversample
    if transform.squash:
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    else:
        image = _resize_short(image, side)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    if transform.oversample > 1:
        image = image.reduce(transform.oversample)
    return _to_tensor(image)


def cached_pixels(source: Path | np.ndarray, transform: Transform, augment: Augmentation) -> Tensor:
    """Return what a training image keeps in memory: `uint8 [3, h, w]`, large enough to crop."""
    if augment != "crop":
        return evaluation_pixels(source, transform)
    return _to_tensor(_resize_short(open_image(source), round(transform.size * CACHE_RATIO)))


def decode_all(items: Sequence[Item], decode: Any) -> Iterable[tuple[Item, Tensor | None, str]]:
    """Yield `(item, pixels or None, reason)` in order, decoding on a few threads."""

    def attempt(item: Item) -> tuple[Item, Tensor | None, str]:
        try:
            return item, decode(item.source), ""
        except UnreadableImage as error:
            return item, None, f"{item.source}: {error}"

    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        yield from pool.map(attempt, items)


def refuse_unreadable(items: Sequence[Item]) -> None:
    """Decode every picture once, also those that no run may draw.

    Raises:
        DataError: naming the first picture that cannot be read.
    """

    def seen(source: Any) -> Tensor:
        open_image(source)
        return torch.empty(0)

    for _, found, reason in decode_all(items, seen):
        if found is None:
            raise DataError(f"unreadable image {reason}")


def augment_batch(
    images: Sequence[Tensor], size: int, augment: Augmentation, generator: torch.Generator
) -> Tensor:
    """Return an augmented batch `uint8 [B, 3, size, size]`.

    `crop` is RandomResizedCrop (area 0.08-1) with a horizontal flip; `shift` moves the picture
    around by up to a sixteenth of its size, for characters, which a crop or flip would change.
    """
    if augment == "none":
        return torch.stack(list(images))
    if augment == "shift":
        reach = max(1, round(size / 16))
        moves = torch.randint(-reach, reach + 1, (len(images), 2), generator=generator).tolist()
        return torch.stack(
            [
                torch.roll(image, (dy, dx), dims=(1, 2))
                for image, (dy, dx) in zip(images, moves, strict=True)
            ]
        )
    return torch.stack([_random_crop(image, size, generator) for image in images])


def _random_crop(image: Tensor, size: int, generator: torch.Generator) -> Tensor:
    height, width = image.shape[1:]
    area, aspect, y, x, flip = torch.rand(5, generator=generator).tolist()
    target = height * width * (CROP_SCALE[0] + area * (CROP_SCALE[1] - CROP_SCALE[0]))
    log_low, log_high = np.log(CROP_ASPECT[0]), np.log(CROP_ASPECT[1])
    ratio = float(np.exp(log_low + aspect * (log_high - log_low)))
    crop_w = min(width, max(1, round((target * ratio) ** 0.5)))
    crop_h = min(height, max(1, round((target / ratio) ** 0.5)))
    top, left = int(y * (height - crop_h + 1)), int(x * (width - crop_w + 1))
    crop = image[None, :, top : top + crop_h, left : left + crop_w]
    crop = F.interpolate(crop, (size, size), mode="bicubic", antialias=True)[0]
    return crop.flip(2) if flip < 0.5 else crop


def _resize_short(image: Image.Image, side: int) -> Image.Image:
    scale = side / min(image.size)
    size = (max(side, round(image.width * scale)), max(side, round(image.height * scale)))
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
