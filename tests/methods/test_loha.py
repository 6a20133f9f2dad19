"""LoHa: rank r^2, one factor pair of that width, and when it is cheaper than the dense change."""

import pytest
import torch
from torch import nn

from tests.methods.single_layer import adapt, change, delta_of, rank
from tests.tolerances import assert_close
from visionlora.hosts.changes import dense_is_cheaper


@pytest.mark.parametrize(("r", "expected"), [(1, 1), (2, 4), (3, 9), (4, 12)])
def test_the_rank_is_r_squared_up_to_that_of_the_site(r, expected):
    assert rank(change(adapt(nn.Linear(16, 12), "loha", rank=r))) == expected


@pytest.mark.parametrize("layer", [nn.Linear(16, 12), nn.Conv2d(4, 6, 3), nn.Embedding(11, 8)])
def test_the_pair_of_width_r_squared_is_the_hadamard_product(layer):
    model = adapt(layer, "loha", rank=3, alpha=2.0)
    delta = delta_of(model)
    up, down = delta.factors()
    assert up.shape[1] == down.shape[0] == 9
    assert_close(delta.scale * up @ down, change(model))


def test_the_pair_is_used_up_to_rank_eleven_at_768():
    weight = torch.empty(768, 768, device="meta")
    for r, dense in ((8, False), (11, False), (12, True)):
        pair = torch.empty(768, r * r, device="meta"), torch.empty(r * r, 768, device="meta")
        assert dense_is_cheaper(pair, weight, tokens=10**6) is dense


def test_initial_values():
    delta = delta_of(adapt(nn.Linear(256, 128), "loha", rank=4, random=False))
    for item, bound in ((delta.A1, 256**-0.5), (delta.B1, 4**-0.5), (delta.B2, 4**-0.5)):
        assert 0.95 * bound < float(item.detach().abs().max()) <= bound
    assert not delta.A2.any()
    tokens = delta_of(adapt(nn.Embedding(200, 8), "loha", rank=4, random=False))
    assert 0.95 < float(tokens.A1.detach().abs().max()) <= 1
