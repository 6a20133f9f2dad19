"""Photographs of a folder as one array of bytes, from which crops are cut without decoding.

    photographs.json     [{file, height, width, offset}, ...] and where the bytes begin
    photographs.u8       the pixels of all of them, one after the other, RGB

Most of what is no photograph is left out by a simple rule: a drawing has long runs of equal pixels,
which the noise of a camera breaks up. The same picture in several sizes is taken once. Pictures
with transparent parts are cut-outs of objects: each is pasted on pieces of photographs, so that
things are seen before many grounds.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from visionlora.errors import DataError
from visionlora.io.atomic import write_atomically, write_text_atomically

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
LONGEST = 1600
"""Pixels of the longer side that are kept; more would be crops of skies and lawns."""
SMALLEST = 96
FLAT, FLAT_CUTOUT = 0.65, 0.4
"""The largest share of pixels equal to their right neighbour in a photograph, and in a cut-out."""
SAME = 0.97
"""Correlation of two thumbnails from which they are one picture."""
SCENE = 448
"""Side of a scene that an object was pasted into."""
INDEX, PIXELS = "photographs.json", "photographs.u8"

Picture = UInt8[np.ndarray, "h w 3"]


@dataclass(frozen=True)
class Entry:
    """Where a photograph is."""

    file: str
    height: int
    width: int
    offset: int


class Photographs:
    """The stored photographs; indexing gives views of a memory map.

    Raises:
        DataError: the folder holds none.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            listed = json.loads((Path(folder) / INDEX).read_text(encoding="utf-8"))
            self.entries = [Entry(**item) for item in listed]
            self._pixels = np.memmap(Path(folder) / PIXELS, np.uint8, mode="r")
        except (OSError, ValueError, TypeError) as error:
            raise DataError(
                f"no prepared photographs in {folder}: scripts/make_tiny_vit.py photographs "
                "makes them from pictures"
            ) from error

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> Picture:
        entry = self.entries[index]
        end = entry.offset + entry.height * entry.width * 3
        return self._pixels[entry.offset : end].reshape(entry.height, entry.width, 3)


def prepare(
    source: Path,
    output: Path,
    *,
    scenes: int = 2,
    skip: frozenset[str] = frozenset(),
    seed: int = 0,
) -> list[Entry]:
    """Store the photographs below `source`, and scenes with the cut-outs below it.

    Args:
        scenes: how many grounds every cut-out is pasted on.
        skip: names of files or folders to leave out.

    Raises:
        DataError: there is no photograph.
    """
    rng = np.random.default_rng(seed)
    found: list[tuple[str, Picture]] = []
    cutouts: list[tuple[str, UInt8[np.ndarray, "h w 4"]]] = []
    thumbnails: list[Float[np.ndarray, n]] = []
    for name, picture in _pictures(source, skip):
        if picture.shape[2] == 4:
            cutouts.append((name, picture))
            continue
        thumbnail = _thumbnail(picture)
        if all(float(thumbnail @ other) < SAME for other in thumbnails):
            thumbnails.append(thumbnail)
            found.append((name, picture))
    if not found:
        raise DataError(f"{source} holds no photograph (pictures: {', '.join(SUFFIXES)})")
    grounds = [picture for _, picture in found]
    for name, cutout in cutouts:
        for number in range(scenes):
            ground = grounds[int(rng.integers(len(grounds)))]
            found.append((f"{name}#{number}", paste(cutout, ground, rng)))
    return _store(found, output)


def paste(cutout: UInt8[np.ndarray, "h w 4"], ground: Picture, rng: np.random.Generator) -> Picture:
    """Return a square piece of `ground` with the object on it, not larger than the object is."""
    side = int(min(ground.shape[:2]) * rng.uniform(0.4, 1.0))
    top, left = (int(rng.integers(0, n - side + 1)) for n in ground.shape[:2])
    piece = Image.fromarray(ground[top : top + side, left : left + side])
    scene = piece.resize((SCENE, SCENE), Image.Resampling.BICUBIC)
    height, width = cutout.shape[:2]
    factor = min(rng.uniform(0.4, 0.95) * SCENE / max(height, width), 1.5)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    thing = Image.fromarray(cutout).resize(size, Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
        thing = thing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    place = (int(rng.integers(0, SCENE - size[0] + 1)), int(rng.integers(0, SCENE - size[1] + 1)))
    scene.paste(thing, place, thing)
    return np.asarray(scene)


def flat_share(picture: Picture, where: Bool[np.ndarray, "h w"] | None = None) -> float:
    """Return the share of pixels that are equal to their right neighbour."""
    equal = (picture[:, 1:] == picture[:, :-1]).all(axis=-1)
    inside = equal if where is None else equal[where[:, 1:]]
    return float(inside.mean()) if inside.size else 1.0


def _pictures(source: Path, skip: frozenset[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and pixels of photographs (3 channels) and of cut-outs of photographs (4)."""
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if path.suffix.lower() not in SUFFIXES or path.is_symlink() or skip & set(name.parts):
            continue
        try:
            with Image.open(path) as image:
                if min(image.size) < SMALLEST:
                    continue
                # RGBA only where transparency is used: paletted pictures have it in many forms.
                through = image.has_transparency_data
                pixels = np.asarray(image.convert("RGBA" if through else "RGB"))
        except (OSError, ValueError, Image.DecompressionBombError):
            continue
        if through:
            solid = pixels[..., 3] > 250
            if 0.05 < solid.mean() < 0.98 and flat_share(pixels[..., :3], solid) < FLAT_CUTOUT:
                yield str(name), _trimmed(pixels)
        elif flat_share(pixels[::8]) < FLAT:
            yield str(name), _shrunk(pixels)


def _shrunk(picture: Picture) -> Picture:
    height, width = picture.shape[:2]
    factor = LONGEST / max(height, width)
    if factor >= 1:
        return picture
    size = (round(width * factor), round(height * factor))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))


def _trimmed(cutout: UInt8[np.ndarray, "h w 4"]) -> UInt8[np.ndarray, "h2 w2 4"]:
    """Return the rectangle of what can be seen, of the size of a scene at most."""
    rows, columns = (np.flatnonzero((cutout[..., 3] > 0).any(axis=axis)) for axis in (1, 0))
    image = Image.fromarray(cutout[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])
    image.thumbnail((SCENE, SCENE), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _thumbnail(picture: Picture) -> Float[np.ndarray, "n"]:
    """Return a grey thumbnail of mean 0 and length 1."""
    small = Image.fromarray(picture).convert("L").resize((16, 16), Image.Resampling.BOX)
    values = np.asarray(small, dtype=np.float64).ravel()
    values -= values.mean()
    return values / max(float(np.linalg.norm(values)), 1e-9)


def _store(pictures: list[tuple[str, Picture]], output: Path) -> list[Entry]:
    entries, offset = [], 0
    for name, picture in pictures:
        height, width = picture.shape[:2]
        entries.append(Entry(name, height, width, offset))
        offset += picture.size

    def write(path: Path) -> None:
        with path.open("wb") as stream:
            for _, picture in pictures:
                stream.write(np.ascontiguousarray(picture).tobytes())

    write_atomically(output / PIXELS, write)
    listed = json.dumps([asdict(entry) for entry in entries], indent=0)
    write_text_atomically(output / INDEX, listed)
    return entries
