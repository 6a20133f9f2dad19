"""A problem with a known answer: one layer of a small network was changed, by a known rank."""

import copy
from dataclasses import dataclass, field

import torch
from torch import nn

import visionlora as vl
from visionlora.ranks.structure import places_of
from visionlora.training import RunDirectory, TrainSettings, cosine, fit

WIDTH = 8


class Block(nn.Module):
    """Two linear layers around a residual stream."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH)
        self.b = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.b(torch.tanh(self.a(x)))


class Stack(nn.Module):
    """Blocks one after another."""

    def __init__(self, depth=2):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@dataclass
class Problem:
    """A frozen network, and examples of what it should do after the change."""

    changes: dict[str, int] = field(default_factory=lambda: {"blocks.1.a": 2})
    """`{layer: rank of its change}`."""
    size: float = 2.5
    """Singular value of the changes."""
    examples: int = 96
    depth: int = 2
    noise: float = 0.0
    """Noise of the targets, other in every step."""

    def __post_init__(self):
        torch.manual_seed(0)
        self.base = Stack(self.depth).double()
        teacher = copy.deepcopy(self.base)
        for name, rank in self.changes.items():
            up, down = (torch.linalg.qr(torch.randn(WIDTH, rank).double())[0] for _ in range(2))
            teacher.get_submodule(name).weight.data += self.size * up @ down.t()
        self.inputs = torch.randn(self.examples, WIDTH, dtype=torch.float64)
        self.targets = teacher(self.inputs).detach()

    def model(self, method, **options):
        """Return the frozen network with an adapter on every layer."""
        return vl.inject(copy.deepcopy(self.base), method, "type:Linear", **options)

    def loss(self, model, batch=None):
        """Return the mean squared error."""
        inputs, targets = (self.inputs, self.targets) if batch is None else batch
        return (model(inputs) - targets).square().mean()

    def batches(self, step):
        """Return a half of the examples, the other one in the next step."""
        part = slice(step % 2, None, 2)
        targets = self.targets[part]
        generator = torch.Generator().manual_seed(step)
        noise = torch.randn(targets.shape, generator=generator, dtype=targets.dtype)
        return self.inputs[part], targets + self.noise * noise

    def fit(self, model, folder, *, steps, lr=0.02, batches=None, resume=False, **settings):
        """Train the adapter, with all that its method brings."""
        options = {"checkpoint_every": 0, "log_every": steps, **settings}
        parameters = [item for _, item in vl.trainable_parameters(model)]
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
        return fit(
            model,
            optimizer,
            self.loss,
            batches or self.batches,
            TrainSettings(steps=steps, device="cpu", **options),
            RunDirectory(folder, resume=resume),
            schedule=cosine(steps, warmup=2, floor=0.02),
            **({"held_out": self.batches} if batches is None else {}),
        )


def ranks(model):
    """Return `{layer: rank}` of a finalised model; what is not there has rank 0."""
    return {place.path: place.delta.factors()[0].shape[1] for place in places_of(model)}
