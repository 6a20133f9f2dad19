"""Lean activations: layers keep nothing of an input that a norm or an activation can make again.

    n = LayerNorm(z) -> qkv, fc1:  z is kept by the norm      a = gelu(u) -> fc2:  u is kept by gelu

Plain LoRA keeps n and a besides, for the gradient of its down-matrix. Here the norm and the
activation write on their output what it was made of, and a layer that is given this very tensor,
unchanged, keeps a reference to that instead and calls the module once more in its backward, under
the same autocast: the same numbers bit for bit, for an elementwise operation more. Whatever comes
in between (a dropout that drops, a copy, a cast) makes another tensor, which is kept as ever.

The writing is a forward hook, so copies and pickles of the model have it too, and `eject` takes it
off. A compiled model does without: the compiler plans its own recomputation.
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from visionlora.hosts.base import Host
from visionlora.ops import Rebuilt

PAIRS = (
    # timm's Block and all that name their parts like it
    *(("norm1", "attn.qkv"), ("norm2", "mlp.fc1"), ("mlp.act", "mlp.fc2")),
    # open_clip's ResidualAttentionBlock
    *(("ln_1", "attn"), ("ln_2", "mlp.c_fc"), ("mlp.gelu", "mlp.c_proj")),
)
"""What makes the input of which layer, by names inside a block."""
# By name, because each library has classes of its own; all are pure functions of their input.
_ACTIVATIONS = frozenset({"GELU", "GELUTanh", "QuickGELU", "SiLU"})
_MARK = "_visionlora_made_of"


def makers(model: nn.Module, layers: Collection[str]) -> list[nn.Module]:
    """Return the norms and activations that make the input of one of these layers.

    Args:
        model: the model.
        layers: names of adapted layers.
    """
    modules = dict(model.named_modules())
    return [
        modules[prefix + maker]
        for name in modules
        for prefix in (f"{name}." if name else "",)
        for maker, layer in PAIRS
        if prefix + layer in layers and _is_maker(modules.get(prefix + maker))
    ]


def write_origins(found: Collection[nn.Module]) -> None:
    """Make norms and activations write on their outputs what these are made of."""
    for module in found:
        if _write not in module._forward_hooks.values():
            module.register_forward_hook(_write, prepend=True)


def forget_origins(model: nn.Module) -> None:
    """Undo `write_origins` for a whole model."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_hooks.items() if hook is _write]:
            del module._forward_hooks[key]


def made_of(x: Tensor) -> Rebuilt | None:
    """Return what a tensor is made of, if that was written on it and holds still."""
    if torch.compiler.is_compiling():
        return None
    if (mark := getattr(x, _MARK, None)) is None:  # tensors of inference mode have no version
        return None
    rebuilt, version = mark
    return rebuilt if x._version == version else None


def _is_maker(module: nn.Module | None) -> bool:
    return isinstance(module, nn.LayerNorm) or type(module).__name__ in _ACTIVATIONS


def _write(module: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling() or not _is_alone(module):
        return
    if len(args) != 1 or not isinstance(output, Tensor) or output is args[0]:  # in place
        return
    if output.requires_grad:  # else the module keeps nothing, so nothing would be saved
        setattr(output, _MARK, (Rebuilt(args[0], _again(module, output)), output._version))


def _is_alone(module: nn.Module) -> bool:
    """Whether the output is what the module's own forward made of its parameters."""
    first = next(iter(module._forward_hooks.values()))  # a hook before this one may change it
    return first is _write and not (isinstance(module, Host) and module.slots)


def _again(module: nn.Module, output: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the module's forward as it ran just now, autocast included."""
    device = output.device.type
    cast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    return partial(_run, module.forward, device, *cast)


def _run(
    forward: Callable[[Tensor], Tensor],
    device: str,
    enabled: bool,
    dtype: torch.dtype,
    origin: Tensor,
) -> Tensor:
    with torch.autocast(device, dtype, enabled):
        return forward(origin)
