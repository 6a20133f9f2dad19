"""A small model of many kinds of layers, and batches to look at it with."""

import torch
from torch import nn

import visionlora as vl
from tests.mixed import INDEX, TARGETS, Net


def mixed(dtype=torch.float64):
    """One layer of each kind, adapted, under a linear head."""
    model = nn.Sequential(Net(), nn.Flatten(), nn.Linear(72, 5)).to(dtype)
    return vl.inject(model, "lora", [f"0.{name}" for name in TARGETS], rank=2)


def indices(sizes=(2, 3, 1), seed=0):
    """Batches of token rows and labels."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randint(0, 11, (size, INDEX.shape[1]), generator=generator),
            torch.randint(0, 5, (size,), generator=generator),
        )
        for size in sizes
    ]


def cross_entropy(model, batch):
    """The mean loss of a batch."""
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


class Tower(nn.Module):
    """A fused projection, an attention, a convolution and a normed, dropped head."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.attn = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
        self.conv = nn.Conv2d(8, 6, 2, stride=2)
        self.norm = nn.BatchNorm1d(6)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        x = self.attn(q, k, v, need_weights=False)[0]
        x = self.conv(x.transpose(1, 2).unflatten(2, (2, 2))).flatten(1)
        return self.head(self.drop(self.norm(x)))


TOWER = ["qkv[q,v]", "attn", "conv", "head"]


def tower(method="lora", **options):
    """The tower in float64, adapted."""
    return vl.inject(Tower().double(), method, TOWER, **{"rank": 2, **options})


def vectors(sizes=(4, 3, 5), seed=0, tokens=4):
    """Batches of token vectors and labels."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, tokens, 8, generator=generator, dtype=torch.float64) + 0.5,
            torch.randint(0, 3, (size,), generator=generator),
        )
        for size in sizes
    ]


def joined(batches):
    """All samples as one batch."""
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
