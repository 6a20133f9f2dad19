"""Adapted layers: the mechanics of each layer type, for every method alike."""

from visionlora.hosts.attention import AttentionHost
from visionlora.hosts.base import Host, Mode, Slot, attach, find_adapter, prepare, release
from visionlora.hosts.choose import choose_host, describe
from visionlora.hosts.conv import ConvHost
from visionlora.hosts.dense import DenseHost
from visionlora.hosts.embedding import EmbeddingHost
from visionlora.hosts.linear import LinearHost

__all__ = [
    "AttentionHost",
    "ConvHost",
    "DenseHost",
    "EmbeddingHost",
    "Host",
    "LinearHost",
    "Mode",
    "Slot",
    "attach",
    "choose_host",
    "describe",
    "find_adapter",
    "prepare",
    "release",
]
