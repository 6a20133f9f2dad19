"""Two processes that each see a part of the data know what one process knows of all of it."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

import visionlora as vl
from tests.init.looking import cross_entropy, tower, vectors
from tests.pair import run_pair
from tests.tolerances import assert_close
from visionlora.errors import DataError
from visionlora.init.base import Components
from visionlora.init.stats import collect

ALL = {"gradient", "covariance", "components"}
SIZES = (4, 3, 5, 2)


def fresh():
    torch.default_generator.manual_seed(0)
    return tower()


def tensors(stats):
    result = {}
    for name, site in stats.sites.items():
        for kind, value in vars(site).items():
            parts = vars(value) if isinstance(value, Components) else {"": value}
            result |= {f"{name}.{kind}.{part}": tensor.clone() for part, tensor in parts.items()}
    return result


def look(batches, **options):
    return collect(fresh(), batches, cross_entropy, needs=ALL, components=4, **options)


def one_of_two(folder):
    """What one process does; uneven parts, so that a mean of means would be wrong."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    mine = vectors(SIZES)[:1] if rank == 0 else vectors(SIZES)[1:]
    stats = look(mine)
    save_file(tensors(stats), folder / f"plain-{rank}.safetensors")
    save_file(tensors(look(mine, sketch=1)), folder / f"sketch-{rank}.safetensors")
    report = {"figures": [stats.loss, stats.batches, stats.samples], "cached": []}
    cache = folder / "cache.safetensors"
    for batches in (mine, mine, mine if rank == 0 else mine[::-1]):
        # The third time only one of them has other data, and both must collect again.
        report["cached"].append(look(batches, cache=cache).cached)
    for broken in ([], mine):
        try:
            look(broken if rank == 1 else mine, count=1 if rank == 0 else 2)
            report.setdefault("errors", []).append("")
        except DataError as error:
            report.setdefault("errors", []).append(str(error))
    model = fresh()
    vl.initialise(model, "eva", mine, cross_entropy, tau=0.9)
    save_file(vl.adapter_state_dict(model), folder / f"eva-{rank}.safetensors")
    (folder / f"report-{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Run both processes and return the folder of what they found."""
    folder = tmp_path_factory.mktemp("two")
    run_pair("-m", "tests.init.test_stats_distributed", str(folder))
    return folder


def reports(folder):
    return [json.loads((folder / f"report-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize(("kind", "options"), [("plain", {}), ("sketch", {"sketch": 1})])
def test_the_statistics_are_those_of_all_data(both, kind, options):
    expected = tensors(look(vectors(SIZES), **options))
    for rank in range(2):
        found = load_file(both / f"{kind}-{rank}.safetensors")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            if name.endswith("vectors"):  # those of no variance are any
                present = expected[name.replace("vectors", "singular")] > 1e-6
                assert_close(found[name][present], value[present])
            else:
                assert_close(found[name], value)


def test_figures_are_those_of_all_data(both):
    alone = look(vectors(SIZES))
    for report in reports(both):
        loss, batches, samples = report["figures"]
        assert loss == pytest.approx(alone.loss, rel=1e-12)
        assert (batches, samples) == (4, 14)


def test_both_processes_start_alike(both):
    one, other = (load_file(both / f"eva-{rank}.safetensors") for rank in range(2))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_cache_is_used_by_both_or_by_none(both):
    assert [report["cached"] for report in reports(both)] == [[False, True, False]] * 2


def test_a_failure_of_one_process_ends_both(both):
    errors = [report["errors"] for report in reports(both)]
    assert "only 0 came" in errors[1][0]
    assert "another process" in errors[0][0]
    assert errors[0][1] == errors[1][1] == ""


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]))
