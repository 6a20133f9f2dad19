"""A small network of blocks with an embedding, a last norm and a head, and a task for it."""

import torch
from torch import nn

WIDTH = 6


class Attention(nn.Module):
    """Four projections of one token, which is enough for a gradient to reach each."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        return self.proj(torch.sigmoid(self.q(x) * self.k(x)) * self.v(x))


class Block(nn.Module):
    """The parts of a transformer block."""

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = Attention()
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(WIDTH, 8), "fc2": nn.Linear(8, WIDTH)})

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](torch.tanh(self.mlp["fc1"](self.norm2(x))))


class Tower(nn.Module):
    """Blocks between an embedding and a head."""

    def __init__(self, depth=4):
        super().__init__()
        self.embed = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def tower(depth=4, seed=0):
    """Return a float64 tower with seeded weights."""
    torch.default_generator.manual_seed(seed)
    return Tower(depth).double()


def batches(step):
    """Return inputs and targets of a step."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    return x, x[:, :2].square() - x[:, 2:]


def loss(model, batch):
    """Return the mean squared error."""
    inputs, targets = batch
    return (model(inputs) - targets).square().mean()


def values(model):
    """Return copies of all parameters by name."""
    return {name: item.detach().clone() for name, item in model.named_parameters()}


def moved(before, model):
    """Return the names of the parameters that differ from a copy."""
    return {n for n, item in model.named_parameters() if not torch.equal(item, before[n])}
