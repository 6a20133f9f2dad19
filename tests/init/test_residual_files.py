"""Starts that are taken off keep the function: in files, exports, checkpoints, resumed runs."""

import pytest
import torch

import visionlora as vl
from tests.mixed import INDEX, TARGETS, Net
from tests.tolerances import assert_close
from visionlora.errors import ConfigError
from visionlora.methods.base import Delta
from visionlora.training import RunDirectory, TrainSettings, fit

CASES = {
    "milora": ("lora", "milora", {}),
    "lora-ga": ("lora", "lora-ga", {}),
    "dora+lora-ga": ("dora", "lora-ga", {}),
    "block-lora+lora-ga": ("block-lora", "lora-ga", {"direction": "random"}),
    "block-lora+milora": ("block-lora", "milora", {}),
    "slora+milora": ("slora", "milora", {}),
    "nlora": ("slora", "nlora", {"residual": True, "index": "norm"}),
    "nlora-pinv": ("slora", "nlora", {"residual": True, "intermediate": "pinv"}),
    "inttune": ("lora-xs", "nlora", {"residual": True}),
}
CASE = pytest.mark.parametrize("case", CASES)
OPTIONS = {
    "block-lora": {"rank": 4, "blocks": 2, "alpha": 3.0, "dropout": 0.0},
    "lora-xs": {"rank": 2, "alpha": 3.0},
}
GOAL = torch.linspace(-1, 1, 144, dtype=torch.float64).reshape(2, 6, 6, 2)
BATCHES = [(INDEX, GOAL), (INDEX.flip(1), 0.5 - GOAL)]


def base():
    torch.default_generator.manual_seed(2)
    net = Net().double()
    with torch.no_grad():
        for parameter in net.parameters():  # biases of attention start at zero otherwise
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64))
    return net


def loss_fn(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def injected(case, model=None):
    method = CASES[case][0]
    options = OPTIONS.get(method, {"rank": 2, "alpha": 3.0})
    return vl.inject(base() if model is None else model, method, targets=TARGETS, **options)


def started(case, model=None, batches=BATCHES):
    _, init, options = CASES[case]
    model = injected(case, model)
    vl.initialise(model, init, batches, loss_fn, **options)
    return model


def trained(model, steps=3, optimizer=None):
    values = [item for _, item in vl.trainable_parameters(model)]
    optimizer = optimizer or torch.optim.AdamW(values, lr=0.03)
    for step in range(steps):
        optimizer.zero_grad()
        loss_fn(model, BATCHES[step % 2]).backward()
        optimizer.step()
    return optimizer


def exact(model):
    return {name: item.clone() for name, item in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@CASE
def test_the_function_is_kept_and_the_weights_too(case):
    net = base()
    expected, before = net(INDEX), dict(net.named_parameters())
    values = {name: item.detach().clone() for name, item in before.items()}
    model = started(case, net)
    assert_close(model(INDEX), expected)
    now = dict(model.named_parameters())
    for name, item in values.items():
        assert torch.equal(now[name], item)
    for delta in (item for item in model.modules() if isinstance(item, Delta)):
        if delta.factors() is not None:
            up, down = delta.factors()
            assert not (up @ down).any(), "exactly zero, not to rounding"


@CASE
def test_all_that_trains_trains_at_once(case):
    """Without B = 0 there is no matrix that has to wait for another one."""
    model = started(case)
    loss_fn(model, BATCHES[0]).backward()
    for name, item in vl.trainable_parameters(model):
        assert bool(item.grad.any()), name


@CASE
def test_a_file_is_the_same_function_on_a_pristine_base(case, tmp_path):
    model = started(case)
    trained(model)
    expected = model(INDEX)
    assert not torch.allclose(expected, base()(INDEX), atol=1e-3)
    path = vl.save(model, tmp_path / "a.safetensors")
    loaded = vl.load(base(), path)
    assert torch.equal(loaded(INDEX), expected)
    # saved and loaded once more, and into the model it came from, nothing is taken off twice
    again = vl.load(base(), vl.save(loaded, tmp_path / "b.safetensors"))
    assert torch.equal(again(INDEX), expected)
    vl.load(model, path)
    assert torch.equal(model(INDEX), expected)
    assert torch.equal(vl.eject(loaded)(INDEX), base()(INDEX))


@CASE
def test_an_export_is_plain_lora_of_twice_the_rank(case, tmp_path):
    method = CASES[case][0]
    model = started(case)
    trained(model)
    report = vl.export(model, tmp_path / "plain.safetensors", format="lora")
    plain = vl.load(base(), report)
    assert_close(plain(INDEX), model(INDEX))
    if method != "dora":  # whose change has any rank
        assert report.error == 0
        assert set(report.ranks.values()) == {2 if method == "lora-xs" else 4}


@CASE
def test_the_concatenated_pair_is_the_change(case):
    """`[B, -B0] [A; A0]` under the same scale, that is with alpha multiplied by 2."""
    model = started(case)
    trained(model)
    for delta in (item for item in model.modules() if isinstance(item, Delta)):
        if CASES[case][0] in ("dora", "lora-xs"):
            continue
        up, down = delta.trained_pair()
        whole = torch.cat([up, -delta.B0], 1) @ torch.cat([down, delta.A0])
        weight = torch.zeros(up.shape[0], down.shape[1], dtype=torch.float64)
        assert_close(delta.delta(weight), delta.scale * whole)


@CASE
def test_saving_in_the_middle_disturbs_nothing(case, tmp_path):
    def run(save):
        model = started(case)
        optimizer = trained(model)
        flags = {name: item.requires_grad for name, item in model.named_parameters()}
        before = exact(model)
        if save:
            vl.save(model, tmp_path / "a.safetensors")
            vl.export(model, tmp_path / "b.safetensors", format="lora")
            assert same(before, exact(model))
            assert flags == {name: item.requires_grad for name, item in model.named_parameters()}
        trained(model, optimizer=optimizer)
        return exact(model)

    assert same(run(True), run(False))


def fitted(model, folder, resume=False, stop=None):
    def batches(step):
        if step == stop:
            raise OSError("power cut")
        return BATCHES[step % 2]

    values = [item for _, item in vl.trainable_parameters(model)]
    optimizer = torch.optim.AdamW(values, lr=0.03)
    settings = TrainSettings(steps=6, checkpoint_every=2, device="cpu")
    run = RunDirectory(folder, resume=resume)
    return fit(model, optimizer, loss_fn, batches, settings, run)


@CASE
def test_a_resumed_run_takes_nothing_off_twice(case, tmp_path):
    whole, stopped = started(case), started(case)
    fitted(whole, tmp_path / "whole")
    with pytest.raises(OSError, match="power cut"):
        fitted(stopped, tmp_path / "stopped", stop=5)
    # the script gives the start again; here it even finds another gradient
    resumed = started(case, batches=BATCHES[1:])
    result = fitted(resumed, tmp_path / "stopped", resume=True)
    assert result.resumed_from == 4
    assert same(exact(whole), exact(resumed))
    assert torch.equal(whole(INDEX), resumed(INDEX))
    for one, other in zip(whole.modules(), resumed.modules(), strict=True):
        if isinstance(one, Delta):
            assert same(one.frozen(), other.frozen())


@CASE
def test_a_run_that_forgets_the_start_is_not_resumed(case, tmp_path):
    with pytest.raises(OSError, match="power cut"):
        fitted(started(case), tmp_path / "stopped", stop=5)
    said = "A, .* it is of another model" if case == "inttune" else "offset was 2 and is 0"
    with pytest.raises(ConfigError, match=said):
        fitted(injected(case), tmp_path / "stopped", resume=True)
