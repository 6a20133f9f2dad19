"""Two processes take the same decisions as one, and a run of both resumes exactly."""

import contextlib
import json
import sys
from pathlib import Path

import pytest
import torch

from tests.pair import run_pair
from tests.ranks.cases import METHODS, STEPS
from tests.ranks.planted import Problem, ranks
from tests.training.toy_training import exact
from visionlora.ranks.structure import places_of
from visionlora.training import process, shard

CASES = ["adalora", "increlora", "diffora"]


def problem():
    return Problem(noise=0.2, examples=24)


def batches(step):
    inputs, targets = problem().batches(step)
    chosen = shard(list(range(len(inputs))), *process())
    return inputs[chosen], targets[chosen]


def train(case, folder, source=batches, **settings):
    method, options = METHODS[case]
    model = problem().model(method, **options)
    problem().fit(model, folder, steps=STEPS, batches=source, checkpoint_every=5, **settings)
    return model


def decisions(model):
    """Return ranks, and who has parameters of its own."""
    own = {place.name: len(list(place.delta.parameters())) for place in places_of(model)}
    return [ranks(model), own]


def both(folder):
    """Train as one of two processes: once whole, once stopped and resumed."""

    def failing(step):
        if step == 17:
            raise OSError("power cut")
        return batches(step)

    for case in CASES:
        here = Path(folder) / case
        whole = train(case, here / "whole")
        with contextlib.suppress(OSError):
            train(case, here / "stopped", failing)
        resumed = train(case, here / "stopped", resume=True)
        text = json.dumps([decisions(whole), exact(whole), exact(resumed)])
        (here / f"final-{process()[0]}.json").write_text(text)


@pytest.fixture(scope="module")
def finals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    run_pair(__file__, str(folder))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_both_processes_decide_alike_resume_exactly_and_decide_as_one(case, finals, tmp_path):
    one, other = (
        json.loads((finals / case / f"final-{rank}.json").read_text()) for rank in range(2)
    )
    assert one == other
    decided, whole, resumed = one
    assert whole == resumed
    alone = train(case, tmp_path)
    assert json.loads(json.dumps(decisions(alone))) == decided


if __name__ == "__main__":
    torch.set_num_threads(1)
    both(sys.argv[1])
