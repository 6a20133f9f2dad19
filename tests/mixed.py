"""A small model with one layer of each kind, for tests that need them all at once."""

import torch
from torch import nn


class Net(nn.Module):
    """One layer of each kind that has a factor pair."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8, padding_idx=2)
        self.qkv = nn.Linear(8, 24)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv = nn.Conv2d(4, 6, 3, groups=2, padding=1)

    def forward(self, index):
        x = self.table(index)
        q, k, v = self.qkv(x).chunk(3, -1)
        x = self.attn(q, k, v, need_weights=False)[0]
        return self.conv(x.reshape(len(x), 4, -1, 2))


TARGETS = ["table", "qkv[q,v]", "attn[q,out]", "conv"]
INDEX = torch.arange(12).remainder(11).reshape(2, 6)
