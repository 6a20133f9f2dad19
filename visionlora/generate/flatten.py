"""An adapter as one vector: names and shapes in a fixed order, standardised tensor by tensor.

    x = (flat - mean_t) / std_t  for every tensor t, then zeros up to a multiple

The statistics are averaged over the training tasks and belong to the generator, so that generating
an adapter needs nothing of the task but its task vector.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from visionlora.errors import AdapterFileError


@dataclass(frozen=True)
class Layout:
    """Which tensors make up the vector, by sorted name."""

    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Layout":
        """Return the layout of an adapter's tensors.

        Raises:
            AdapterFileError: a tensor holds whole numbers, which cannot be generated.
        """
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                raise AdapterFileError(f"{name} holds {tensor.dtype}; only floats can be generated")
        return cls({name: tuple(tensors[name].shape) for name in sorted(tensors)})

    @property
    def sizes(self) -> list[int]:
        """Entries of each tensor."""
        return [math.prod(shape) for shape in self.shapes.values()]

    @property
    def length(self) -> int:
        """Entries of all tensors."""
        return sum(self.sizes)

    def padded(self, multiple: int) -> int:
        """Return the length, rounded up to a multiple."""
        return -(-self.length // multiple) * multiple

    def difference(self, other: "Layout") -> str:
        """Say in a few words how `other` differs, or return an empty string."""
        if missing := [name for name in self.shapes if name not in other.shapes]:
            return f"it lacks {missing[0]} ({len(missing)} tensors in all)"
        if unknown := [name for name in other.shapes if name not in self.shapes]:
            return f"it also has {unknown[0]} ({len(unknown)} tensors in all)"
        for name, shape in self.shapes.items():
            if other.shapes[name] != shape:
                return f"{name} is {other.shapes[name]} there and {shape} here"
        return ""

    def flatten(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, " length"]:
        """Return all entries as one float32 vector."""
        return torch.cat([tensors[name].detach().reshape(-1).float().cpu() for name in self.shapes])

    def unflatten(self, vector: Float[Tensor, " length"]) -> dict[str, Tensor]:
        """Return the tensors of a vector."""
        parts = vector.split(self.sizes)
        return {
            name: part.reshape(shape).clone()
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of every tensor of a layout."""

    mean: Float[Tensor, " tensors"]
    std: Float[Tensor, " tensors"]

    @classmethod
    def over(
        cls, layout: Layout, tasks: Sequence[Float[Tensor, "snapshots length"]]
    ) -> "Statistics":
        """Average the statistics of the tasks, however many snapshots each has."""
        parts = [task.double().split(layout.sizes, dim=1) for task in tasks]
        mean = torch.stack([torch.stack([p.mean() for p in task]) for task in parts]).mean(0)
        std = torch.stack(
            [torch.stack([p.std(unbiased=False) for p in task]) for task in parts]
        ).mean(0)
        # A tensor that is constant everywhere stays what it is.
        return cls(mean.float(), torch.where(std > 0, std, 1.0).float())

    def standardise(
        self, layout: Layout, vectors: Float[Tensor, "*batch length"]
    ) -> Float[Tensor, "*batch length"]:
        """Return vectors in which every tensor has mean 0 and deviation 1 on average."""
        mean, std = self._spread(layout)
        return (vectors - mean) / std

    def restore(
        self, layout: Layout, vectors: Float[Tensor, "*batch length"]
    ) -> Float[Tensor, "*batch length"]:
        """Undo `standardise`."""
        mean, std = self._spread(layout)
        return vectors * std + mean

    def _spread(self, layout: Layout) -> tuple[Tensor, Tensor]:
        sizes = torch.tensor(layout.sizes)
        return self.mean.repeat_interleave(sizes), self.std.repeat_interleave(sizes)
