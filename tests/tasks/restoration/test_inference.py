"""Tiles and turns: nothing is lost, nothing is seen, sizes stay."""

import numpy as np
import pytest
import torch
from torch import nn

from tasks.restoration.inference.restore import RestoreOptions, eight_ways, restore
from tasks.restoration.inference.tiling import fade, starts, tiled
from tasks.restoration.networks.catalogue import find_network
from tests.tasks.restoration.pictures import waves
from visionlora.errors import ConfigError


def conv() -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv2d(3, 3, 3, padding=1)


@pytest.mark.parametrize("size", [(1, 1), (37, 53), (64, 64), (100, 20)])
@pytest.mark.parametrize(("tile", "overlap"), [(16, 4), (32, 31), (24, 0)])
def test_the_identity_comes_back(size, tile, overlap):
    picture = torch.rand(3, *size)
    torch.testing.assert_close(tiled(nn.Identity(), picture, tile, overlap), picture)


def test_tiles_cover_everything_and_stay_inside():
    for size in (10, 31, 32, 33, 100):
        found = starts(size, 32, 8)
        covered = {x for start in found for x in range(start, min(start + 32, size))}
        assert covered == set(range(size))
        assert max(found) == max(0, size - 32)


def test_a_conv_net_in_tiles_is_the_whole_inside():
    picture = torch.rand(3, 70, 90)
    with torch.no_grad():
        whole, parts = conv()(picture[None])[0], tiled(conv(), picture, 40, 8)
    # A seam is one pixel wide on either side, where its weight is 1 / 9 of the neighbour's.
    difference = (whole - parts).abs()
    assert (difference > 1e-5).float().mean() < 0.15
    inner = [torch.ones(70, 90, dtype=torch.bool)]
    for start in starts(70, 40, 8):
        for edge in (start, start + 39):
            inner[0][max(edge - 1, 0) : edge + 2] = edge in (0, 69)
    for start in starts(90, 40, 8):
        for edge in (start, start + 39):
            inner[0][:, max(edge - 1, 0) : edge + 2] &= edge in (0, 89)
    assert difference[:, inner[0]].max() < 1e-5


def test_weights_fall_to_the_sides_and_are_never_zero():
    weight = fade((8, 12), 3)
    assert weight.shape == (8, 12)
    assert weight.min() > 0
    assert weight[4, 6] == 1
    assert weight[0, 6] == 0.25


def test_turns_and_mirrorings_are_undone():
    picture = torch.rand(3, 17, 30)
    torch.testing.assert_close(eight_ways(lambda part: part, picture), picture)
    seen = []
    eight_ways(lambda part: seen.append(part.clone()) or part, picture)
    assert len({part.numpy().tobytes() for part in seen}) == 8


def test_an_ensemble_does_not_care_how_a_picture_is_held():
    network, picture = conv(), torch.rand(3, 20, 20)
    with torch.no_grad():
        one = eight_ways(lambda part: network(part[None])[0], picture)
        other = eight_ways(lambda part: network(part[None])[0], picture.flip(2))
    torch.testing.assert_close(one.flip(2), other)


@pytest.mark.parametrize("options", [{}, {"tile": 24, "overlap": 8}, {"ensemble": True}])
@pytest.mark.parametrize("size", [(33, 47), (20, 64)])
def test_networks_keep_odd_sizes(options, size):
    model = find_network("nafnet-tiny").build().eval()
    pixels = waves(0, *size)
    restored = restore(model, pixels, RestoreOptions(**options))
    assert restored.shape == pixels.shape
    assert restored.dtype == np.float32
    assert not restored.flags.writeable or np.isfinite(restored).all()


def test_large_pictures_are_cut_by_themselves():
    sides = []

    class Spy(nn.Module):
        def forward(self, x):
            sides.append(tuple(x.shape[-2:]))
            return x

    pixels = np.zeros((1100, 1101, 3), np.float32)
    restore(Spy(), pixels)
    assert set(sides) == {(512, 512)}
    sides.clear()
    restore(Spy(), pixels, RestoreOptions(tile=0))
    assert sides == [(1100, 1101)]


def test_tiles_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match="overlap by 16"):
        tiled(nn.Identity(), torch.rand(3, 20, 20), 16, 16)
    with pytest.raises(ConfigError, match=r"\[0, 64\), got 64"):
        RestoreOptions(tile=64, overlap=64)
    with pytest.raises(ConfigError, match="negative"):
        RestoreOptions(tile=-1)
