r"""LoRA-Squeeze: train at a high rank, then compress (Vulić et al. 2026, arXiv 2602.10993).

The product B A of every site is replaced by its best approximation of a smaller rank, computed from
the factors alone (`visionlora.ranks.factors`). Ranks are the same everywhere (`rank`), or as large
as a share of each site's squared singular values demands (`energy`), or they share one `budget`:
the largest singular values of all sites, scale included, are kept. A site that is left with rank 0
is taken out of the adapter; one that trains more than the pair keeps rank 1.

`keep="scaling"`: the factor s in front of B A stays and alpha follows the rank.
`keep="alpha"`: alpha stays, and the singular values are multiplied by s_old / s_new.

Post-Squeeze is `squeeze` after training. Cont-Squeeze is to train 5 to 10 % longer after it, with
the old optimiser handed to `squeeze` or a new one. In-Squeeze is the method `squeeze-lora`.

Methods with a trained pair (LoRA, DoRA, ...) or one per expert (MoE-LoRA) keep their kind and
whatever else they train; error and energy are then those of the pairs. Where a constant pair is
taken off (`visionlora.methods.parts.pair`), the difference is compressed, and no constant is left.
Others with a factor form become plain LoRA, exactly.
"""

import dataclasses
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from visionlora import record
from visionlora.build import refuse_merged
from visionlora.config import LowRankConfig
from visionlora.errors import AdapterStateError, ConfigError
from visionlora.hosts import find_adapter
from visionlora.methods.base import Delta
from visionlora.methods.parts.noise import without_noise
from visionlora.methods.parts.pair import PairConfig, PairDelta
from visionlora.ranks.allocation import Keep, Request, SqueezeReport, report, resized
from visionlora.ranks.factors import Triples
from visionlora.ranks.finalize import plain_config
from visionlora.ranks.optimizer import add, drop, group_of, replace
from visionlora.ranks.structure import Place, places_of
from visionlora.record import adapter_names


@dataclass(frozen=True)
class _Pair:
    """One site with the pair that is compressed."""

    place: Place
    old: Delta
    carries: bool
    """The method is a trained pair that takes another rank; otherwise it becomes plain LoRA."""
    up: Tensor
    down: Tensor

    @property
    def size(self) -> float:
        """Factor between singular values of the pair and those of the change."""
        return abs(self.old.scale) * (self.old.fold**0.5 if self.carries else 1.0)

    @property
    def removable(self) -> bool:
        """Whether rank 0 means no change."""
        return not self.carries or len(list(self.old.parameters())) == 2


def squeeze(
    model: nn.Module,
    *,
    rank: int | None = None,
    energy: float | None = None,
    budget: int | None = None,
    name: str | None = None,
    keep: Keep = "scaling",
    optimizer: torch.optim.Optimizer | None = None,
) -> SqueezeReport:
    """Compress an adapter of a model in place; give one of `rank`, `energy` and `budget`.

    Args:
        model: a model with the adapter, unmerged.
        rank: rank of every site; a site whose rank is smaller keeps it.
        energy: share of the squared singular values that every site keeps, in (0, 1].
        budget: sum of the ranks of all sites.
        name: which adapter; may be omitted if there is one.
        keep: what stays as it was, the scaling factor or alpha.
        optimizer: an optimiser over the old tensors; it gets the new ones in their place, without
            their moments.

    Returns:
        Ranks and errors per site.

    Raises:
        ConfigError: not exactly one of the three, a value out of range, or an optimiser that does
            not hold the adapter; nothing is changed then.
        AdapterStateError: no such adapter, it is merged, or its method has no factor form.
    """
    request = Request(rank, energy, budget)
    if keep not in get_args(Keep):
        raise ConfigError(f"squeeze: keep must be one of {get_args(Keep)}, got {keep!r}")
    refuse_merged(model, "squeeze")
    name = choose(model, name)
    pairs = [_pair(place) for place in places_of(model, name)]
    shared = list(dict.fromkeys(part for pair in pairs for part in pair.old.shared))
    old = [p for module in [*(pair.old for pair in pairs), *shared] for p in _trained(module)]
    if optimizer is not None:
        for parameter in old:
            group_of(optimizer, parameter)
    spectra = [request.spectrum(pair.place.name, pair.up, pair.down, pair.size) for pair in pairs]
    ranks = [
        wanted if pair.removable else max(wanted, 1)
        for pair, wanted in zip(pairs, request.ranks(spectra), strict=True)
    ]
    if not any(ranks):
        raise ConfigError(f"squeeze: the change of adapter {name!r} is zero at every site")
    renewed = [
        _rebuilt(pair, found.triples, wanted, keep) if wanted else None
        for pair, found, wanted in zip(pairs, spectra, ranks, strict=True)
    ]
    for pair, delta in zip(pairs, renewed, strict=True):
        if delta is None:
            pair.place.remove()
        else:
            pair.place.put(delta)
    if shared:  # plain LoRA has no use for it
        _remove_shared(model, name)
    if optimizer is not None:
        for pair, delta in zip(pairs, renewed, strict=True):
            if delta is not None:
                _hand_over(optimizer, pair, delta)
        drop(optimizer, old)
    return report(spectra, ranks)


@torch.no_grad()
def settled_factors(delta: Delta) -> tuple[Tensor, Tensor] | None:
    """Return the factors as in evaluation, without noise."""
    with without_noise(delta):
        return delta.factors() if delta.mergeable else None


def choose(model: nn.Module, name: str | None) -> str:
    """Return the name of the adapter that is meant.

    Raises:
        AdapterStateError: there is none of that name, or several and no name was given.
    """
    names = adapter_names(model)
    if name is None and len(names) != 1:
        raise AdapterStateError(f"say which adapter by name=...; the model has {names or 'none'}")
    return names[0] if name is None else find_adapter(names, name)


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def factors_of(place: Place) -> tuple[Tensor, Tensor]:
    """Return up and down of a change that is exactly `scale * up @ down`, without folds.

    Raises:
        AdapterStateError: the method has no factor form, or changes the bias too.
    """
    delta = place.delta
    found = settled_factors(delta)
    if found is None or delta.bias_change() is not None:
        raise AdapterStateError(
            f"{delta.config.method} at {place.name or 'the layer'} has no factor form, so it "
            "cannot become plain LoRA"
        )
    return found[0].detach(), found[1].detach().repeat(1, delta.fold)


def _pair(place: Place) -> _Pair:
    delta = place.delta
    if _carries(place):
        up, down = delta.get_parameter("B").detach(), delta.get_parameter("A").detach()
        if isinstance(delta, PairDelta):
            up, down = (item.detach() for item in delta.inner_pair())
        return _Pair(place, delta, True, up, down)
    return _Pair(place, delta, False, *factors_of(place))


def _carries(place: Place) -> bool:
    """Tell whether the method is a trained pair A, B that can be built again with another rank."""
    delta = place.delta
    own = dict(delta.named_parameters())
    config = delta.config
    if not isinstance(config, LowRankConfig) or delta.shared or not {"A", "B"} <= own.keys():
        return False
    factors = settled_factors(delta)
    if factors is not None and not (factors[0] is own["B"] and factors[1] is own["A"]):
        return False
    try:
        twin = place.build(dataclasses.replace(config, rank=1))
    except ConfigError:
        return False
    expected = {key: tuple(item.shape) for key, item in own.items()}
    *stack, _, columns = expected["A"]
    expected["A"], expected["B"] = (*stack, 1, columns), (*expected["B"][:-1], 1)
    return expected == {key: tuple(item.shape) for key, item in twin.named_parameters()}


@torch.no_grad()
def _rebuilt(pair: _Pair, triples: Triples, rank: int, keep: Keep) -> Delta:
    """Return the Delta of the new rank, with everything but the pair as it was."""
    old = pair.old
    config = old.config if pair.carries else plain_config(old, pair.up.shape[1])
    assert isinstance(config, LowRankConfig)
    if isinstance(config, PairConfig):
        config = dataclasses.replace(config, offset=0)
    made = pair.place.build(resized(config, rank, keep)).to(pair.up.dtype)
    if pair.carries:
        tensors = {**dict(made.named_parameters()), **dict(made.named_buffers())}
        for key, value in [*old.named_parameters(), *old.named_buffers()]:
            if key not in ("A", "B", "A0", "B0"):
                tensors[key].copy_(value)
        for key, parameter in made.named_parameters():
            parameter.requires_grad_(old.get_parameter(key).requires_grad)
    up, down = triples.pair(rank, old.scale / made.scale)
    made.get_parameter("B").copy_(up)
    made.get_parameter("A").copy_(down)
    return made


def _hand_over(optimizer: torch.optim.Optimizer, pair: _Pair, made: Delta) -> None:
    """Put the new parameters of a site into the groups of the old ones."""
    if not pair.carries:
        first = next(p for module in (pair.old, *pair.old.shared) for p in _trained(module))
        add(optimizer, made.parameters(), like=first)
        return
    for key, parameter in made.named_parameters():
        if parameter.requires_grad:
            carry = None if key in ("A", "B") else _unchanged
            replace(optimizer, pair.old.get_parameter(key), parameter, carry)


def _unchanged(value: Tensor) -> Tensor:
    return value


def _remove_shared(model: nn.Module, name: str) -> None:
    states: nn.ModuleDict = getattr(model, record.SHARED)
    del states[name]
    if not len(states):
        delattr(model, record.SHARED)
