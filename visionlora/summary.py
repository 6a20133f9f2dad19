"""What would train: counts, and the first module that needs a gradient.

One stray trainable tensor near the input (a class token, a position embedding) makes backward run
through the whole model even if only the last block is adapted, so `summary` names it.
"""

from dataclasses import dataclass

from torch import nn

from visionlora import record
from visionlora.api import trainable_parameters
from visionlora.record import hosts_of


@dataclass(frozen=True)
class Summary:
    """Counts of a model with adapters; `str()` gives a readable report."""

    adapters: dict[str, str]
    """Adapter name to method names."""
    active: tuple[str, ...]
    sites: int
    """Number of adapted weight views of all adapters."""
    trainable: int
    """Trained scalars, heads included."""
    adapter_parameters: int
    """Trained scalars of the active adapters."""
    total: int
    """All scalars of the model without adapters."""
    first_gradient: str | None
    """First module, in registration order, that owns a trainable tensor."""
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        share = 100 * self.trainable / max(self.total, 1)
        names = ", ".join(
            f"{name} ({method}){'' if name in self.active else ', inactive'}"
            for name, method in self.adapters.items()
        )
        lines = [
            f"adapters    {names or 'none'} on {self.sites} sites",
            f"trainable   {self.trainable:,} of {self.total:,} ({share:.3f} %): adapters "
            f"{self.adapter_parameters:,}, base {self.trainable - self.adapter_parameters:,}",
            f"gradients   needed from {self.first_gradient or 'nowhere'} on",
        ]
        return "\n".join([*lines, *(f"warning     {text}" for text in self.warnings)])


def summary(model: nn.Module) -> Summary:
    """Describe what `trainable_parameters` would yield, and what is odd about it.

    Order is that of module registration, which is the order of execution in nearly all models.
    """
    owners = record.adapter_parameter_owners(model)
    methods: dict[str, dict[str, None]] = {}
    sites = 0
    for host in hosts_of(model).values():
        for name, group in host.adapters.items():
            for delta in group.values():  # type: ignore[operator]
                methods.setdefault(name, {})[delta.config.method] = None
                sites += 1
    trained = list(trainable_parameters(model))
    adapter_count = sum(item.numel() for _, item in trained if id(item) in owners)
    first = next((_owner(name) for name, _ in trained), None)
    return Summary(
        adapters={name: "+".join(kinds) for name, kinds in methods.items()},
        active=tuple(
            dict.fromkeys(n for host in hosts_of(model).values() for n in host.state.active)
        ),
        sites=sites,
        trainable=sum(item.numel() for _, item in trained),
        adapter_parameters=adapter_count,
        total=sum(item.numel() for _, item in record.base_parameters(model)),
        first_gradient=first,
        warnings=_warnings(trained, owners),
    )


def _warnings(trained: list[tuple[str, nn.Parameter]], owners: dict[int, str]) -> tuple[str, ...]:
    if not trained:
        return ("nothing is trainable",)
    places = [index for index, (_, item) in enumerate(trained) if id(item) in owners]
    if not places:
        return ("no active adapter is trainable",)
    # Scalars such as a logit scale enter at the end, wherever they are registered.
    stray = [name for name, item in trained[: places[0]] if item.numel() > 1]
    return tuple(
        f"{name} is trainable and comes before the first adapter, so backward runs through "
        "everything after it; freeze it with freeze_base unless that is meant"
        for name in stray
    )


def _owner(name: str) -> str:
    """Return the layer that a parameter belongs to, without the adapter's own path."""
    return (
        name.partition(".adapters.")[0] if ".adapters." in name else name.rpartition(".")[0] or name
    )
