"""Replacing, dropping, adding and regrouping parameters of a running optimiser."""

import pytest
import torch
from torch import nn

from visionlora.errors import ConfigError
from visionlora.ranks.optimizer import add, drop, group_of, move, replace, set_rates, warm_up


def parameters(*shapes):
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]


def step(optimizer, tensors):
    optimizer.zero_grad()
    sum(item.square().sum() + item.sum() for item in tensors).backward()
    optimizer.step()


@pytest.fixture(
    params=[torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop], ids=lambda kind: kind.__name__
)
def running(request):
    tensors = parameters((3, 4), (5, 3), (2,))
    options = {"momentum": 0.9} if request.param is not torch.optim.AdamW else {}
    groups = [{"params": tensors[:2]}, {"params": tensors[2:], "lr": 0.3}]
    optimizer = request.param(groups, lr=0.1, **options)
    for _ in range(3):
        step(optimizer, tensors)
    return optimizer, tensors


def held(optimizer):
    return [[id(item) for item in group["params"]] for group in optimizer.param_groups]


def test_a_replacement_takes_the_place_and_is_trained_while_the_old_one_rests(running):
    optimizer, (A, B, g) = running
    (new,) = parameters((2, 4))
    kept = A.detach().clone()
    replace(optimizer, A, new)
    assert held(optimizer) == [[id(new), id(B)], [id(g)]]
    before = new.detach().clone()
    step(optimizer, [A, new, B, g])
    assert not torch.equal(new, before)
    assert torch.equal(A, kept)
    assert A not in optimizer.state


def test_without_carry_the_state_starts_afresh(running):
    optimizer, (A, B, g) = running
    (new,) = parameters((3, 4))
    replace(optimizer, A, new)
    fresh = nn.Parameter(new.detach().clone())
    group = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    other = type(optimizer)([{"params": [fresh], **group}])
    step(optimizer, [new, B, g])
    step(other, [fresh])
    assert torch.equal(new, fresh)


def test_carried_state_makes_the_kept_rows_go_on_as_if_nothing_happened(running):
    optimizer, (A, B, g) = running
    keep = torch.tensor([0, 2])
    new = nn.Parameter(A.detach()[keep].clone())
    whole = nn.Parameter(A.detach().clone())
    twin = type(optimizer)(
        [
            {"params": [whole]}
            | {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
        ]
    )
    twin.state[whole] = {
        k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in optimizer.state[A].items()
    }
    replace(optimizer, A, new, carry=lambda moment: moment[keep])
    step(optimizer, [new, B, g])
    step(twin, [whole])
    assert torch.equal(new, whole[keep])


def test_dropping_forgets_state_and_empty_groups(running):
    optimizer, (A, B, g) = running
    drop(optimizer, [g, A])
    assert held(optimizer) == [[id(B)]]
    assert set(optimizer.state) == {B}


def test_an_added_group_copies_the_options_but_not_the_warm_up(running):
    optimizer, (_, _, g) = running
    set_rates(optimizer, 0, 0.5)
    warm_up(group_of(optimizer, g), 10, 4)
    (new,) = parameters((4,))
    group = add(optimizer, [new], like=g, weight_decay=0.0)
    assert group["initial_lr"] == 0.3
    assert group["weight_decay"] == 0.0
    rates = []
    for now in (9, 10, 12, 14, 20):
        set_rates(optimizer, now, 0.5)
        rates.append([item["lr"] for item in optimizer.param_groups])
    assert [rate[1] for rate in rates] == [0, 0, 0.075, 0.15, 0.15]
    assert [rate[2] for rate in rates] == [0.15] * 5
    assert [rate[0] for rate in rates] == [0.05] * 5


def test_a_new_group_with_its_own_rate_follows_the_schedule_from_it(running):
    optimizer, (A, *_) = running
    set_rates(optimizer, 0, 0.5)
    (new,) = parameters((4,))
    add(optimizer, [new], like=A, lr=0.02)
    set_rates(optimizer, 1, 0.25)
    assert optimizer.param_groups[-1]["lr"] == 0.005


def test_moving_keeps_state_and_changes_only_what_is_said(running):
    optimizer, (A, B, g) = running
    state = optimizer.state.get(B)
    move(optimizer, [B], weight_decay=0.0)
    assert held(optimizer) == [[id(A)], [id(g)], [id(B)]]
    assert optimizer.state.get(B) is state
    assert optimizer.param_groups[2]["lr"] == 0.1
    assert optimizer.param_groups[2]["weight_decay"] == 0.0
    before = B.detach().clone()
    step(optimizer, [A, B, g])
    assert not torch.equal(B, before)


def test_moving_from_several_groups_keeps_their_rates_apart(running):
    optimizer, (A, B, g) = running
    made = move(optimizer, [g, A], weight_decay=0.25)
    assert held(optimizer) == [[id(B)], [id(A)], [id(g)]]
    assert [group["lr"] for group in made] == [0.1, 0.3]
    assert [group["weight_decay"] for group in made] == [0.25, 0.25]


def test_moving_everything_leaves_no_empty_group(running):
    optimizer, tensors = running
    before = held(optimizer)
    move(optimizer, tensors)
    assert held(optimizer) == before


def test_a_parameter_that_is_not_there_is_refused_and_nothing_changes(running):
    optimizer, _ = running
    before = held(optimizer)
    for change in (
        lambda a, b: replace(optimizer, a, b),
        lambda a, b: add(optimizer, [b], a),
        lambda a, b: move(optimizer, [a, b]),
    ):
        with pytest.raises(ConfigError, match="does not hold the parameter of shape"):
            change(*parameters((2,), (2,)))
        assert held(optimizer) == before
