"""Where pairs come from, as it is said on a command line.

lasot            the training set in <root>/lasot
lasot:PATH       ... in PATH
folder:PATH      own sequences
synthetic:PATH   pairs cut from the photographs below PATH
"""

from collections.abc import Sequence
from pathlib import Path

from tasks.tracking.model.variants import TrackerShape
from tasks.tracking.sequences.catalogue import TRAINING_SETS, load_training
from tasks.tracking.training.pairs import Mixture, Source, TrackPairs
from tasks.tracking.training.photographs import Photographs
from tasks.tracking.training.synthetic import SyntheticPairs
from visionlora.errors import ConfigError, nearest

SYNTHETIC = "synthetic"
OWN = (SYNTHETIC, "folder")
"""These have no usual place below the root."""


def split_spec(spec: str) -> tuple[str, str | None]:
    """Return the name and the path, if one was said, of a data set.

    Raises:
        ConfigError: an unknown name, or one that needs a path and has none.
    """
    name, _, path = spec.partition(":")
    known = (*TRAINING_SETS, SYNTHETIC)
    if name not in known:
        raise ConfigError(
            f"unknown training data {name!r}{nearest(name, known)}; known: {', '.join(known)}, "
            "each with :PATH if it is not below --root"
        )
    if name in OWN and not path:
        raise ConfigError(f"--data {name} needs a folder, as in {name}:PATH")
    return name, path or None


def load_source(
    specs: Sequence[str], root: str | Path, weights: Sequence[float] | None, shape: TrackerShape
) -> Mixture:
    """Return the mixture of some data sets.

    Args:
        specs: data sets, see above.
        root: folder below which those without a path lie.
        weights: how often each is drawn; equally by default.
        shape: sizes of the crops, for which synthetic frames are made.

    Raises:
        ConfigError: an unknown name.
        DataError: data that is missing, empty or cannot be read.
    """
    sources: list[Source] = []
    for name, path in map(split_spec, specs):
        if name == SYNTHETIC:
            unit = shape.search_px / shape.search_factor
            sources.append(SyntheticPairs(Photographs(path or ""), unit))
        else:
            sources.append(TrackPairs(name, load_training(name, path or Path(root) / name)))
    return Mixture(sources, weights)
