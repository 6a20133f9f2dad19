"""Compressing adapters: the algebra against the dense SVD, and the verbs on live models."""

import dataclasses

import pytest
import torch
from torch import nn

import visionlora as vl
from tests.contract.cases import DEFAULTS, adapted, assert_unchanged, is_routed, refused, snapshot
from tests.contract.kinds import KINDS, WIDTH
from tests.mixed import INDEX, TARGETS, Net
from tests.tolerances import assert_close
from visionlora.errors import AdapterStateError, ConfigError
from visionlora.ranks import allocation, factors
from visionlora.ranks.combine import combine
from visionlora.ranks.squeeze import squeeze


def pair(out=9, columns=7, rank=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((out, rank), (rank, columns))
    return tuple(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)


# -- algebra


@pytest.mark.parametrize(("out", "columns", "rank"), [(9, 7, 5), (4, 20, 4), (20, 4, 6), (3, 3, 8)])
def test_the_error_is_that_of_eckart_and_young(out, columns, rank):
    up, down = pair(out, columns, rank)
    triples = factors.singular_triples(up, down)
    u, values, v = torch.linalg.svd(up @ down, full_matrices=False)
    assert_close(triples.values[: min(out, columns)], values[: len(triples.values)])
    for kept in range(min(out, columns, rank) + 1):
        new_up, new_down = triples.pair(kept)
        best = (u[:, :kept] * values[:kept]) @ v[:kept]
        assert_close(new_up @ new_down, best)
        error = torch.linalg.matrix_norm(up @ down - new_up @ new_down)
        assert triples.error(kept) == pytest.approx(float(error), abs=1e-10)
        assert triples.error(kept) == pytest.approx(float(values[kept:].square().sum().sqrt()))


def test_both_factors_carry_the_same_share_and_the_sign_of_the_factor():
    triples = factors.singular_triples(*pair())
    up, down = triples.pair(3, factor=-2.5)
    whole = triples.pair(3)
    assert_close(up @ down, -2.5 * whole[0] @ whole[1])
    assert_close(up.norm(dim=0), down.norm(dim=1))


def test_directions_of_value_zero_stay_trainable():
    up, down = pair(rank=4)
    up = up.clone()
    up[:, 2:] = 0
    new_up, new_down = factors.singular_triples(up, down).pair(4)
    assert_close(new_up @ new_down, up @ down)
    assert torch.equal(new_up[:, 2:], torch.zeros(9, 2, dtype=torch.float64))
    assert bool((new_down.norm(dim=1) > 0.1).all())
    zero = factors.singular_triples(torch.zeros_like(up), down).pair(2)
    assert not zero[0].any()
    assert bool((zero[1].norm(dim=1) > 0.1).all())


def test_random_probes_come_close_to_the_exact_triples():
    generator = torch.Generator().manual_seed(3)
    up, down = pair(60, 50, 40)
    decay = 0.7 ** torch.arange(40, dtype=torch.float64)
    left, right = torch.linalg.qr(up).Q, torch.linalg.qr(down.t()).Q
    up, down = left * decay, right.t()
    exact = factors.singular_triples(up, down)
    near = factors.leading_triples(up, down, 6, generator)
    torch.testing.assert_close(near.values, exact.values[:6], rtol=1e-5, atol=0)
    for kept in (3, 6):
        product = torch.matmul(*near.pair(kept))
        error = float(torch.linalg.matrix_norm(up @ down - product))
        assert error == pytest.approx(exact.error(kept), rel=1e-3)
        assert near.error(kept) == pytest.approx(exact.error(kept), rel=1e-3)
    assert near.energy == pytest.approx(exact.energy)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99, 1.0])
def test_the_energy_rank_is_the_smallest_that_suffices(share):
    values = factors.singular_triples(*pair()).values
    rank = allocation.rank_for_energy(values, share)
    whole = float(values.square().sum())
    assert float(values[:rank].square().sum()) >= share * whole * (1 - 1e-9)
    assert float(values[: rank - 1].square().sum()) < share * whole
    assert allocation.rank_for_energy(torch.zeros(4), share) == 0


def test_a_budget_goes_to_the_largest_values_of_all_sites():
    spectra = [torch.tensor([5.0, 3.0, 1.0]), torch.tensor([4.0, 2.0]), torch.tensor([0.5, 0.0])]
    given = [allocation.ranks_for_budget(spectra, budget) for budget in range(1, 9)]
    assert given[:4] == [[1, 0, 0], [1, 1, 0], [2, 1, 0], [2, 2, 0]]
    assert given[5:] == [[3, 2, 1]] * 3  # nothing is handed out for a value of zero
    ties = allocation.ranks_for_budget([torch.ones(3), torch.ones(3)], 4)
    assert sum(ties) == 4


def test_stacked_pairs_are_the_sum():
    pairs = [pair(rank=2, seed=1), pair(rank=3, seed=2)]
    up, down = factors.stack(pairs)
    assert up.shape[1] == 5
    assert_close(up @ down, sum(one @ other for one, other in pairs))


# -- the verb


def net(method="lora", targets=TARGETS, name="default", model=None, seed=0, **options):
    if model is None:
        torch.manual_seed(7)
        model = Net().double()
    vl.inject(model, method, targets=targets, name=name, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, delta in deltas(model, name):
            for parameter in delta.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.5 * noise)
    return model


def deltas(model, name="default"):
    return [
        (f"{path}.{key}", delta)
        for path, host in vl.record.hosts_of(model).items()
        if name in host.adapters
        for key, delta in host.adapters[name].items()
    ]


def changes(model, name="default"):
    hosts = vl.record.hosts_of(model)
    return {
        where: delta.delta(hosts[where.rpartition(".")[0]].view(where.rpartition(".")[2])).detach()
        for where, delta in deltas(model, name)
    }


@pytest.mark.parametrize("keep", ["scaling", "alpha"])
@pytest.mark.parametrize("options", [{}, {"alpha": 3.0}, {"alpha": 3.0, "scaling": "rslora"}])
def test_every_site_becomes_its_best_approximation(keep, options):
    model = net(rank=4, **options)
    before = changes(model)
    scales = {where: delta.scale for where, delta in deltas(model)}
    report = squeeze(model, rank=2, keep=keep)
    assert [item.after for item in report.sites] == [2] * 6
    lost = whole = 0.0
    for (where, delta), item in zip(deltas(model), report.sites, strict=True):
        u, values, v = torch.linalg.svd(before[where], full_matrices=False)
        assert_close(changes(model)[where], (u[:, :2] * values[:2]) @ v[:2])
        error, norm = float(values[2:].norm()), float(values.norm())
        assert item.error == pytest.approx(error / norm)
        lost, whole = lost + error**2, whole + norm**2
        assert delta.config.rank == 2
        assert delta.A.shape[0] == delta.B.shape[1] == 2
        if keep == "scaling":
            assert delta.scale == pytest.approx(scales[where])
        else:
            assert delta.config.alpha == options.get("alpha", 4.0)
    assert report.error == pytest.approx((lost / whole) ** 0.5)
    assert "all sites" in str(report)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_rank_that_suffices_reproduces_the_function_and_squeezing_twice_changes_nothing(method):
    model = net(method, rank=4).eval()
    with torch.no_grad():
        for _, delta in deltas(model):  # rank 2 in a pair of rank 4
            delta.B[:, 2:] = delta.B[:, :2] @ torch.ones(2, 2, dtype=torch.float64)
    expected = model(INDEX)
    assert squeeze(model, rank=4).error < 1e-10
    assert_close(model(INDEX), expected)
    assert squeeze(model, rank=2).error < 1e-10
    assert_close(model(INDEX), expected)
    once = {key: item.clone() for key, item in vl.adapter_state_dict(model).items()}
    squeeze(model, rank=2)
    for (where, delta), before in zip(deltas(model), changes(model).values(), strict=True):
        if method == "lora":
            up, down = (once[f"adapter.{where}.{key}"] for key in ("B", "A"))
            assert_close(before, delta.scale * up @ down)
    assert_close(model(INDEX), expected)


def test_ranks_follow_the_energy_of_each_site_and_survive_a_file(tmp_path):
    model = net(rank=4, alpha=2.0).eval()
    with torch.no_grad():
        deltas(model)[0][1].B[:, 1:].mul_(0.1)
    report = squeeze(model, energy=0.8)
    ranks = [item.after for item in report.sites]
    assert len(set(ranks)) > 1
    assert all(item.error**2 <= 0.2 + 1e-9 for item in report.sites)
    assert [delta.config.rank for _, delta in deltas(model)] == ranks
    path = vl.save(model, tmp_path / "a.safetensors")
    torch.manual_seed(7)
    fresh = vl.load(Net().double(), path).eval()
    assert torch.equal(fresh(INDEX), model(INDEX))
    with vl.merged(model):
        assert_close(model(INDEX), fresh(INDEX))


def test_a_budget_is_spent_where_the_change_is_large_and_empty_sites_leave():
    model = net(rank=3).eval()
    with torch.no_grad():
        for where, delta in deltas(model):
            if where in ("conv.weight", "attn.q"):
                delta.B.zero_()
    before = changes(model)
    everything = torch.cat([torch.linalg.svdvals(item) for item in before.values()])
    expected = everything.sort(descending=True).values[:5].square().sum()
    report = squeeze(model, budget=5)
    assert sum(item.after for item in report.sites) == 5
    kept = sum(item.square().sum() for item in changes(model).values())
    assert_close(kept, expected)
    assert "conv.weight" not in changes(model)
    assert type(model.conv) is nn.Conv2d
    model(INDEX)
    vl.eject(model)
    assert type(model.attn) is nn.MultiheadAttention


@pytest.mark.parametrize("keep", ["scaling", "alpha"])
@pytest.mark.parametrize("method", ["lora", "dora", "slora"])
def test_where_a_start_was_taken_off_the_difference_is_compressed(method, keep):
    torch.default_generator.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 7)).double()
    vl.inject(model, method, init="pissa", rank=2)
    with torch.no_grad():
        for _, delta in deltas(model):
            delta.B.add_(torch.randn_like(delta.B))
    x = torch.randn(5, 9, dtype=torch.float64)
    expected = model(x)
    report = squeeze(model, rank=2, keep=keep)  # one factor was moved: the difference has rank 2
    assert report.error < 1e-10
    assert_close(model(x), expected)
    assert all(delta.config.offset == 0 for _, delta in deltas(model))


def test_a_site_that_trains_more_than_the_pair_keeps_a_rank():
    model = net("dora", rank=3)
    with torch.no_grad():
        for _, delta in deltas(model):
            delta.B.mul_(1.0 if delta.config.rank == 3 and delta is deltas(model)[0][1] else 1e-9)
    magnitudes = {where: delta.magnitude.clone() for where, delta in deltas(model)}
    report = squeeze(model, budget=2)
    assert [item.after for item in report.sites] == [2, 1, 1, 1, 1, 1]
    for where, delta in deltas(model):
        assert delta.config.method == "dora"
        assert torch.equal(delta.magnitude, magnitudes[where])


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("vera", {"rank": 4}),
        ("lora-fa", {"rank": 4}),
        ("block-lora", {"rank": 4, "blocks": 2, "dropout": 0.0}),
        ("block-lora", {"rank": 4, "blocks": 2, "layout": "grid", "dropout": 0.0}),
    ],
)
def test_other_factor_forms_become_plain_lora_exactly(method, options, tmp_path):
    targets = ["qkv[q,v]", "attn[q,out]", "conv"]
    model = net(method, targets, **options).eval()
    expected = model(INDEX)
    assert squeeze(model, rank=4).error < 1e-10
    assert_close(model(INDEX), expected)
    assert not hasattr(model, vl.record.SHARED)
    kinds = {delta.config.method for _, delta in deltas(model)}
    assert kinds == ({method} if options.get("layout") == "grid" else {"lora"})
    path = vl.save(model, tmp_path / "a.safetensors")
    torch.manual_seed(7)
    assert torch.equal(vl.load(Net().double(), path).eval()(INDEX), model(INDEX))


def test_experts_are_compressed_one_by_one():
    model = net("moe-lora", ["qkv"], rank=3, experts=2)
    ((_, delta),) = deltas(model)
    before = (delta.B @ delta.A).detach()
    router = delta.router.detach().clone()
    report = squeeze(model, rank=2)
    ((_, delta),) = deltas(model)
    assert delta.A.shape[:2] == (2, 2)
    u, values, v = torch.linalg.svd(before, full_matrices=False)
    assert_close(delta.B @ delta.A, (u[..., :2] * values[:, None, :2]) @ v[:, :2])
    assert report.error == pytest.approx(float(values[:, 2:].norm() / values.norm()))
    assert torch.equal(delta.router, router)


@pytest.mark.parametrize("config", DEFAULTS, ids=lambda config: config.method)
def test_every_method_is_squeezed_without_loss_where_the_rank_suffices_or_refused(config):
    kind = next(kind for kind in KINDS if kind.name == "qkv-slices")
    if refused(config, kind):
        pytest.skip("not for linear layers")
    model, inputs = adapted(config, kind).eval(), kind.inputs()
    expected = model(*inputs)
    before = snapshot(model)
    plain = not is_routed(config) and all(
        delta.factors() is not None and delta.bias_change() is None for _, delta in deltas(model)
    )
    if not plain and config.method not in ("dora", "moe-lora"):
        with pytest.raises(AdapterStateError, match="no factor form"):
            squeeze(model, rank=WIDTH)
        assert_unchanged(model, before)
        return
    report = squeeze(model, rank=WIDTH)
    assert report.error < 1e-7
    assert_close(model(*inputs), expected)
    vl.eject(model)
    assert_close(model(*inputs), kind.model().eval()(*inputs))


@pytest.mark.parametrize("method", ["lora", "dora", "lora-fa"])
def test_an_optimizer_goes_on_with_the_new_tensors(method):
    model = net(method, rank=4)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in vl.trainable_parameters(model) if n.endswith("A")]},
            {"params": [p for n, p in vl.trainable_parameters(model) if not n.endswith("A")]},
        ][method == "lora-fa" :],
        lr=1e-2,
    )

    def step():
        optimizer.zero_grad()
        model(INDEX).square().mean().backward()
        optimizer.step()

    step()
    magnitude = [d.magnitude for _, d in deltas(model)] if method == "dora" else []
    moments = [optimizer.state[item]["exp_avg"].clone() for item in magnitude]
    squeeze(model, rank=2, optimizer=optimizer)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    live = [p for _, p in vl.trainable_parameters(model)]
    assert {id(p) for p in held} == {id(p) for p in live}
    assert len(held) == len(live)
    assert all("exp_avg" not in optimizer.state.get(d.A, {}) for _, d in deltas(model))
    for (_, delta), moment in zip(deltas(model), moments, strict=method == "dora"):
        assert torch.equal(optimizer.state[delta.magnitude]["exp_avg"], moment)
    before = [p.detach().clone() for p in live]
    step()
    assert all(not torch.equal(p, old) for p, old in zip(live, before, strict=True))


def test_an_optimizer_over_other_tensors_is_refused_before_anything_changes():
    model = net(rank=4)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    expected = model(INDEX)
    with pytest.raises(ConfigError, match="optimizer"):
        squeeze(model, rank=2, optimizer=other)
    assert torch.equal(model(INDEX), expected)


def test_flags_types_and_other_adapters_stay():
    model = net(rank=4)
    net(rank=2, name="other", model=model, seed=4)
    vl.set_scale(model, 0.5, "default")
    for _, delta in deltas(model):
        delta.A.requires_grad_(False)
    kept = changes(model, "other")
    squeeze(model, rank=2, name="default")
    for _, delta in deltas(model):
        assert delta.A.dtype == torch.float64
        assert not delta.A.requires_grad
        assert delta.B.requires_grad
    for where, change in changes(model, "other").items():
        assert torch.equal(change, kept[where])
    assert {h.state.strengths["default"] for h in vl.record.hosts_of(model).values()} == {0.5}


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({}, "one of rank, energy and budget"),
        ({"rank": 2, "energy": 0.5}, "rank and energy"),
        ({"rank": 0}, "rank must be"),
        ({"budget": -1}, "budget must be"),
        ({"rank": 1.5}, "rank must be"),
        ({"energy": 0.0}, "energy must lie"),
        ({"energy": 1.5}, "energy must lie"),
        ({"energy": "most"}, "energy must lie"),
        ({"rank": 2, "keep": "both"}, "keep must be"),
    ],
)
def test_a_wrong_request_is_one_line(request_, message):
    with pytest.raises(ConfigError, match=message):
        squeeze(net(rank=4), **request_)


def test_what_cannot_be_squeezed_is_refused():
    model = net(rank=4)
    with vl.merged(model), pytest.raises(AdapterStateError, match="merged"):
        squeeze(model, rank=2)
    fresh = vl.inject(Net(), "lora", targets="qkv", rank=2)
    with pytest.raises(ConfigError, match="zero at every site"):
        squeeze(fresh, energy=0.9)
    with pytest.raises(AdapterStateError):
        squeeze(Net(), rank=2)


# -- several into one


def test_combined_adapters_add_up_and_one_squeeze_shortens_the_sum():
    model = net(rank=2, alpha=3.0, name="a").eval()
    net("block-lora", ["qkv[q]", "conv"], "b", model, 5, rank=2, blocks=1, dropout=0.0)
    vl.set_scale(model, 0.5, "b")
    expected = model(INDEX)
    report = combine(model, ["a", "b"], rank=8)
    assert report.error < 1e-10
    assert_close(model(INDEX), expected)
    one, two = changes(model, "a"), changes(model, "b")
    combine(model, ["a", "b"], into="short", weights=[1.0, -2.0], rank=1)
    for where, change in changes(model, "short").items():
        whole = one[where] + (-2.0 * 0.5 * two[where] if where in two else 0.0)
        u, values, v = torch.linalg.svd(whole, full_matrices=False)
        assert_close(change, values[0] * u[:, :1] @ v[:1])
    vl.use(model, ["a", "b"])
    assert_close(model(INDEX), expected)


def test_what_cannot_be_combined_is_refused():
    model = net(rank=2, name="a")
    net("dora", "qkv", "b", model, rank=2)
    for names, error in ((["a"], ConfigError), (["a", "c"], AdapterStateError)):
        with pytest.raises(error):
            combine(model, names, rank=2)
    with pytest.raises(AdapterStateError, match="no factor form"):
        combine(model, ["a", "b"], rank=2)
    with pytest.raises(ConfigError, match="weights"):
        combine(model, ["a", "b"], weights=[1.0], rank=2)
    with pytest.raises(ConfigError, match="finite numbers"):
        combine(model, ["a", "b"], weights=[1.0, float("nan")], rank=2)
    with pytest.raises(ConfigError, match=r"at least two adapters, got \['a'\]"):
        combine(model, "a", rank=2)


def test_half_precision_factors_are_compressed_in_full_precision():
    model = net(rank=4).to(torch.bfloat16)
    before = {where: item.float() for where, item in changes(model).items()}
    squeeze(model, rank=3)
    for where, change in changes(model).items():
        values = torch.linalg.svdvals(before[where])
        error = torch.linalg.matrix_norm(change.float() - before[where])
        assert float(error) <= float(values[3:].norm()) + 0.03 * float(values.norm())
    assert {delta.A.dtype for _, delta in deltas(model)} == {torch.bfloat16}
    assert dataclasses.asdict(deltas(model)[0][1].config)["rank"] == 3
