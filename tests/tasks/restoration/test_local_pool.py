"""Local means: windows as they are defined, the plain mean where a window covers the map."""

import numpy as np
import pytest
import torch

from tasks.restoration.inference.restore import restore
from tasks.restoration.inference.restorer import Restorer, RestorerConfig
from tasks.restoration.networks.catalogue import find_network
from tasks.restoration.networks.files import save_base
from tasks.restoration.networks.local_pool import LocalMean, local_means
from tests.tasks.restoration.pictures import waves
from visionlora.errors import ConfigError


def nafnet():
    torch.manual_seed(0)
    model = find_network("nafnet-tiny").build().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("beta", "gamma")):
                parameter.normal_(0, 0.3)
    return model


@pytest.mark.parametrize("window", [(3, 5), (4, 4), (1, 1), (20, 5)])
def test_means_are_those_of_the_windows(window):
    x = torch.randn(2, 3, 11, 13, dtype=torch.double)
    means = LocalMean(window)(x)
    h, w = min(window[0], 11), min(window[1], 13)
    inner = x.unfold(2, h, 1).unfold(3, w, 1).mean(dim=(-1, -2))
    top, left = (11 - inner.shape[2]) // 2, (13 - inner.shape[3]) // 2
    assert means.shape == x.shape
    place = means[:, :, top : top + inner.shape[2], left : left + inner.shape[3]]
    torch.testing.assert_close(place.float(), inner.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(means[..., 0, left], means[..., top, left])


def test_a_window_over_the_map_is_the_plain_mean():
    model, picture = nafnet(), torch.rand(1, 3, 24, 32)
    with torch.no_grad():
        plain = model(picture)
        with local_means(model, 32):
            torch.testing.assert_close(model(picture), plain)
        with local_means(model, 8):
            assert not torch.allclose(model(picture), plain, atol=1e-4)
        assert torch.equal(model(picture), plain)


def test_local_means_do_not_look_at_the_other_end_of_a_picture():
    model = nafnet()
    one = torch.rand(1, 3, 16, 256)
    other = one.clone()
    other[..., 200:] = 0
    with torch.no_grad():
        seen = (model(one) - model(other))[..., :40].abs().max()
        with local_means(model, 8):
            local = (model(one) - model(other))[..., :40].abs().max()
    assert seen > 1e-4
    assert local < 1e-6


def test_other_networks_and_windows_are_refused():
    with (
        pytest.raises(ConfigError, match="this is a Linear"),
        local_means(torch.nn.Linear(1, 1), 8),
    ):
        pass
    with pytest.raises(ConfigError, match="is none"), local_means(nafnet(), 0):
        pass


def test_a_restorer_takes_local_means(tmp_path):
    model, spec = nafnet(), find_network("nafnet-tiny")
    path = str(save_base(model, spec, tmp_path / "base.safetensors"))
    pixels = waves(0, 40, 64)
    plain, local = (
        Restorer(RestorerConfig(base=path, local_means=side))(pixels) for side in (None, 8)
    )
    with local_means(model, 8):
        np.testing.assert_allclose(local, restore(model, pixels), atol=1e-6)
    assert not np.allclose(local, plain, atol=1e-4)
    with pytest.raises(ConfigError, match="this is a Restormer"):
        Restorer(RestorerConfig(base="restormer-tiny:random", local_means=8))
    with pytest.raises(ConfigError, match="--local-means must be at least 1"):
        RestorerConfig(local_means=0)
