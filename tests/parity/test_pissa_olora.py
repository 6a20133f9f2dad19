"""PiSSA and OLoRA in PEFT, which changes the base weight, are the same function here."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import visionlora as vl
from tests.tolerances import assert_close
from visionlora.errors import AdapterFileError
from visionlora.record import hosts_of

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

INITS = ["pissa", "olora"]
RANK, ALPHA = 4, 10


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 6, 2)
        self.up = nn.Linear(24, 40)
        self.down = nn.Linear(40, 24, bias=False)
        self.same = nn.Linear(24, 24)

    def forward(self, x):
        x = self.conv(x).flatten(1)
        return self.same(self.down(torch.tanh(self.up(x))))


X = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(1))
LINEAR = ["up", "down", "same"]


def theirs_and_ours(init, **options):
    """Return PEFT's model and ours, both fresh and in float32, which PEFT asks for."""
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=LINEAR, init_lora_weights=init, **options
    )
    scaling = "rslora" if options.get("use_rslora") else "standard"
    ours = vl.inject(Net(), init, targets=LINEAR, rank=RANK, alpha=float(ALPHA), scaling=scaling)
    return peft.get_peft_model(Net(), config).eval(), ours.eval()


def layers(theirs, ours):
    """Yield our Delta, PEFT's layer and the weight of the base model."""
    base = Net()
    for name in LINEAR:
        delta = getattr(ours, name).adapters["default"]["weight"]
        yield delta, getattr(theirs.base_model.model, name), getattr(base, name).weight.detach()


@torch.no_grad()
def disturb(theirs):
    generator = torch.Generator().manual_seed(5)
    for name, item in theirs.named_parameters():
        if "lora_" in name:
            item.add_(0.2 * torch.randn(item.shape, generator=generator))
    return theirs


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", INITS)
def test_both_keep_the_function_and_start_at_the_same_part_of_the_weight(init, rslora):
    theirs, ours = theirs_and_ours(init, use_rslora=rslora)
    expected = Net()(X)
    assert_close(theirs(X), expected)
    assert torch.equal(ours(X), expected)
    for delta, other, weight in layers(theirs, ours):
        scale = other.scaling["default"]
        assert delta.scale == pytest.approx(scale)
        A, B = other.lora_A["default"].weight.detach(), other.lora_B["default"].weight.detach()
        assert_close(delta.B0 @ delta.A0, B @ A)
        assert_close(weight - scale * delta.B0 @ delta.A0, other.base_layer.weight)
        # The factors themselves agree up to the signs of their ranks.
        signs = (delta.A0 * A).sum(1).sign()
        assert_close(signs[:, None] * delta.A0, A, factor=10)
        assert_close(delta.B0 * signs, B, factor=10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("init", INITS)
def test_outputs_gradients_and_merged_weights_agree(init, dtype):
    theirs, ours = theirs_and_ours(init)
    theirs, ours, x = theirs.to(dtype), ours.to(dtype), X.to(dtype)
    with torch.no_grad():
        for delta, other, weight in layers(theirs, ours):
            A, B = other.lora_A["default"].weight, other.lora_B["default"].weight
            delta.A0.copy_(A)
            delta.B0.copy_(B)
            # PEFT rounds what is left of the weight to float32; here it is exact.
            other.base_layer.weight.copy_(weight.to(dtype) - delta.scale * B @ A)
        disturb(theirs)
        for delta, other, _ in layers(theirs, ours):
            delta.A.copy_(other.lora_A["default"].weight)
            delta.B.copy_(other.lora_B["default"].weight)
    mine, expected = ours(x), theirs(x)
    assert_close(mine, expected)
    assert not torch.allclose(mine, Net().to(dtype)(x), atol=1e-3)
    weight = torch.linspace(-1, 1, mine.numel(), dtype=dtype).reshape(mine.shape)
    (mine * weight).sum().backward()
    (expected * weight).sum().backward()
    for delta, other, _ in layers(theirs, ours):
        assert_close(delta.A.grad, other.lora_A["default"].weight.grad, factor=10)
        assert_close(delta.B.grad, other.lora_B["default"].weight.grad, factor=10)
    merged = theirs.merge_and_unload()
    vl.eject(ours, merge=True)
    for name, item in ours.named_parameters():
        assert_close(item, merged.get_parameter(name))


@pytest.mark.parametrize("init", INITS)
def test_training_takes_the_same_path(init):
    """The signs of the initial pair do not matter to Adam."""
    theirs, ours = theirs_and_ours(init)
    for model in (theirs, ours):
        trained = [item for item in model.parameters() if item.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            (model(X) - 1).square().mean().backward()
            optimizer.step()
    assert_close(ours(X), theirs(X), factor=100)
    assert not torch.allclose(ours(X), Net()(X), atol=1e-2)


# -- PEFT's files


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"up": 2}, "alpha_pattern": {"down": 3}},
        {"rank_pattern": {"same": 30}},  # more than the layer has: PEFT keeps the scale 10 / 30
    ],
    ids=["plain", "rslora", "patterns", "beyond"],
)
@pytest.mark.parametrize("init", INITS)
def test_a_file_of_peft_is_read_on_the_base_model(init, options, tmp_path):
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=LINEAR, init_lora_weights=init, **options
    )
    theirs = disturb(peft.get_peft_model(Net(), config)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    again = peft.PeftModel.from_pretrained(Net(), tmp_path / "theirs").eval()
    assert_close(again(X), theirs(X), factor=10)
    ours = vl.load(Net(), tmp_path / "theirs").eval()
    assert_close(ours(X), theirs(X), factor=10)
    assert torch.equal(ours.up.weight, Net().up.weight)
    path = vl.save(ours, tmp_path / "ours.safetensors")
    assert torch.equal(vl.load(Net(), path).eval()(X), ours(X))


@pytest.mark.parametrize("init", INITS)
def test_ours_is_plain_lora_of_twice_the_rank_in_peft(init, tmp_path):
    theirs, ours = theirs_and_ours(init)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for delta, _, _ in layers(theirs, ours):
            for item in delta.parameters():
                item.add_(0.2 * torch.randn(item.shape, generator=generator))
    vl.export(ours, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["init_lora_weights"] is True
    assert config["r"] == 2 * RANK
    there = peft.PeftModel.from_pretrained(Net(), tmp_path).eval()
    assert_close(there(X), ours(X))


@pytest.mark.parametrize(
    ("targets", "values", "said"),
    [
        (LINEAR, {"init_lora_weights": "pissa_niter_4"}, "='pissa_niter_4' is not supported"),
        ([*LINEAR, "conv"], {"init_lora_weights": "pissa"}, "Linear layers, which conv in this"),
    ],
)
def test_what_has_no_meaning_of_its_own_is_refused(targets, values, said, tmp_path):
    config = peft.LoraConfig(r=2, target_modules=targets)
    peft.get_peft_model(Net(), config).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    model = Net()
    with pytest.raises(AdapterFileError, match=said) as caught:
        vl.load(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert not hosts_of(model)


def test_dora_on_what_is_left_of_the_weight_is_refused(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=LINEAR, use_dora=True, init_lora_weights="pissa")
    peft.get_peft_model(Net(), config).save_pretrained(tmp_path)
    with pytest.raises(AdapterFileError, match="'pissa' is supported for LoRA on Linear layers"):
        vl.load(Net(), tmp_path)


def test_no_damage_to_a_file_crashes_load(tmp_path):
    theirs, _ = theirs_and_ours("pissa")
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    for key in ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights"):
        for value in (None, 0, -1, 10**4, 0.5, "(", [], {"(": 1}, {"up": "x"}):
            path.write_text(json.dumps({**config, key: value}))
            model = Net()
            try:
                vl.load(model, tmp_path)
            except AdapterFileError as error:
                assert "\n" not in str(error)  # noqa: PT017
                assert not hosts_of(model)
    path.write_text(json.dumps(config))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    for key in list(tensors):
        cut = {**tensors, key: tensors[key][:2].contiguous()}
        save_file(cut, tmp_path / "adapter_model.safetensors")
        with pytest.raises(AdapterFileError):
            vl.load(Net(), tmp_path)
