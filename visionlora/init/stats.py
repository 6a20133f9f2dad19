r"""Statistics of data that initialisers start from, gathered in one pass over a few batches.

    gradient    g = mean over samples of dL/dW at the frozen weight        visionlora.init.gradients
    covariance  mean over positions of x x^T, x the layer's input          visionlora.init.inputs
    components  the strongest directions of the centred x                  visionlora.init.inputs

The model has its adapters already; they do not apply while it is looked at. Dropout is off and
batch norms use their running statistics; the loss is that of training. Batches are weighted by
their number of samples, so the gradient is that of the mean loss over all samples however they are
cut into batches. With several processes each reads its own batches and the sums are added up: all
get the statistics of all data.
"""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from visionlora.build import refuse_merged
from visionlora.errors import (
    AdapterStateError,
    ConfigError,
    DataError,
    NeverTrainedError,
    VisionLoraError,
)
from visionlora.init import cache as caching
from visionlora.init import processes
from visionlora.init.base import Components, Need, SiteStats
from visionlora.init.gradients import GradientCapture
from visionlora.init.identity import base_digest, digest_of
from visionlora.init.inputs import InputWatch, Moments, rank_of
from visionlora.init.passes import Samples, counted, mean_loss, undisturbed
from visionlora.init.settling import Settling
from visionlora.ranks.structure import Place, places_of

LossFn = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Statistics:
    """What one pass over data gathered."""

    sites: dict[str, SiteStats]
    """By the name of the place."""
    loss: float
    """Mean loss of the base model over all samples."""
    batches: int
    """Number of batches, of all processes."""
    samples: float
    """Number of samples, of all processes."""
    cached: bool = False
    """Whether a file held them."""


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    loss_fn: LossFn,
    *,
    needs: Collection[Need],
    name: str | None = None,
    count: int | None = None,
    samples: Samples | None = None,
    sketch: int | None = None,
    components: int = 0,
    steady: float | None = None,
    cache: str | Path | None = None,
) -> Statistics:
    """Gather what initialisers need to know from data, for every site of an adapter.

    The model, the random states and its gradients are afterwards as they were, also after an error.
    A weight that several layers share gets the gradient of all its uses.

    Args:
        model: a model with adapters, outside of any data-parallel wrapper.
        batches: batches of training data; with several processes, the part of this process.
        loss_fn: `loss_fn(model, batch)`, the mean loss over the samples of a batch.
        needs: which statistics; more cost memory, but no further pass.
        name: which adapter, None for all.
        count: number of batches to look at, None for all there are.
        samples: returns the number of samples of a batch; by default the length of the first
            tensor in it.
        sketch: keep only a sketch of so many columns of every gradient (`visionlora.init.sketch`).
        components: number of principal components for each rank that a site has.
        steady: read no more batches once the first r components of every input keep at least this
            cosine with those before (`visionlora.init.settling`), if nothing else is wanted. Each
            process asks for itself.
        cache: a safetensors file to read the statistics from, or else to keep them in
            (`visionlora.init.cache`). The batches are then read and held at once, to tell them from
            others.

    Raises:
        ConfigError: a wrong option, a quantised weight, a layer without input vectors, or a
            gradient that is exactly zero.
        DataError: too few batches, or a loss, gradient or input that is not finite.
        NeverTrainedError: the loss does not reach a weight.
        OutputError: the cache cannot be written.
    """
    wanted = _Wanted(frozenset(needs), samples, sketch, components, steady)
    places = _places(model, name)
    _check(model, places, wanted, count)
    if cache is None:
        return _look(model, places, batches, loss_fn, count, wanted)
    caching.check_target(cache)
    held = [batch for batch, _ in counted(batches, count, samples)]
    key = _key(model, places, held, loss_fn, wanted)
    found = caching.read(cache, key, wanted.needs, {p.name: _shape(p) for p in places})
    if not processes.anywhere(found is None):
        assert found is not None
        figures = found.figures
        number, of_samples = int(figures["batches"]), figures["samples"]
        return Statistics(found.sites, figures["loss"], number, of_samples, cached=True)
    stats = _look(model, places, held, loss_fn, None, wanted)
    if processes.first():
        figures = {"loss": stats.loss, "batches": stats.batches, "samples": stats.samples}
        caching.write(cache, key, stats.sites, figures)
    return stats


@dataclass(frozen=True)
class _Wanted:
    """What to gather; see `collect`."""

    needs: frozenset[Need]
    samples: Samples | None
    sketch: int | None
    components: int
    steady: float | None

    @property
    def inputs(self) -> bool:
        """Whether inputs of layers are looked at."""
        return bool(self.needs & {"covariance", "components"})


def _look(
    model: nn.Module,
    places: Sequence[Place],
    batches: Iterable[Any],
    loss_fn: LossFn,
    count: int | None,
    wanted: _Wanted,
) -> Statistics:
    """Make the pass, in this and all other processes."""
    capture = GradientCapture(places if "gradient" in wanted.needs else (), wanted.sketch)
    watch = InputWatch(places if wanted.inputs else ())
    settling = None
    if wanted.steady is not None and wanted.needs == {"components"}:
        settling = Settling(watch.ranked(), wanted.steady)
    figures = torch.zeros(3, dtype=torch.float64)  # weighted loss, batches, samples
    failed: VisionLoraError | None = None
    try:
        with undisturbed(model, capture.weights), capture, watch:
            for batch, size in counted(batches, count, wanted.samples):
                loss = _run(model, batch, loss_fn, capture, watch, size, int(figures[1]))
                figures += torch.tensor([loss * size, 1.0, size], dtype=torch.float64)
                if settling is not None and settling.settled():
                    break
        capture.check_reached()
    except VisionLoraError as error:
        failed = error
    if processes.anywhere(failed is not None):  # or the others would wait for this one
        raise failed or DataError("another process could not gather its statistics")
    processes.add_up([figures, *capture.tensors()])
    for moments in watch.moments():
        moments.add_up(processes.add_up)
    total, number, samples = figures.tolist()
    sites = _sites(places, wanted, capture.means(samples), watch.by_place())
    return Statistics(sites, total / samples, int(number), samples)


def _run(
    model: nn.Module,
    batch: Any,
    loss_fn: LossFn,
    capture: GradientCapture,
    watch: InputWatch,
    size: float,
    index: int,
) -> float:
    """Take in one batch and return its loss."""
    backward = bool(capture.weights)
    with torch.set_grad_enabled(backward):
        watch.looking = True
        loss = mean_loss(loss_fn, model, batch)
        watch.looking = False
    value = float(loss.detach())
    if not math.isfinite(value):
        raise DataError(f"the loss of estimation batch {index} is {value}")
    if backward:
        if not loss.requires_grad:
            raise NeverTrainedError("the loss does not depend on any adapted weight")
        capture.weight = size
        torch.autograd.backward(loss)
        capture.check(index)
    return value


def _sites(
    places: Sequence[Place],
    wanted: _Wanted,
    gradients: dict[str, Tensor],
    moments: dict[str, Moments],
) -> dict[str, SiteStats]:
    """Return the statistics of every place; those of a shared input are shared."""
    covariances: dict[int, Tensor] = {}
    directions: dict[tuple[int, int], Components] = {}
    sites = {}
    for place in places:
        own = moments.get(place.name)
        covariance = parts = None
        if own is not None and "covariance" in wanted.needs:
            if id(own) not in covariances:
                covariances[id(own)] = own.covariance()
            covariance = covariances[id(own)]
        if own is not None and "components" in wanted.needs:
            k = min(wanted.components * rank_of(place), place.site.max_rank)
            if (id(own), k) not in directions:
                directions[id(own), k] = own.components(k)
            parts = directions[id(own), k]
        sites[place.name] = SiteStats(gradients.get(place.name), covariance, parts)
    return sites


def _places(model: nn.Module, name: str | None) -> list[Place]:
    """Return the places to look at, each once however many adapters are there."""
    if isinstance(model, DistributedDataParallel):
        raise ConfigError("statistics need the model itself, not its data-parallel wrapper")
    refuse_merged(model, "collect statistics")
    places = list({place.name: place for place in reversed(places_of(model, name))}.values())[::-1]
    if not places:
        what = "adapter" if name is None else f"adapter named {name!r}"
        raise AdapterStateError(f"the model has no {what}: inject one first")
    return places


def _check(model: nn.Module, places: Sequence[Place], wanted: _Wanted, count: int | None) -> None:
    """Refuse options that mean nothing."""
    unknown = wanted.needs - set(get_args(Need))
    if unknown:
        allowed = ", ".join(get_args(Need))
        raise ConfigError(f"needs must be among {allowed}, got {sorted(unknown)}")
    for option, value in (("count", count), ("sketch", wanted.sketch)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} must be at least 1 or None, got {value}")
    if "components" in wanted.needs and wanted.components < 1:
        raise ConfigError(f"components must be at least 1, got {wanted.components}")


def _key(
    model: nn.Module,
    places: Sequence[Place],
    batches: Sequence[Any],
    loss_fn: LossFn,
    wanted: _Wanted,
) -> str:
    """Return the digest of everything that the statistics depend on."""
    sites = [(place.name, *_shape(place), rank_of(place)) for place in places]
    options = (
        sorted(wanted.needs),
        wanted.samples,
        wanted.sketch,
        wanted.components,
        wanted.steady,
    )
    known = (model,)  # a loss that encloses the model: its base is in the key already
    own = digest_of(base_digest(model), sites, options, loss_fn, batches, known=known)
    return digest_of(processes.all_of(own)).hex()


def _shape(place: Place) -> tuple[int, int]:
    return place.site.out_features, place.site.in_features
