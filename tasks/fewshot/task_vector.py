"""The vector that tells a generator which few-shot task an adapter is for.

    c = [mean of the unit image features of the support set, mean of the unit class-text features]

Both come from the base model, so the vector of a new task needs no training.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from jaxtyping import Float
from torch import Tensor

import visionlora as vl
from tasks.fewshot.classifier import Classifier
from tasks.fewshot.text import text_features
from visionlora.errors import DataError
from visionlora.record import adapter_names

BATCH = 64


@torch.no_grad()
def task_vector(model: Classifier, images: Sequence[Tensor]) -> Float[Tensor, " condition"]:
    """Return the task vector of support images `uint8 [3, H, W]` and the classes of `model`."""
    if not images:
        raise DataError("a task vector needs at least one support image")
    model.eval()
    device = model.mean.device
    with vl.disabled(model.clip) if adapter_names(model.clip) else nullcontext():
        features = [
            model.image_features(torch.stack(list(images[start : start + BATCH])).to(device))
            for start in range(0, len(images), BATCH)
        ]
        text = text_features(model.clip, model.tokens)
    return torch.cat([torch.cat(features).mean(0), text.mean(0)]).float().cpu()
