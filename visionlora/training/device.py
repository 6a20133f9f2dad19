"""Where and how a model runs: device, number of threads, precision."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from visionlora.errors import ConfigError

__all__ = ["autocast", "pick_device", "threads"]

_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """Return the device a user named, or for `auto` the best one that this machine has."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", local)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is none of auto, cpu, cuda, cuda:N, mps") from error
    if device.type == "cuda":
        device = torch.device("cuda", local if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise ConfigError(
                f"device {name!r} is not there: {torch.cuda.device_count()} GPUs found"
            )
    return device


def autocast(precision: str, kind: str) -> AbstractContextManager[Any]:
    """Return a context in which a device of this kind computes in fp32, bf16 or fp16."""
    return torch.autocast(kind, _HALF[precision]) if precision in _HALF else nullcontext()


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let torch use `count` threads inside a `with` block; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
