"""What the parameters of a restoration network are: kind, part, and when they are used.

conv, linear   weights of layers
bias           their biases
norm           weights and biases of norms
scale          vectors that stand alone: beta and gamma of NAFNet, temperature of Restormer
other          everything else, such as tables of positions

Parameters are registered in an order of their own (NAFNet: intro, ending, encoders, ...); the one
in which a picture meets them is found by running the network once.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import nn

from visionlora.targets import LAYERS

Kind = Literal["conv", "linear", "bias", "norm", "scale", "other"]
Part = Literal["encoder", "middle", "decoder", "network"]
PARTS: dict[Part, tuple[str, ...]] = {
    "encoder": ("intro", "patch_embed", "encoder", "down"),
    "middle": ("middle_blks", "latent"),
    "decoder": ("up", "decoder", "reduce_chan", "refinement", "ending", "output"),
}
"""How names begin in NAFNet and Restormer; a network of others is one part."""
SIDE = 16
"""Side of the picture that the network is run on."""


def kind_of(name: str, model: nn.Module) -> Kind:
    """Return what a parameter is."""
    owner, _, own = name.rpartition(".")
    module, parameter = model.get_submodule(owner), model.get_parameter(name)
    if isinstance(module, LAYERS["norm"]) or "norm" in type(module).__name__.lower():
        return "norm"
    vector = sum(side > 1 for side in parameter.shape) <= 1
    if own.endswith("weight") and (parameter.dim() > 1 or not vector):
        return "conv" if parameter.dim() > 2 else "linear"
    if not vector:
        return "other"
    return "bias" if own.endswith("bias") else "scale"


def part_of(name: str) -> Part:
    """Return which part of the network a parameter belongs to."""
    return next((part for part, heads in PARTS.items() if name.startswith(heads)), "network")


@torch.no_grad()
def in_running_order(model: nn.Module) -> list[str]:
    """Return the names of all parameters in the order in which a picture meets their modules."""
    place: dict[str, int] = {}
    with ExitStack() as hooks:
        for path, module in model.named_modules():

            def note(*_: Any, path: str = path) -> None:
                place.setdefault(path, len(place))

            hooks.callback(module.register_forward_pre_hook(note).remove)
        first = next(model.parameters())
        model(torch.zeros(1, 3, SIDE, SIDE, device=first.device, dtype=first.dtype))
    names = [name for name, _ in model.named_parameters()]
    return sorted(names, key=lambda name: place.get(name.rpartition(".")[0], len(place)))


def means_by_kind(scores: Mapping[str, float], model: nn.Module) -> dict[Kind, float]:
    """Return the mean over the tensors of each kind, the largest first."""
    found: dict[Kind, list[float]] = {}
    for name, score in scores.items():
        found.setdefault(kind_of(name, model), []).append(score)
    means = {kind: sum(values) / len(values) for kind, values in found.items()}
    return dict(sorted(means.items(), key=lambda item: -item[1]))


def table_by_kind(scores: Mapping[str, float], model: nn.Module) -> str:
    """Return a table of the kinds: how many tensors and numbers, and how much one matters."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    lines = [f"{'kind':8}{'tensors':>9}{'numbers':>13}  mean contribution of a number"]
    for kind, mean in means_by_kind(scores, model).items():
        names = [name for name in scores if kind_of(name, model) == kind]
        total = sum(sizes[name] for name in names)
        lines.append(f"{kind:8}{len(names):9,}{total:13,}  {mean:.2e}")
    return "\n".join(lines)
