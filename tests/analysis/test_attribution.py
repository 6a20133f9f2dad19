"""Attribution finds the weights that a change of behaviour is due to."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from visionlora.analysis.attribution import attribute, magnitude, path_gradients, sensitivity
from visionlora.errors import ConfigError


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 4, 1),
        nn.Tanh(),
        nn.Conv2d(4, 2, 3, padding=1),
    ).double()


def weights(model, changed=(), size=0.3):
    """Return the weights, those whose names begin with one of `changed` moved."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: value.detach()
        + (
            size * torch.randn(value.shape, generator=generator, dtype=value.dtype)
            if name.startswith(tuple(changed))
            else 0
        )
        for name, value in model.named_parameters()
    }


def batches(count=3):
    generator = torch.Generator().manual_seed(2)
    return [
        tuple(torch.randn(1, 2, 6, 6, generator=generator, dtype=torch.double) for _ in range(2))
        for _ in range(count)
    ]


def loss(model, batch):
    return F.mse_loss(model(batch[0]), batch[1], reduction="sum")


def with_weights(model, values, batch):
    out = torch.func.functional_call(model, values, (batch[0],))
    return float(F.mse_loss(out, batch[1], reduction="sum"))


def completeness(points, rule="midpoint"):
    """Return how far the signed sum is from the change of the loss, relative to that."""
    model = net()
    start, end = weights(model), weights(model, ("0", "2", "4"))
    (batch,) = batches(1)
    mean = path_gradients(model, start, end, batch, loss, points=points, rule=rule)
    total = sum(float((mean[name] * (start[name] - end[name])).sum()) for name in mean)
    change = with_weights(model, start, batch) - with_weights(model, end, batch)
    return abs(total / change - 1)


def test_signed_scores_add_up_to_the_change_of_the_loss():
    assert completeness(64) < 0.02
    assert completeness(64) < completeness(8) < completeness(2)
    assert completeness(256, "left") < completeness(16, "left")


def test_only_the_layer_that_differs_scores():
    model = net()
    start, end = weights(model), weights(model, ("2",))
    scores = attribute(model, start, end, batches(), loss)
    assert all((scores[name].max() > 0) == name.startswith("2") for name in scores)


def test_the_layer_whose_change_matters_scores_highest():
    model = net()
    start, end = weights(model), weights(model, ("0", "2", "4"), 0.02)
    end["4.weight"] = start["4.weight"] * 3
    means = {n: float(s.mean()) for n, s in attribute(model, start, end, batches(), loss).items()}
    assert max(means, key=means.get) == "4.weight"


def test_order_of_batches_and_direction_do_not_matter():
    model = net()
    start, end = weights(model), weights(model, ("0", "4"))
    one = attribute(model, start, end, batches(), loss)
    for other in (
        attribute(model, start, end, batches()[::-1], loss),
        attribute(model, end, start, batches(), loss),
    ):
        for name, score in one.items():
            torch.testing.assert_close(other[name], score)


def test_the_model_is_as_it_was():
    model = net().train()
    model[0].weight.requires_grad_(False)
    model[2].weight.grad = torch.ones_like(model[2].weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def broken(model, batch):
        raise RuntimeError("stop")

    start, end = weights(model), weights(model, ("0",))
    attribute(model, start, end, batches(1), loss, points=2)
    with pytest.raises(RuntimeError, match="stop"):
        attribute(model, start, end, batches(1), broken)
    sensitivity(model, batches(1), loss)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model[0].weight.requires_grad
    assert model[0].weight.grad is None
    assert model[2].weight.requires_grad
    assert model[2].weight.grad.eq(1).all()


def test_either_end_may_be_the_model_itself():
    model = net()
    start, end = weights(model), weights(model, ("0", "4"))
    wanted = attribute(model, start, end, batches(), loss)
    as_start = attribute(model, dict(model.named_parameters()), end, batches(), loss)
    model.load_state_dict(end)
    as_end = attribute(model, start, model.state_dict(), batches(), loss)
    for name, score in wanted.items():
        assert torch.equal(as_start[name], score)
        assert torch.equal(as_end[name], score)


def test_cheaper_scores_are_what_they_say():
    model = net()
    (batch,) = batches(1)
    loss(model, batch).backward()
    wanted = model[2].weight.grad.abs() * model[2].weight.detach().abs()
    model.zero_grad()
    torch.testing.assert_close(sensitivity(model, [batch], loss)["2.weight"], wanted)
    start, end = weights(model), weights(model, ("2",))
    assert float(magnitude(start, end)["0.weight"].max()) == 0
    assert float(magnitude(start, end)["2.weight"].max()) > 0


def test_what_cannot_be_attributed_is_refused():
    model = net()
    start = weights(model)
    with pytest.raises(ConfigError, match="at least one batch"):
        attribute(model, start, start, [], loss)
    with pytest.raises(ConfigError, match="at least one batch"):
        sensitivity(model, [], loss)
    with pytest.raises(ConfigError, match="no parameter of the model in common"):
        attribute(model, start, {}, batches(1), loss)
    with pytest.raises(ConfigError, match=r"2\.bias is \(4,\)"):
        attribute(model, start, {**start, "2.bias": torch.ones(3)}, batches(1), loss)
    with pytest.raises(ConfigError, match="at least one point"):
        attribute(model, start, start, batches(1), loss, points=0)
