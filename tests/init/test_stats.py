"""The averaged gradient of adapted weights, gathered one layer at a time."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import visionlora as vl
from tests.init.looking import cross_entropy, indices, joined, mixed, tower, vectors
from tests.tolerances import assert_close
from visionlora.errors import AdapterStateError, ConfigError, DataError, NeverTrainedError
from visionlora.hosts.base import parameter_name, stored, view_of
from visionlora.init.stats import collect
from visionlora.ranks.structure import places_of


def gradients(model, batches, loss_fn=cross_entropy, **options):
    found = collect(model, batches, loss_fn, needs={"gradient"}, **options)
    return {name: stats.gradient for name, stats in found.sites.items()}


def plain_gradients(model, batch, loss_fn=cross_entropy):
    """The gradient of one large batch at the frozen weights, by autograd alone."""
    weights = {p.name: stored(p.host, parameter_name(p.host, p.key)) for p in places_of(model)}
    training = model.training
    for weight in weights.values():
        weight.requires_grad_(True)
    with vl.disabled(model.eval()):
        loss_fn(model, batch).backward()
    result = {p.name: view_of(weights[p.name].grad.clone(), p.site) for p in places_of(model)}
    for weight in weights.values():
        weight.requires_grad_(False)
        weight.grad = None
    model.train(training)
    return result


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name], value)


@pytest.mark.parametrize(("build", "batches"), [(mixed, indices()), (tower, vectors())])
def test_gradient_is_that_of_the_mean_loss_over_all_samples(build, batches):
    model = build()
    found = gradients(model, batches)
    assert_same(found, plain_gradients(model, joined(batches)))
    assert all(value.any() for value in found.values())


def test_reported_loss_is_the_mean_over_samples():
    model = tower().eval()
    found = collect(model, vectors(), cross_entropy, needs=())
    with vl.disabled(model), torch.no_grad():
        expected = cross_entropy(model, joined(vectors()))
    assert found.loss == pytest.approx(float(expected), rel=1e-12)
    assert (found.batches, found.samples) == (3, 12.0)


def test_order_and_cut_of_the_batches_do_not_matter():
    model = tower()
    expected = gradients(model, vectors())
    assert_same(gradients(model, vectors()[::-1]), expected)
    assert_same(gradients(model, [joined(vectors())]), expected)


def test_samples_may_be_counted_by_the_caller():
    model = tower()
    batches = [{"meta": "text", "x": x, "y": y} for x, y in vectors()]

    def loss_fn(model, batch):
        return cross_entropy(model, (batch["x"], batch["y"]))

    assert_same(gradients(model, batches, loss_fn), gradients(model, vectors()))
    one_each = gradients(model, batches, loss_fn, samples=lambda batch: 1)
    each = [gradients(model, [batch], loss_fn) for batch in batches]
    assert_same(one_each, {k: sum(g[k] for g in each) / 3 for k in one_each})


def test_at_most_one_gradient_is_alive():
    model = tower()
    weights = {stored(p.host, parameter_name(p.host, p.key)) for p in places_of(model)}
    alive = []

    def count(_):
        alive.append(sum(p.grad is not None for p in model.parameters()))

    for weight in weights:
        weight.requires_grad_(True)
        weight.register_post_accumulate_grad_hook(count)
    gradients(model, vectors())
    assert alive == [1] * (3 * len(weights))


def test_the_adapter_does_not_count():
    model = tower()
    expected = gradients(model, vectors())
    for _, parameter in vl.trainable_parameters(model):
        parameter.data.normal_()
    found = collect(model, vectors(), cross_entropy, needs={"gradient", "covariance"})
    assert_same({name: stats.gradient for name, stats in found.sites.items()}, expected)


def state_of(model):
    return (
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [id(parameter.grad) for parameter in model.parameters()],
        [host.state.enabled for host in {p.host for p in places_of(model)}],
        {name: value.clone() for name, value in model.state_dict().items()},
        torch.get_rng_state(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
        random.getstate(),
    )


def drawing(model, batch):
    """A loss that draws from all generators, as augmentations do."""
    noise = torch.randn(()) + np.random.rand() + random.random()  # noqa: NPY002
    return cross_entropy(model, batch) + 0 * noise


def failing(model, batch):
    loss = drawing(model, batch)
    if len(batch[0]) == 5:
        raise RuntimeError("the data set is gone")
    return loss


@pytest.mark.parametrize("loss_fn", [drawing, failing])
def test_the_model_and_the_random_states_stay_as_they_were(loss_fn):
    model = tower().train()
    model.norm.eval()
    model.qkv.weight.requires_grad_(True)
    for parameter in model.head.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = state_of(model)
    try:
        collect(
            model, vectors(), loss_fn, needs={"gradient", "covariance", "components"}, components=1
        )
    except RuntimeError:
        assert loss_fn is failing
    else:
        assert loss_fn is drawing
    after = state_of(model)
    for old, new in zip(before, after, strict=True):
        if isinstance(old, dict):
            assert all(torch.equal(old[name], new[name]) for name in old)
        elif isinstance(old, torch.Tensor):
            assert torch.equal(old, new)
        else:
            assert old == new


class Checkpointed(nn.Module):
    """Two blocks, the first of which is computed again in the backward."""

    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = x.mean(1).requires_grad_()
        if self.reentrant is None:
            return self.head(self.body(x))
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))


def test_gradient_checkpointing_changes_nothing():
    found = []
    for reentrant in (None, False, True):
        torch.default_generator.manual_seed(1)
        model = vl.inject(Checkpointed(reentrant).double(), "lora", ["body.*"], rank=2)
        found.append(collect(model, vectors(), cross_entropy, needs={"gradient", "covariance"}))
    for other in found[1:]:
        for name, stats in found[0].sites.items():
            assert_close(other.sites[name].gradient, stats.gradient)
            assert_close(other.sites[name].covariance, stats.covariance)


def test_a_weight_that_is_shared_gets_the_gradient_of_all_its_uses():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 3)).double()
    model[2].weight = model[0].weight
    vl.inject(model, "lora", ["0", "2"], rank=2)
    batches = [(x.mean(1), y) for x, y in vectors()]
    found = gradients(model, batches)
    assert_same(found, plain_gradients(model, joined(batches)))
    assert torch.equal(found["0.weight"], found["2.weight"])


def test_two_adapters_on_one_layer_share_their_statistics():
    model = tower()
    expected = gradients(model, vectors())
    vl.inject(model, "dora", "head", rank=1, name="second")
    assert_same(gradients(model, vectors()), expected)
    only = gradients(model, vectors(), name="second")
    assert_same(only, {"head.weight": expected["head.weight"]})


def test_half_precision_weights_are_added_up_in_float32():
    model = vl.inject(nn.Linear(8, 3).to(torch.bfloat16), rank=1)
    batches = [(x.mean(1).to(torch.bfloat16), y) for x, y in vectors()]
    found = gradients(
        model, batches, lambda m, b: nn.functional.cross_entropy(m(b[0]).float(), b[1])
    )
    assert found["weight"].dtype == torch.float32


# -- what is refused


def test_data_that_end_early_say_how_many_came():
    with pytest.raises(DataError, match=r"count=5 batches .* only 3 came"):
        gradients(tower(), iter(vectors()), count=5)
    with pytest.raises(DataError, match=r"at least one batch .* only 0 came"):
        gradients(tower(), [])
    with pytest.raises(DataError, match="batch 1 has 0 samples"):
        gradients(tower(), vectors((2, 0)))


def test_no_batch_too_many_is_read():
    stream = iter(vectors((2, 2, 2, 2)))
    gradients(tower(), stream, count=2)
    assert len(list(stream)) == 2


def test_a_loss_that_is_not_finite_names_the_batch():
    def loss_fn(model, batch):
        return cross_entropy(model, batch) * (float("nan") if len(batch[0]) == 3 else 1.0)

    with pytest.raises(DataError, match="estimation batch 1 is nan"):
        gradients(tower(), vectors(), loss_fn)


def test_a_gradient_that_is_not_finite_names_the_layer():
    model = tower()

    def loss_fn(model, batch):
        root = model.conv.weight.abs().sum() * 0  # finite, with an infinite slope
        return cross_entropy(model, batch) + root.sqrt()

    with pytest.raises(DataError, match=r"gradient of conv.weight .* batch 0"):
        gradients(model, vectors(), loss_fn)


def test_a_head_of_zeros_is_explained():
    model = vl.inject(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3)).double(), "lora", "0", rank=2)
    batches = [(x.mean(1), y) for x, y in vectors()]
    model[1].weight.data.zero_()
    with pytest.raises(ConfigError, match=r"0.weight is exactly zero: a zero-initialised head"):
        gradients(model, batches)
    model[1].weight.data.normal_()
    assert gradients(model, batches)["0.weight"].any()


def test_weights_that_the_loss_does_not_reach_are_named():
    model = tower()
    with pytest.raises(NeverTrainedError, match=r"weight of attn.q \(and 5 more\)"):
        gradients(model, vectors(), lambda m, b: m.qkv(b[0]).square().mean())
    with pytest.raises(NeverTrainedError, match="does not depend on any adapted weight"):
        gradients(model, vectors(), lambda m, b: m(b[0]).detach().mean())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights_have_no_gradient(dtype):
    model = tower()
    model.head.weight = nn.Parameter(torch.ones(3, 6).to(dtype), requires_grad=False)
    with pytest.raises(ConfigError, match=r"weight of head.weight is quantised"):
        gradients(model, vectors())


def test_wrong_arguments_are_refused():
    model = tower()
    with pytest.raises(ConfigError, match="one scalar tensor, got \\(4, 3\\)"):
        gradients(model, vectors(), lambda m, b: m(b[0]))
    with pytest.raises(ConfigError, match="pass samples="):
        gradients(model, ["text"])
    with pytest.raises(ConfigError, match="needs must be among"):
        collect(model, vectors(), cross_entropy, needs={"hessian"})
    for option in ("count", "sketch"):
        with pytest.raises(ConfigError, match=f"{option} must be at least 1"):
            gradients(model, vectors(), **{option: 0})
    with pytest.raises(ConfigError, match="components must be at least 1"):
        collect(model, vectors(), cross_entropy, needs={"components"})
    with pytest.raises(AdapterStateError, match="no adapter named 'other'"):
        gradients(model, vectors(), name="other")
    vl.merge(model)
    with pytest.raises(AdapterStateError, match="merged"):
        gradients(model, vectors())
    with pytest.raises(AdapterStateError, match="no adapter: inject"):
        gradients(nn.Linear(8, 3), vectors())


@pytest.mark.parametrize(
    ("init", "options", "said"),
    [
        ("pissa", {"count": 2}, "count has no effect"),
        ("gaussian", {"sketch": 4}, "sketch has no effect"),
        ("eva", {"sketch": 4}, "needs no gradients"),
        ("lora-ga", {"count": -4}, "count must be at least 1"),
    ],
)
def test_options_without_effect_are_refused(init, options, said):
    model = vl.inject(torch.nn.Sequential(torch.nn.Linear(6, 6)), "lora", targets="0", rank=2)
    batches = [torch.randn(4, 6)]
    with pytest.raises(ConfigError, match=said):
        vl.initialise(model, init, batches, lambda model, x: model(x).square().mean(), **options)
