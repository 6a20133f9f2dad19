"""Two processes that train blocks, halves or entries do what one process does with all examples."""

import json
import sys
from pathlib import Path

import pytest
import torch

import visionlora as vl
from tests.dynamics.towers_in_blocks import batches, loss, tower
from tests.pair import run_pair
from tests.training.toy_training import exact
from visionlora.compose import parse
from visionlora.training import RunDirectory, TrainSettings, fit, process, shard

STEPS = 12
RECIPES = {
    "lisa": "lisa(gamma=1,every=3)",
    "hft": "hft(reselect_every=4)",
    "spiel": "spiel(density=0.3,every=4,observe=2)",
    "spiel-batch": "spiel(density=0.3,every=4,observe=2,candidates=batch)",
    "spiel-sm3": "spiel(density=0.3,every=4,observe=2,selection=sm3)",
}


def part(index):
    """Return the examples of a micro-batch that this process has."""
    inputs, targets = batches(index)
    chosen = shard(list(range(len(inputs))), *process())
    return inputs[chosen], targets[chosen]


def train(case, folder):
    recipe = parse(RECIPES[case])
    model = vl.inject(tower(), recipe.config(), "blocks.*")
    parameters = [item for _, item in vl.trainable_parameters(model)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    fit(
        model,
        optimizer,
        loss,
        part,
        TrainSettings(steps=STEPS, accumulate=2, device="cpu", checkpoint_every=0),
        RunDirectory(folder),
        dynamics=recipe.build_dynamics(model, optimizer, STEPS),
    )
    return model


def both(folder):
    """Train as one of two processes."""
    for case in RECIPES:
        here = Path(folder) / case
        here.mkdir(exist_ok=True)
        model = train(case, here / "run")
        torch.save([exact(model), model.state_dict()], here / f"final-{process()[0]}.pt")


@pytest.fixture(scope="module")
def finals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    run_pair(__file__, str(folder))
    return folder


@pytest.mark.parametrize("case", RECIPES)
def test_two_processes_do_what_one_does(case, finals, tmp_path):
    (one, state), (other, _) = (torch.load(finals / case / f"final-{i}.pt") for i in range(2))
    assert json.dumps(one) == json.dumps(other)
    alone = train(case, tmp_path)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-8, atol=1e-9)


if __name__ == "__main__":
    torch.set_num_threads(1)
    both(sys.argv[1])
