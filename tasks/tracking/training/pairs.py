"""Which two frames make a training pair.

    data set      by weight
    sequence      uniform,  then one of its objects, uniform
    template z    uniform over the frames in which the object is there
    search x      uniform over such frames with 0 < |x - z| <= 100, or z itself if there is none

The search may lie before the template. A still image pairs with itself; only crops and colours
tell its two halves apart then. There are no pairs without the object.

Sampling of LoRAT, 2024, arXiv:2403.05231.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Float

from tasks.tracking.boxes import xywh_to_xyxy
from tasks.tracking.images import Frame, read_image
from tasks.tracking.sequences.sequence import Track
from visionlora.errors import DataError

MAX_GAP = 100
"""Most frames between template and search."""


class View(NamedTuple):
    """A frame and where the object is in it."""

    image: Frame
    box: Float[np.ndarray, "4"]
    """`xyxy` in pixels of the frame."""


class Pair(NamedTuple):
    """Two views of one object."""

    template: View
    search: View


class Source(Protocol):
    """What pairs come from."""

    name: str
    notes: tuple[str, ...]
    """What the user should know: what was found, and what was left out."""

    def pair(self, rng: np.random.Generator) -> Pair:
        """Draw a pair, the same one for the same state of `rng`.

        Raises:
            DataError: a file that was drawn cannot be read.
        """


class TrackPairs:
    """Pairs from annotated sequences on disk.

    Args:
        name: name of the data set.
        tracks: its tracks, those over the same frames being the objects of one sequence; those that
            never show their object are left out.

    Raises:
        DataError: no track shows its object.
    """

    def __init__(self, name: str, tracks: Sequence[Track]) -> None:
        self.name = name
        usable = [track for track in tracks if track.exists.any()]
        if not usable:
            why = f"none of its {len(tracks)} tracks has a box" if tracks else "it has no tracks"
            raise DataError(f"nothing to train on in {name}: {why}")
        by_sequence: dict[Path, list[Track]] = {}
        for track in usable:
            by_sequence.setdefault(track.frames[0], []).append(track)
        self.sequences = list(by_sequence.values())
        self.notes: tuple[str, ...] = (f"{name}: {len(self.sequences)} sequences",)
        if len(usable) < len(tracks):
            self.notes += (f"{name}: {len(tracks) - len(usable)} tracks without a box left out",)

    def pair(self, rng: np.random.Generator) -> Pair:
        """Draw a pair and read its frames."""
        track, z, x = self.draw(rng)
        template = View(read_image(track.frames[z]), xywh_to_xyxy(track.boxes[z]))
        if x == z:
            return Pair(template, template)
        return Pair(template, View(read_image(track.frames[x]), xywh_to_xyxy(track.boxes[x])))

    def draw(self, rng: np.random.Generator) -> tuple[Track, int, int]:
        """Draw a track, its template frame and its search frame."""
        sequence = self.sequences[rng.integers(len(self.sequences))]
        track = sequence[rng.integers(len(sequence))]
        return track, *draw_frames(np.flatnonzero(track.exists), rng)


def draw_frames(shown: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    """Draw template and search from the sorted frames in which the object is there."""
    z = int(rng.choice(shown))
    near = shown[(np.abs(shown - z) <= MAX_GAP) & (shown != z)]
    return z, int(rng.choice(near)) if len(near) else z


class Mixture:
    """Pairs from several sources, each with its weight.

    Args:
        sources: at least one.
        weights: one positive number for each, equal by default.

    Raises:
        DataError: another number of weights, or weights that are not positive.
    """

    name = "mixture"

    def __init__(self, sources: Sequence[Source], weights: Sequence[float] | None = None) -> None:
        weights = [1.0] * len(sources) if weights is None else list(weights)
        if len(weights) != len(sources) or not all(0 < w < float("inf") for w in weights):
            names = ", ".join(source.name for source in sources)
            raise DataError(f"data weights need one positive number for each of {names}: {weights}")
        self.sources = list(sources)
        self.notes = tuple(note for source in sources for note in source.notes)
        self.shares = np.asarray(weights) / sum(weights)

    def pair(self, rng: np.random.Generator) -> Pair:
        """Draw a source by weight and a pair from it."""
        return self.sources[rng.choice(len(self.sources), p=self.shares)].pair(rng)
