"""A small tower of blocks with adapters, for the laws of Queryable LoRA."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import visionlora as vl
from tests.methods.test_moe_lora import disturb

METHOD = "queryable-lora"
WIDTH = 6


class Block(nn.Module):
    """Two adapted layers with a mean over tokens in between."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).tanh().chunk(3, -1)
        return x + self.out(q * (k * v).mean(1, keepdim=True))


class Tower(nn.Module):
    """Blocks that may be checkpointed one by one."""

    def __init__(self, depth=4):
        super().__init__()
        self.stem = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.checkpointed = False

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


def tower(method=METHOD, targets=("blocks.*.qkv[q,v]", "blocks.*.out"), depth=4, **options):
    torch.manual_seed(0)
    options = {"rank": 2, "alpha": 3.0, **options}
    if method == METHOD:
        options = {"atoms": 6, "width": 4, "block_size": 1, **options}
    return disturb(vl.inject(Tower(depth).double(), method, list(targets), **options))


def batch(seed=0, samples=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 5, WIDTH, generator=generator, dtype=torch.float64)


def memory_of(model):
    return model.visionlora_shared["default"]


def trained(model):
    return [item for _, item in vl.trainable_parameters(model)]
