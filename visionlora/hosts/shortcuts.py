"""Torch's own inference shortcuts, which read weights past the adapted layers inside them.

`nn.TransformerEncoderLayer` hands all its weights to one fused kernel in inference, unless a hook
sits on some module inside; `nn.TransformerEncoder` turns padded batches into nested tensors for
that kernel. Both are closed while adapters are present and opened again by `eject`.
"""

from typing import Any, cast

from torch import nn

from visionlora.hosts.base import Host

_NESTED = "_visionlora_nested"


def close_shortcuts(model: nn.Module) -> None:
    """Make torch's encoder layers call the adapted layers inside them."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            for inner in module.modules():
                if isinstance(inner, Host):
                    close_shortcut(inner)
        nested = isinstance(module, nn.TransformerEncoder) and module.use_nested_tensor
        if nested and any(isinstance(inner, Host) for inner in module.modules()):
            cast(Any, module).use_nested_tensor = False
            setattr(module, _NESTED, True)


def close_shortcut(layer: nn.Module) -> None:
    """Make an encoder layer that holds this adapted layer call it."""
    if _no_shortcut not in layer._forward_pre_hooks.values():
        layer.register_forward_pre_hook(_no_shortcut)


def reopen_shortcuts(model: nn.Module) -> None:
    """Undo `close_shortcuts`."""
    for module in model.modules():
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is _no_shortcut]:
            del module._forward_pre_hooks[key]
        if hasattr(module, _NESTED):
            cast(Any, module).use_nested_tensor = True
            delattr(module, _NESTED)


def _no_shortcut(module: nn.Module, args: Any) -> None:
    """Do nothing: the presence of a hook is what closes the shortcut."""
