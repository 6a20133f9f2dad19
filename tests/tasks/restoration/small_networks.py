"""Small base files and adapters for tests."""

from pathlib import Path

import torch

import visionlora as vl
from tasks.restoration.networks.catalogue import Spec
from tasks.restoration.networks.files import load_base, save_base
from tasks.restoration.training.adapter_folder import Card, save_adapter
from visionlora.record import base_parameters

SPEC = Spec("nafnet", {"width": 4, "encoders": [1], "middle": 1, "decoders": [1]})


def write_base(path: Path, *, change: float = 0.0, seed: int = 0) -> Path:
    """Write a network that returns its input, or adds `change` times something to it."""
    torch.manual_seed(seed)
    model = SPEC.build()
    with torch.no_grad():
        model.ending.weight.mul_(change)
        model.ending.bias.mul_(change)
    return save_base(model, SPEC, path)


def write_adapter(
    folder: Path, base: Path, *, brighter: float = 0.1, parts: dict[str, list[str]] | None = None
) -> Path:
    """Write an adapter that makes pictures brighter."""
    loaded = load_base(base)
    vl.inject_ranks(loaded.model, {"intro": 1, "ending": 2})
    vl.freeze_base(loaded.model, train=["ending.bias"])
    with torch.no_grad():
        loaded.model.ending.bias.fill_(brighter)
    trainable = sum(p.numel() for _, p in vl.trainable_parameters(loaded.model))
    card = Card(
        task="denoise",
        method="colora",
        base=loaded.name,
        digest=loaded.digest,
        trainable=trainable,
        parameters=sum(p.numel() for _, p in base_parameters(loaded.model)),
        parts=parts or {},
    )
    folder.mkdir(parents=True)
    save_adapter(loaded, card, folder)
    return folder
