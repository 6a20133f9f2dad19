"""Routed adapters as plain LoRA: the gates become constants, their means on given data.

    s * sum_e g_e(x) B_e A_e   ->   s * [g_1 B_1 ... g_E B_E] [A_1; ...; A_E],   g = mean of g(x)

for mixtures of experts, and likewise for every routed method (see its `frozen_factors`). The result
merges, saves and exports as LoRA does. It is exact where the gates do not vary; elsewhere it is the
best guess without looking at the input, so measure it before use.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from visionlora import record
from visionlora.build import refuse_merged
from visionlora.errors import AdapterStateError
from visionlora.hosts import find_adapter
from visionlora.methods.parts.routing import MeanGates, RoutedDelta
from visionlora.ranks.factors import singular_triples
from visionlora.ranks.finalize import plain_config
from visionlora.ranks.structure import Place, places_of

Call = Callable[[nn.Module, Any], Any]


def _plain_call(model: nn.Module, batch: Any) -> Any:
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


@torch.no_grad()
def freeze_routing(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    name: str | None = None,
    call: Call = _plain_call,
) -> nn.Module:
    """Replace a routed adapter by the plain LoRA of its mean gates.

    Args:
        model: a model with a routed adapter; changed in place.
        batches: inputs that are typical of what the model will see.
        name: which adapter; may be omitted if only one is routed.
        call: runs the model on one batch; by default `model(batch)`, or `model(*batch)` for tuples.

    Returns:
        The same model. Each site has rank E r (or the largest that its view has) for MoE-LoRA, and
        r for Queryable LoRA.

    Raises:
        AdapterStateError: no such adapter, it is not routed, the model is merged, or the batches
            did not reach some adapted layer; the model is unchanged then.
    """
    refuse_merged(model, "freeze the routing")
    routed = _routed_places(model, name)
    modes = [(module, module.training) for module in model.modules()]
    means = [MeanGates() for _ in routed]
    try:
        for (_, delta), mean in zip(routed, means, strict=True):
            delta.watch = mean
        model.eval()
        for batch in batches:
            call(model, batch)
    finally:
        for _, delta in routed:
            delta.watch = None
        for module, training in modes:
            module.training = training
    for (place, _), mean in zip(routed, means, strict=True):
        if mean.value is None:
            raise AdapterStateError(f"no batch reached {place.name}, so its gates are not known")
    for (place, delta), mean in zip(routed, means, strict=True):
        assert mean.value is not None
        _settle(place, delta, mean.value)
    _drop_shared(model, routed[0][0].adapter)
    return model


def _routed_places(model: nn.Module, name: str | None) -> list[tuple[Place, RoutedDelta]]:
    """Return the sites of the adapter that is to be frozen."""
    if name is not None:
        find_adapter(record.adapter_names(model), name)
    found = [
        (place, place.delta)
        for place in places_of(model, name)
        if isinstance(place.delta, RoutedDelta)
    ]
    names = list(dict.fromkeys(place.adapter for place, _ in found))
    if not names:
        raise AdapterStateError(
            f"{'the model has no routed adapter' if name is None else f'{name!r} is not routed'}: "
            "there are no gates to freeze"
        )
    if len(names) > 1:
        raise AdapterStateError(f"say which adapter by name=...; routed are {names}")
    return found


def _settle(place: Place, delta: RoutedDelta, gates: torch.Tensor) -> None:
    """Replace a routed Delta by LoRA."""
    up, down = delta.frozen_factors(gates)
    if down.shape[0] > place.site.max_rank:
        up, down = singular_triples(up, down).pair(place.site.max_rank)
    new = place.build(plain_config(delta, down.shape[0]))
    new.get_parameter("B").copy_(up)
    new.get_parameter("A").copy_(down)
    place.put(new)


def _drop_shared(model: nn.Module, adapter: str) -> None:
    """Take out the model-level state that nobody uses any more."""
    for owner in list(model.modules()):
        states = owner._modules.get(record.SHARED)
        if isinstance(states, nn.ModuleDict) and adapter in states:
            del states[adapter]
            if not len(states):
                delattr(owner, record.SHARED)
