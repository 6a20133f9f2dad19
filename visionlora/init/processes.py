"""Sums over the processes of a distributed run; without one, every function is the identity."""

import os
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from visionlora.errors import ConfigError


def several() -> bool:
    """Return whether there is more than one process.

    Raises:
        ConfigError: this is one of several, but they cannot exchange anything yet.
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size() > 1
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ConfigError(
            "this is one of several processes, and their statistics cannot be added up yet: call "
            "torch.distributed.init_process_group() first"
        )
    return False


def first() -> bool:
    """Return whether this is the process that writes files."""
    return not several() or dist.get_rank() == 0


def add_up(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor, in place, by its sum over all processes."""
    if not several():
        return
    for tensor in tensors:
        part = tensor.to(_device()).contiguous()
        dist.all_reduce(part)
        tensor.copy_(part)


def anywhere(flag: bool) -> bool:
    """Return whether the flag is set in any process."""
    count = torch.tensor(float(flag))
    add_up([count])
    return bool(count > 0)


def all_of(digest: bytes) -> list[bytes]:
    """Return the digests of all processes, all of the same length, by rank."""
    if not several():
        return [digest]
    own = torch.tensor(list(digest), dtype=torch.uint8, device=_device())
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, own)
    return [bytes(part.tolist()) for part in parts]


def _device() -> torch.device:
    """Return where the process group exchanges tensors."""
    on_gpu = "nccl" in dist.get_backend()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
