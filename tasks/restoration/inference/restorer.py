"""A base network, with the adapter of a task if there is one, ready to restore pictures.

The adapter is folded into the weights where its method allows it, so that it costs nothing. A
picture for which the memory does not suffice is tried again in tiles of half the side.
"""

import dataclasses
import sys
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Shaped

import visionlora as vl
from tasks.restoration.inference.restore import RestoreOptions, restore
from tasks.restoration.inference.tiling import OVERLAP, OnTile
from tasks.restoration.networks.files import load_base
from tasks.restoration.networks.local_pool import local_means
from tasks.restoration.training.adapter_folder import WEIGHTS, Card, load_adapter
from visionlora.errors import AdapterStateError, ConfigError, DataError
from visionlora.training.device import autocast, pick_device

SMALLEST = 64
"""Side of tiles below which memory is not asked for again."""


@dataclass(frozen=True, kw_only=True)
class RestorerConfig:
    """Which network restores, and how it is run."""

    base: str = "tiny"
    """tiny, a base file, or NETWORK:random."""
    adapter: str | None = None
    """Folder that `adapt` wrote; by default the base restores alone."""
    tile: int | None = None
    """Side of tiles, 0 for whole pictures; by default 512 above 1.1 megapixels."""
    overlap: int = OVERLAP
    """Pixels that neighbouring tiles share."""
    ensemble: bool = False
    """Average over the eight turns and mirrorings of a picture: better, and eight times slower."""
    local_means: int | None = None
    """Side of the patches a NAFNet was trained on: means of windows of 1.5 times it, not of all."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision in which the network computes."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""

    def __post_init__(self) -> None:
        """Check the numbers."""
        self.options()
        if self.local_means is not None and self.local_means < 1:
            raise ConfigError(f"--local-means must be at least 1, got {self.local_means}")

    def options(self) -> RestoreOptions:
        """Return how the network is run."""
        return RestoreOptions(tile=self.tile, overlap=self.overlap, ensemble=self.ensemble)


class Restorer:
    """The network.

    Args:
        config: which one, and how it is run.

    Raises:
        VisionLoraError: the base or the adapter cannot be used, or is of another base.
    """

    def __init__(self, config: RestorerConfig) -> None:
        self.device = pick_device(config.device)
        self.base = load_base(config.base)
        self.card: Card | None = None
        self.adapter_file: Path | None = None
        if config.adapter is not None:
            self.card = load_adapter(self.base, config.adapter)
            self.adapter_file = Path(config.adapter).expanduser() / WEIGHTS
            with suppress(AdapterStateError):  # of a method whose change depends on the picture
                vl.merge(self.base.model)
        self.base.model.to(self.device).eval()
        self.options = config.options()
        self.local_means = config.local_means
        with self._local():
            pass  # refuses a network that has no such means
        self.precision = config.precision

    def __call__(
        self, pixels: Shaped[np.ndarray, "h w 3"], on_tile: OnTile | None = None
    ) -> Shaped[np.ndarray, "h w 3"]:
        """Return the restored picture, see `restore`.

        Raises:
            DataError: see `restore`; or the memory does not suffice for the smallest tiles.
        """
        while True:
            try:
                with autocast(self.precision, self.device.type), self._local():
                    return restore(
                        *(self.base.model, pixels, self.options),
                        device=self.device,
                        on_tile=on_tile,
                    )
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
            self._use_smaller_tiles(pixels)

    def _local(self) -> AbstractContextManager[object]:
        """Return the context of local means, if they are wanted."""
        return local_means(self.base.model, self.local_means) if self.local_means else nullcontext()

    def _use_smaller_tiles(self, pixels: Shaped[np.ndarray, "h w 3"]) -> None:
        before = self.options.side(*pixels.shape[:2])
        side = before // 2 // 8 * 8
        if side < SMALLEST:
            raise DataError(f"the memory of {self.device} does not suffice for {before} px a side")
        overlap = min(self.options.overlap, side // 4)
        self.options = dataclasses.replace(self.options, tile=side, overlap=overlap)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"note: out of memory, going on in tiles of {side} px", file=sys.stderr, flush=True)


def _is_out_of_memory(error: Exception) -> bool:
    """Tell whether memory was asked for in vain; on the CPU only the words of the error say so."""
    known = isinstance(error, torch.cuda.OutOfMemoryError | MemoryError)
    return known or "not enough memory" in str(error) or "can't allocate memory" in str(error)
