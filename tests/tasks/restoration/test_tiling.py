"""Restoring row by row: memory of one row of tiles, and the same picture as in one piece."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from tasks.restoration.images import to_levels
from tasks.restoration.inference.restore import RestoreOptions, restore
from tasks.restoration.inference.restorer import Restorer, RestorerConfig
from tasks.restoration.inference.tiling import bands, fade, starts, tiled
from tests.tasks.restoration.pictures import waves
from tests.tasks.restoration.small_networks import write_base
from visionlora.errors import ConfigError, DataError

TILES = RestoreOptions(tile=24, overlap=8)


class Conv(nn.Conv2d):
    """A network that sees 3 x 3 pixels, and notes the sizes it gets."""

    def __init__(self) -> None:
        super().__init__(3, 3, 3, padding=1)
        self.sides: list[tuple[int, ...]] = []

    def forward(self, x):
        self.sides.append(tuple(x.shape[-2:]))
        return super().forward(x)


def levels(dtype=np.uint8, height=61, width=45):
    return to_levels(waves(3, height, width), dtype)


def test_rows_come_once_each_and_only_a_row_of_tiles_is_read():
    picture, reads, tops = torch.rand(3, 100, 37), [], []

    def read(top, stop):
        reads.append(stop - top)
        return picture[:, top:stop]

    for top, rows in bands(lambda part: part, read, (100, 37), 24, 8):
        tops += range(top, top + rows.shape[1])
        torch.testing.assert_close(rows, picture[:, top : top + rows.shape[1]])
    assert tops == list(range(100))
    assert max(reads) == 24


@pytest.mark.parametrize("overlap", [0, 8, 20, 31])
def test_sums_over_rows_of_tiles_are_those_over_the_whole(overlap):
    picture = torch.rand(3, 75, 50)

    def network(part):  # depends on where in the tile a pixel is
        return part + torch.linspace(0, 1, part.shape[1])[:, None]

    total, weights = torch.zeros(3, 75, 50), torch.zeros(1, 75, 50)
    for top in starts(75, 32, overlap):
        for left in starts(50, 32, overlap):
            place = (slice(None), slice(top, top + 32), slice(left, left + 32))
            weight = fade(picture[place].shape[1:], overlap)
            total[place] += network(picture[place]) * weight
            weights[place] += weight
    torch.testing.assert_close(tiled(network, picture, 32, overlap), total / weights)


def test_one_piece_is_what_the_network_says_to_the_bit():
    network, pixels = Conv(), waves(0, 33, 47)
    with torch.no_grad():
        wanted = network(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0].permute(1, 2, 0)
    assert np.array_equal(restore(network, pixels), wanted.numpy())


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("options", [RestoreOptions(), TILES])
def test_levels_are_restored_as_floats_are(dtype, options):
    network, stored = Conv(), levels(dtype)
    found = restore(network, stored, options)
    assert found.dtype == dtype
    pixels = stored.astype(np.float32) / np.iinfo(dtype).max
    wanted = to_levels(restore(network, pixels, options), dtype)
    assert np.abs(found.astype(int) - wanted.astype(int)).max() <= 1
    assert np.array_equal(restore(nn.Identity(), stored, options), stored)


def test_tiles_of_a_conv_net_are_the_whole_away_from_seams():
    network, pixels = Conv(), waves(1, 70, 90)
    whole, parts = restore(network, pixels), restore(network, pixels, TILES)
    wrong = (np.abs(whole - parts) > 1e-5).any(axis=2)
    seams = np.zeros((70, 90), bool)
    for start in (0, 16, 32, 46):
        seams[[start, start + 23]] = True
    for start in (0, 16, 32, 48, 64, 66):
        seams[:, [start, start + 23]] = True
    assert wrong.any()  # the seams are there, or this test sees nothing
    assert not wrong[~seams].any()


def test_an_ensemble_of_tiles_turns_every_tile():
    network, pixels = Conv(), waves(2, 50, 40)
    tiles = RestoreOptions(tile=24, overlap=8, ensemble=True)
    told = []
    found = restore(network, pixels, tiles, on_tile=lambda *at: told.append(at))
    assert set(network.sides) == {(24, 24)}
    assert told == [(number, 6) for number in range(1, 7)]
    assert len(network.sides) == 8 * 6
    with torch.no_grad():
        whole = restore(network, pixels, RestoreOptions(ensemble=True))
    assert np.median(np.abs(found - whole)) < 1e-6


def test_half_precision_is_near_and_comes_back_as_floats(tmp_path):
    base = str(write_base(tmp_path / "base.safetensors", change=1))
    exact, half = (
        Restorer(RestorerConfig(base=base, device="cpu", precision=precision))(waves(0))
        for precision in ("fp32", "bf16")
    )
    assert half.dtype == np.float32
    assert not np.array_equal(exact, half)
    assert np.abs(half - exact).max() < 0.02


def test_networks_that_enlarge_are_refused():
    with pytest.raises(ConfigError, match="keeps the size"):
        restore(nn.Upsample(scale_factor=2), waves(0))


@pytest.mark.parametrize("pixels", [waves(0), levels()])
def test_output_that_is_not_finite_is_an_error(pixels):
    network = Conv()
    with torch.no_grad():
        network.bias[0] = float("nan")
    with pytest.raises(DataError, match="not finite"):
        restore(network, pixels)


class Hungry(nn.Module):
    """Has memory for so many pixels only."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.pixels = pixels

    def forward(self, x):
        if x.shape[-1] * x.shape[-2] > self.pixels:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to ...")
        return 1 - x


def running(folder, model) -> Restorer:
    """Return a restorer of a given network."""
    base = str(write_base(folder / "base.safetensors"))
    restorer = Restorer(RestorerConfig(base=base, device="cpu"))
    restorer.base = dataclasses.replace(restorer.base, model=model)
    return restorer


def test_without_enough_memory_tiles_become_smaller(tmp_path, capsys):
    restorer = running(tmp_path, Hungry(110 * 110))
    stored = levels(height=150, width=210)
    assert np.array_equal(restorer(stored), 255 - stored)
    assert "tiles of 104 px" in capsys.readouterr().err
    restorer = running(tmp_path, Hungry(100))
    with pytest.raises(DataError, match="memory of cpu does not suffice"):
        restorer(stored)


def test_other_errors_of_a_network_are_not_taken_for_memory(tmp_path):
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        running(tmp_path, nn.Linear(7, 7))(levels())
