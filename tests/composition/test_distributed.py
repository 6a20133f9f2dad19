"""Two processes train what one does: starts, masks, moments and parameters."""

import pytest

from tests.composition import runs
from tests.composition.runs import CASES, assert_same, told
from tests.pair import run_pair
from visionlora.training.tree import read_tree


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train all cases in one pair of processes."""
    folder = tmp_path_factory.mktemp("pair")
    run_pair(runs.__file__, "pair", str(folder))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(case, trained, plain):
    one, other = (read_tree(trained / case / f"final-{rank}.safetensors") for rank in range(2))
    assert_same(other, one)
    alone = plain(case)
    assert_same(one["report"], told(alone), factor=1.0)
    assert_same(one["model"], dict(alone.model.state_dict()), factor=1.0)
    assert_same(runs.left(trained / case), alone.left(), factor=1.0)


def test_data_that_end_in_one_process_stop_both_and_lose_nothing(trained, plain):
    one, other = ((trained / f"ended-{rank}").read_text() for rank in range(2))
    assert one == other
    assert "ended after 5 of 8 steps" in one
    assert_same(runs.left(trained / "ended"), plain("lora").left(), factor=1.0)
