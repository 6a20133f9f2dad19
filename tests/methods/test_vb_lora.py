"""VB-LoRA: pieces are mixtures of bank vectors."""

import pytest
import torch
from torch import nn

import visionlora as vl
from tests.tolerances import assert_close
from visionlora.errors import ConfigError
from visionlora.methods.vb_lora import VBLoRA, VBLoRAConfig, VectorBank

SMALL = {"rank": 2, "bank": 5, "block": 4, "top_k": 2}


def adapt(*shapes, **options):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(*shape) for shape in shapes)).double()
    return vl.inject(model, "vb-lora", targets="type:Linear", **{**SMALL, **options})


def delta_of(model, index=0):
    return model[index].adapters["default"]["weight"]


def bank_of(model):
    return model.visionlora_shared["default"].bank


@torch.no_grad()
def spread(model):
    for _, item in vl.trainable_parameters(model):
        item.normal_()
    return model


def test_every_piece_is_the_mixture_of_its_best_vectors():
    model = spread(adapt((8, 12)))
    delta, bank = delta_of(model), bank_of(model).detach()

    def piece(logits):
        logits = logits.detach()
        order = sorted(range(5), key=lambda i: -float(logits[i]))[:2]
        weights = torch.softmax(torch.stack([logits[i] for i in order]), 0)
        return sum(weight * bank[i] for weight, i in zip(weights, order, strict=True))

    A = torch.stack([torch.cat([piece(l) for l in row]) for row in delta.logits_A])
    columns = [torch.cat([piece(delta.logits_B[t, c]) for t in range(3)]) for c in range(2)]
    B = torch.stack(columns, 1)
    assert A.shape == (2, 8)
    assert B.shape == (12, 2)
    assert_close(delta.delta(model[0].weight), B @ A)


def test_only_chosen_logits_and_vectors_get_gradients():
    model = spread(adapt((8, 12)))
    model(torch.randn(3, 8, dtype=torch.float64)).square().sum().backward()
    delta = delta_of(model)
    used = set()
    for logits in (delta.logits_A, delta.logits_B):
        chosen = torch.zeros_like(logits).scatter(-1, logits.topk(2).indices, 1.0).bool()
        assert not bool(logits.grad[~chosen].any())
        assert bool(logits.grad[chosen].all())
        assert_close(logits.grad.sum(-1), torch.zeros(logits.shape[:-1], dtype=torch.float64))
        used |= set(logits.topk(2).indices.flatten().tolist())
    rows = bank_of(model).grad.abs().sum(1) > 0
    assert {i for i in range(5) if bool(rows[i])} == used


def test_all_logits_mixed_is_a_plain_softmax():
    model = spread(adapt((8, 12), top_k=5))
    delta, bank = delta_of(model), bank_of(model)
    expected = torch.einsum("rph,hb->rpb", delta.logits_A.softmax(-1), bank).flatten(1)
    assert_close(delta.factors()[1], expected)


def test_counts():
    config = VBLoRAConfig()
    assert VBLoRA.parameter_count(config, 768, 768) == 4 * (3 + 3) * 256
    assert VectorBank.parameter_count(config, []) == 256 * 256
    model = adapt((8, 12), (12, 8))
    count = sum(item.numel() for _, item in vl.trainable_parameters(model))
    assert count == 5 * 4 + 2 * (2 * 5 * 5)


def test_the_initial_change_is_small_and_logits_learn_faster_than_the_bank():
    model = adapt((64, 64), block=16, bank=50)
    bank = bank_of(model).detach()
    assert 0.95 * 0.02 < float(bank.abs().max()) <= 0.02
    logits = torch.cat([item.detach().flatten() for item in delta_of(model).parameters()])
    assert abs(float(logits.std()) - 0.1) < 0.01
    assert 0 < float(delta_of(model).delta(model[0].weight).detach().abs().max()) < 1e-2
    groups = vl.parameter_groups(model, 1e-3, 0.0)
    rates = {id(item): group["lr"] for group in groups for item in group["params"]}
    assert rates[id(bank_of(model))] == 1e-3
    assert rates[id(delta_of(model).logits_A)] == pytest.approx(1e-2)


def test_one_bank_serves_all_sites():
    model = spread(adapt((8, 12), (12, 8)))
    before = [delta_of(model, i).delta(model[i].weight).detach() for i in (0, 1)]
    with torch.no_grad():
        bank_of(model).mul_(2)
    for index in (0, 1):
        after = delta_of(model, index).delta(model[index].weight)
        assert_close(after, 4 * before[index])
    assert sum("bank" in key for key in model.state_dict()) == 1


def test_what_cannot_be_cut_into_blocks_is_refused():
    for options, message in [
        ({"block": 5}, r"block 5 does not divide.*12 x 8.*divisors of 4"),
        ({"block": 8}, r"block 8 does not divide.*12 x 8"),
        ({"rank": 9}, r"rank 9.*at most 8"),
        ({"top_k": 6}, "top_k must be at most the bank's 5"),
        ({"bank": 0}, "bank must be at least 1"),
    ]:
        with pytest.raises(ConfigError, match=message):
            adapt((8, 12), **options)
    conv = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    with pytest.raises(ConfigError, match=r"8 x 18.*divisors of 2"):
        vl.inject(conv, "vb-lora", targets="0", **SMALL)
    vl.inject(conv, "vb-lora", targets="0", **{**SMALL, "block": 2})
