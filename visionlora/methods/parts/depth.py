"""Which block of a model a layer is in, and what has run so far in the current forward.

Names tell the blocks: in `visual.blocks.7.attn.qkv` the tower is `visual.blocks` and the index
(7,); in `layers.2.blocks.5.mlp.fc1` the tower is `layers` and the index (2, 5); ResNet's
`layer3.0.conv1` is tower `layer` with index (3, 0). A layer outside such lists is a tower of its
own with one block.

A `Pass` is one forward through one tower. It begins by itself when a layer runs that has run
already or that lies in an earlier block than the last one, so no hook at the root is needed and
every way of calling a model works.

Under gradient checkpointing parts of a forward are repeated inside the backward, when the pass is
long over and others may have followed. So each pass leaves a `Trace` of plain values that lives as
long as its graph; a repeated layer finds its pass by what it sees.
"""

import re
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from visionlora.errors import AdapterStateError, ConfigError
from visionlora.sites import Site

_LIST = r".*(?:layer|block|stage)s?_?"


def block_index(module: str) -> tuple[str, tuple[int, ...]]:
    """Return the tower of a layer and the index of its block, empty outside of blocks."""
    parts = module.split(".")
    tower: str | None = None
    index: list[int] = []
    last = -2
    for position, part in enumerate(parts):
        numbered = re.fullmatch(f"({_LIST})([0-9]+)", part)
        previous = parts[position - 1] if position else ""
        listed = part.isdigit() and (
            last == position - 1 or re.fullmatch(f"{_LIST}[0-9]*", previous)
        )
        if numbered or listed:
            if tower is None:
                tower = ".".join([*parts[:position], *([numbered[1]] if numbered else [])])
            index.append(int(numbered[2] if numbered else part))
            last = position
    if tower is not None:
        return tower, tuple(index)
    first = next((position for position, part in enumerate(parts) if part.isdigit()), None)
    if first is None:
        return module, ()
    return ".".join(parts[:first]), (int(parts[first]),)


def blocks_of(sites: list[Site], size: int) -> dict[str, tuple[str, int]]:
    """Return `{site name: (tower, block)}`, with `size` neighbouring adapted indices a block."""
    found = {site.name: block_index(site.module) for site in sites}
    towers: dict[str, set[tuple[int, ...]]] = {}
    for tower, index in found.values():
        towers.setdefault(tower, set()).add(index)
    order = {tower: sorted(indices) for tower, indices in towers.items()}
    return {
        name: (tower, order[tower].index(index) // size) for name, (tower, index) in found.items()
    }


def is_deep(sites: list[Site], size: int) -> bool:
    """Return whether some tower has a second block, which can look back."""
    return any(block for _, block in blocks_of(sites, size).values())


class Pass:
    """One forward through one tower: states and gates of the blocks that have run."""

    def __init__(self) -> None:
        self.last = -1
        self.served: set[str] = set()
        self.states: dict[int, Tensor] = {}
        self.gates: dict[int, Tensor] = {}
        self.divergences: list[Tensor] = []
        self.trace = Trace()

    def earlier(self, block: int, samples: int) -> list[Tensor]:
        """Return the states of the blocks before `block` that have run, for so many samples."""
        return [fit(self.states[key], samples) for key in sorted(self.states) if key < block]


class Trace:
    """What a repetition of a pass needs, without any graph."""

    def __init__(self) -> None:
        self.with_graph = torch.is_grad_enabled()
        self.marks: dict[str, Tensor] = {}
        self.gates: dict[int, Tensor] = {}


class Depth:
    """The current pass of every tower; empty again after a copy or pickle."""

    def __init__(self) -> None:
        self._passes: dict[str, Pass] = {}
        self._traces: WeakSet[Trace] = WeakSet()

    def enter(self, tower: str, block: int, name: str, mark: Tensor) -> Pass:
        """Return the pass that a layer runs in, a new one if the old one is over.

        Args:
            tower: where the layer is.
            block: where the layer is.
            name: of the layer's site.
            mark: a tensor that tells this run of the layer from others.
        """
        current = self._passes.get(tower)
        if current is None or block < current.last or name in current.served:
            current = self._passes[tower] = Pass()
            if not torch.compiler.is_compiling():
                self._traces.add(current.trace)
        current.last = block
        current.served.add(name)
        if not torch.compiler.is_compiling():
            current.trace.marks[name] = mark.detach()
        return current

    def settle(self, current: Pass, block: int, gates: Tensor) -> None:
        """Note the gates of a block, for its other layers and for repetitions."""
        if not torch.compiler.is_compiling():  # a compiler repeats operations, not this code
            current.trace.gates[block] = gates.detach().requires_grad_(gates.requires_grad)
            gates = _Tied.apply(gates, current.trace)
        current.gates[block] = gates

    def recall(self, block: int, name: str, mark: Tensor) -> Tensor | None:
        """Return the gates that a repeated layer had, or None if it never ran.

        Raises:
            AdapterStateError: the layer first ran without a graph, as reentrant checkpointing has
                it, so that gradients would be lost.
        """
        found = [
            trace
            for trace in self._traces
            if block in trace.gates
            and name in trace.marks
            and trace.marks[name].shape == mark.shape
        ]
        if found and not any(trace.with_graph for trace in found):
            raise AdapterStateError(
                "layers that depend on earlier layers need checkpoint(..., use_reentrant=False)"
            )
        found = [trace for trace in found if trace.with_graph]
        if len(found) > 1:  # several forwards before one backward
            found.sort(key=lambda trace: float((trace.marks[name] - mark.detach()).abs().sum()))
        return found[0].gates[block] if found else None

    def take_divergences(self) -> list[Tensor]:
        """Return the divergences of the current passes, once: a graph serves one backward."""
        terms = [term for current in self._passes.values() for term in current.divergences]
        for current in self._passes.values():
            current.divergences = []
        return terms

    def __deepcopy__(self, memo: dict[int, Any]) -> "Depth":
        return Depth()

    def __reduce__(self) -> Any:
        return Depth, ()


class _Tied(torch.autograd.Function):
    """The identity; its node keeps a trace alive as long as the graph that may be repeated."""

    @staticmethod
    def forward(ctx, gates, trace):  # type: ignore[no-untyped-def]
        ctx.trace = trace
        return gates.view_as(gates)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        return gradient, None


def fit(tensor: Tensor, samples: int) -> Tensor:
    """Return rows of samples for a layer that sees each sample in n parts, or the other way round.

    Window attention folds the windows of a sample into the batch: rows are repeated for them, and
    averaged where a later layer sees whole samples again.

    Raises:
        ConfigError: neither number divides the other.
    """
    rows = len(tensor)
    if rows == samples:
        return tensor
    if samples % rows == 0:
        return tensor.repeat_interleave(samples // rows, 0)
    if rows % samples == 0:
        return tensor.unflatten(0, (samples, -1)).mean(1)
    raise ConfigError(
        f"an adapted layer sees {samples} samples where an earlier one of its tower saw {rows}: "
        "the first dimension of every adapted layer's input must be the batch; exclude the one "
        "that has another"
    )
