"""Trackers by name: `load_tracker("tiny")`, `load_tracker("lorat-b-224", weights=FILE)`, ...

A LoRAT model is loaded, counted, and its adapters are merged into the weights and taken out:
tracking costs what the plain backbone costs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

import visionlora as vl
from tasks.tracking.model import VARIANTS, LoRAT, build
from tasks.tracking.model.backbone import RANDOM
from tasks.tracking.model.embedding import PosMode
from tasks.tracking.trackers.base import Counts, Tracker
from tasks.tracking.trackers.lorat import LoRATTracker
from visionlora.errors import ConfigError, nearest
from visionlora.record import hosts_of
from visionlora.training.device import pick_device

__all__ = ["TrackerConfig", "load_tracker", "parameter_counts", "tracker_names"]

TINY = "tiny"
TINY_WEIGHTS = Path(__file__).with_name("tiny.safetensors")
"""What was trained on the embedded backbone: the tracker that comes with the project."""


def _static() -> Any:
    from tasks.tracking.trackers.static import Static

    return Static()


def _correlation() -> Any:
    from tasks.tracking.trackers.correlation import Correlation

    return Correlation()


def _features() -> Any:
    from tasks.tracking.trackers.features import FeatureCorrelation

    return FeatureCorrelation()


BASELINES: dict[str, Callable[[], Any]] = {
    "static": _static,
    "ncc": _correlation,
    "lite0": _features,
}
"""Trackers without training. They run on the CPU and are imported when they are asked for."""


@dataclass(frozen=True, kw_only=True)
class TrackerConfig:
    """Which tracker runs, and where: what all commands that track have in common."""

    tracker: str = TINY
    """tiny, lorat-b-224 and the other sizes, or a baseline: static, ncc, lite0."""
    weights: str | None = None
    """A trained tracker: a released LoRAT file, or adapter.safetensors of a training run."""
    backbone_weights: str | None = None
    """Frozen weights of lorat-*: hub (the default), a file of DINOv2, or random (for timing).
    tiny brings its own."""
    pos_mode: PosMode = "resample"
    """native_slice for weights that were trained with the official code's variant on timm."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What the transformer computes in; bf16 is the slower one on most CPUs."""

    def load(self) -> Tracker:
        """Return the tracker."""
        return load_tracker(
            self.tracker,
            weights=self.weights,
            backbone_weights=self.backbone_weights,
            pos_mode=self.pos_mode,
            device=self.device,
            precision=self.precision,
        )


def tracker_names() -> tuple[str, ...]:
    """Return the names of all trackers."""
    return tuple(dict.fromkeys((TINY, *VARIANTS, *BASELINES)))


def load_tracker(
    name: str = TINY,
    *,
    weights: str | Path | None = None,
    backbone_weights: str | Path | None = None,
    pos_mode: PosMode = "resample",
    device: str = "auto",
    precision: str = "fp32",
) -> Tracker:
    """Return a tracker that is ready for `init`.

    Args:
        name: One of `tracker_names()`.
        weights: A trained LoRAT; `tiny` has its own.
        backbone_weights: Where the frozen weights come from, see `tasks/tracking/model`.
        pos_mode: How positions come to the search grid, see `tasks/tracking/model/embedding.py`.
        device: auto, cpu, cuda, cuda:N or mps.
        precision: fp32, bf16 or fp16.

    Raises:
        ConfigError: an unknown name, or options that do not go together.
        VisionLoraError: weights that cannot be read, or belong to another size or rank.
    """
    if name not in tracker_names():
        raise ConfigError(
            f"unknown tracker {name!r}{nearest(name, tracker_names())}; "
            f"known: {', '.join(tracker_names())}"
        )
    if name in BASELINES:
        if weights is not None or backbone_weights is not None:
            raise ConfigError(f"the baseline {name!r} takes no weights")
        if device not in ("auto", "cpu") or precision != "fp32":
            raise ConfigError(
                f"the baseline {name!r} runs on the cpu in fp32, not on {device} in {precision}"
            )
        baseline: Tracker = BASELINES[name]()
        return baseline
    where = pick_device(device)
    if precision == "fp16" and where.type == "cpu":
        raise ConfigError("precision fp16 needs a cuda or mps device; use bf16 or fp32 on a cpu")
    if weights is None and name == TINY and backbone_weights is None:
        if not TINY_WEIGHTS.is_file():
            raise ConfigError(
                f"{TINY_WEIGHTS} is missing; give --weights of a training run, or "
                "--backbone-weights random (untrained, for timing)"
            )
        weights = TINY_WEIGHTS
    if weights is None and backbone_weights != RANDOM:
        raise ConfigError(
            f"{name} needs --weights: a released LoRAT file or the adapter of a training run "
            "(with --backbone-weights random it runs untrained, for timing)"
        )
    model = build(name, weights=weights, backbone_weights=backbone_weights, pos_mode=pos_mode)
    tracker = LoRATTracker(model, name, device=where, precision=precision)
    merge_away(model)
    return tracker


def parameter_counts(tracker: Tracker) -> Counts:
    """Return how many parameters a tracker has; a baseline's network is not trained here."""
    known: Counts | None = getattr(tracker, "counts", None)
    if known is not None:
        return known
    networks = [item for item in vars(tracker).values() if isinstance(item, nn.Module)]
    return Counts(0, sum(p.numel() for network in networks for p in network.parameters()))


@torch.no_grad()
def merge_away(model: LoRAT) -> None:
    """Put the adapters' changes into the weights and take the adapters out.

    Methods that route by input stay: they have no change that fits every frame.
    """
    slots = [slot for host in hosts_of(model).values() for slot in host.all_slots()]
    if slots and all(slot.delta.mergeable for slot in slots):
        vl.eject(model, merge=True)
