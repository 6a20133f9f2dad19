"""A small run with everything that a resume must restore; also the body of killed processes.

As a script: `toy_training.py slow|distributed FOLDER`.
"""

import contextlib
import json
import sys
import time
from pathlib import Path

import torch
from torch import nn

from visionlora.dynamics import Dynamics
from visionlora.training import (
    RunDirectory,
    StepSampler,
    TrainSettings,
    cosine,
    fit,
    process,
    shard,
)

SIZE, BATCH = 48, 8


class Wobble(Dynamics):
    """Scales gradients by a number that depends on all earlier steps."""

    name = "wobble"

    def __init__(self):
        self.history = torch.zeros(2, dtype=torch.float64)

    def on_grads_ready(self, context):
        self.history = torch.stack([self.history[0] * 0.9 + context.loss, self.history[1] + 1])
        for parameter in context.parameters:
            parameter.grad.mul_(1 + 0.1 * torch.sin(self.history.sum()))

    def state_dict(self):
        return {"history": self.history}

    def load_state_dict(self, state):
        self.history = state["history"]


def toy_model(dropout=0.3, norm=True):
    torch.manual_seed(0)
    layers = [nn.Linear(6, 12), nn.BatchNorm1d(12) if norm else nn.Tanh(), nn.Dropout(dropout)]
    model = nn.Sequential(*layers, nn.Linear(12, 4), nn.Linear(4, 1))
    model[3].requires_grad_(False)
    return model


def toy_data():
    inputs = torch.randn(SIZE, 6, generator=torch.Generator().manual_seed(5))
    return inputs, inputs.square().sum(1, keepdim=True)


def toy_batches(seed=1):
    inputs, targets = toy_data()
    sampler = StepSampler(SIZE, BATCH, seed)

    def batches(step):
        chosen = shard(sampler.indices(step), *process())
        return {"inputs": inputs[chosen], "targets": targets[chosen]}

    return batches


def toy_loss(model, batch):
    return (model(batch["inputs"]) - batch["targets"]).square().mean()


def toy_optimizer(model):
    groups = [
        {"params": model[0].parameters(), "lr": 1e-2},
        {"params": [p for m in (model[1], model[4]) for p in m.parameters()], "lr": 3e-2},
    ]
    return torch.optim.AdamW(groups, weight_decay=0.01)


def toy_fit(model, run, *, steps=12, batches=None, dynamics=None, **settings):
    """Train the toy model with everything switched on."""
    options = {"accumulate": 2, "checkpoint_every": 4, "log_every": 3, "clip_norm": 5.0, **settings}
    return fit(
        model,
        toy_optimizer(model),
        toy_loss,
        batches or toy_batches(),
        TrainSettings(steps=steps, device="cpu", **options),
        run,
        dynamics=[Wobble()] if dynamics is None else dynamics,
        schedule=cosine(steps, warmup=2, floor=0.1),
    )


def exact(model):
    """Return the state of a model as text that is equal only for equal bits."""
    return {
        key: value.double().numpy().tobytes().hex() for key, value in model.state_dict().items()
    }


def slow(folder):
    """Train with a pause in every micro-batch, and mark where it is."""
    source = toy_batches()

    def batches(index):
        (Path(folder) / f"at-{index // 2}").touch()
        time.sleep(0.05)
        return source(index)

    toy_fit(toy_model(), RunDirectory(folder), batches=batches)


def distributed(folder):
    """Train as one of several processes: once whole, once stopped and resumed."""
    options = {"dropout": 0.0, "norm": False}
    folder = Path(folder)
    whole = toy_model(**options)
    result = toy_fit(whole, RunDirectory(folder / "whole"))
    source = toy_batches()

    def failing(index):
        if index == 14:
            raise OSError("power cut")
        return source(index)

    with contextlib.suppress(OSError):
        toy_fit(toy_model(**options), RunDirectory(folder / "stopped"), batches=failing)
    resumed = toy_model(**options)
    again = toy_fit(resumed, RunDirectory(folder / "stopped", resume=True))
    final = {
        "whole": exact(whole),
        "resumed": exact(resumed),
        "resumed_from": again.resumed_from,
        "loss": result.loss,
    }
    (folder / f"final-{process()[0]}.json").write_text(json.dumps(final))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"slow": slow, "distributed": distributed}[sys.argv[1]](sys.argv[2])
