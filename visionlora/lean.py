"""Which models and methods can have lean activations, said before a model is touched.

A block of a ViT of width d keeps 10 d numbers a token for its backward when all of it is frozen:
the inputs of both norms, q, k, v, the attention's output, and the GELU's input of 4 d. Adapters
keep the inputs of their layers besides, 6 d more, all of which norms and GELU can make again from
what they keep themselves (`visionlora.hosts.lean` does it):

    plain  10 d + 6 d + ranks          lean  10 d + ranks

Methods that rewrite the output or transform the input keep other tensors and are refused, and so
is dropout on the input, which draws a tensor that nothing else keeps.
"""

from typing import cast

from torch import nn

from visionlora.build import PreparedAdapter
from visionlora.errors import AdapterStateError, ConfigError, TargetError
from visionlora.hosts import Host, Mode
from visionlora.hosts.lean import PAIRS, makers, write_origins
from visionlora.methods.base import Delta
from visionlora.record import hosts_of

__all__ = ["lean_makers", "make_lean"]


def make_lean(model: nn.Module) -> nn.Module:
    """Give a model with adapters lean activations, as `inject(..., lean=True)` does.

    For adapters that were loaded; `eject` undoes it.

    Raises:
        AdapterStateError: there is no adapter.
        ConfigError: a method that cannot be lean.
        TargetError: no block in which there is something to be lean at.
    """
    hosts = hosts_of(model)
    if not hosts:
        raise AdapterStateError(
            f"this {type(model).__name__} has no adapter; call inject or load first"
        )
    write_origins(_checked(model, {path: _of_host(host) for path, host in hosts.items()}))
    return model


def lean_makers(model: nn.Module, adapter: PreparedAdapter) -> list[nn.Module]:
    """Return the modules that make inputs of an adapter's layers; see `make_lean`."""
    layers: dict[str, tuple[Mode, list[Delta]]] = {}
    for path, own in adapter.deltas.items():
        chosen = adapter.hosts[path]
        mode, others = (
            (chosen[1], []) if chosen else _of_host(cast(Host, model.get_submodule(path)))
        )
        layers[path] = (mode, [*others, *(delta for _, delta in own.values())])
    return _checked(model, layers)


def _of_host(host: Host) -> tuple[Mode, list[Delta]]:
    return host.state.mode, [slot.delta for slot in host.all_slots()]


def _checked(model: nn.Module, layers: dict[str, tuple[Mode, list[Delta]]]) -> list[nn.Module]:
    for path, (_, deltas) in layers.items():
        for delta in deltas:
            _refuse(path or "the layer", delta)
    found = makers(model, [path for path, (mode, _) in layers.items() if mode != "dense"])
    if not found:
        pairs = ", ".join(f"{maker} -> {layer}" for maker, layer in PAIRS)
        raise TargetError(
            f"lean=True recognises no block in this {type(model).__name__}: no adapted layer "
            "outside dense mode gets its input from a LayerNorm or an activation by these names: "
            f"{pairs}"
        )
    return found


def _refuse(path: str, delta: Delta) -> None:
    method = delta.config.method
    if delta.update is not None or delta.rotate is not None:
        raise ConfigError(
            f"{method} at {path} keeps more than its input, so it cannot be lean: leave out "
            "lean=True, or choose a method of factor pairs such as lora"
        )
    if delta.dropout:
        raise ConfigError(
            f"{method} at {path} has dropout={delta.dropout:g}, whose input has to be kept: lean "
            "needs dropout=0"
        )
