"""What `export` writes, PEFT and `load` read as the same function, or as the best of a rank."""

import copy
import json

import pytest
import torch
from torch import nn

import visionlora as vl
from tests.tolerances import assert_close
from visionlora import record
from visionlora.errors import AdapterFileError, AdapterStateError, ConfigError


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.conv = nn.Conv2d(6, 8, 3, padding=1)
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(24, 3)

    def forward(self, index):
        x = self.conv(self.table(index).transpose(1, 2)[..., None])
        return self.head(torch.tanh(self.qkv(x.squeeze(-1).transpose(1, 2)))).mean(1)


TARGETS = ["table", "type:Conv2d", "qkv[q,v]"]


def adapted(method, targets, **options):
    torch.manual_seed(0)
    model, base = Net(), Net()
    base.load_state_dict(model.state_dict())
    vl.inject(model, method, targets, **options)
    vl.freeze_base(model, train="head")
    with torch.no_grad():
        for _, parameter in vl.trainable_parameters(model):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval(), base.eval()


@pytest.mark.parity
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {"rank": 3, "alpha": 5.0}),
        ("rslora", {"rank": 4, "alpha": 2.0}),
        ("block-lora", {"rank": 4, "dropout": 0.0}),
        ("block-lora", {"rank": 4, "dropout": 0.0, "layout": "grid"}),
        ("lora-fa", {"rank": 2}),
        ("vera", {"rank": 5}),
        ("dora", {"rank": 2}),
    ],
)
def test_peft_reads_the_export_as_the_same_function(method, options, tmp_path):
    peft = pytest.importorskip("peft")
    targets = TARGETS if options.get("layout") != "grid" else TARGETS[1:]
    model, base = adapted(method, targets, **options)
    index = torch.randint(11, (2, 5))
    before = base(index)
    vl.export(model, tmp_path / "out")
    there = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    assert_close(there(index), model(index))
    with vl.disabled(model):
        assert not torch.allclose(model(index), there(index), atol=1e-3)
    assert not torch.allclose(before, there(index), atol=1e-3)


@pytest.mark.parity
@pytest.mark.parametrize("targets", ["qkv[q,v]", "qkv[0:5]", ["qkv[k]", "conv[2:6]"]])
def test_norms_of_slices_are_norms_of_the_layer(targets, tmp_path):
    """DoRA scales rows one by one, so the other rows keep the norms of the base weight."""
    peft = pytest.importorskip("peft")
    model, base = adapted("dora", targets, rank=2)
    report = vl.export(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["use_dora"]
    assert config["r"] == (4 if targets == "qkv[q,v]" else 2)
    assert not report.ranks
    there = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    index = torch.randint(11, (2, 5))
    assert_close(there(index), model(index))


def test_slices_become_one_pair_of_their_joint_rank(tmp_path):
    model, _ = adapted("lora", TARGETS, rank=3)
    vl.export(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"^table": 3, "^conv": 3}
    assert config["r"] == 6


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.attn(x, x, x, need_weights=False)[0])


class Depthwise(nn.Sequential):
    def __init__(self):
        torch.manual_seed(2)
        super().__init__(nn.Conv2d(4, 6, 1), nn.Conv2d(6, 6, 3, groups=6), nn.Conv2d(6, 4, 1))


def disturbed(model, method, targets, **options):
    vl.inject(model, method, targets, **options)
    with torch.no_grad():
        for _, parameter in vl.trainable_parameters(model):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parity
@pytest.mark.parametrize("targets", ["attn[q,v]", "attn", "attn[out]", ["attn[k]", "fc"]])
def test_peft_reads_single_projections_of_attention(targets, tmp_path):
    peft = pytest.importorskip("peft")
    model = disturbed(Attention(), "lora", targets, rank=2, alpha=3.0)
    x = torch.randn(2, 5, 8)
    vl.export(model, tmp_path)
    there = peft.PeftModel.from_pretrained(Attention(), tmp_path).eval()
    assert_close(there(x), model(x))
    back = vl.load(Attention(), tmp_path).eval()
    assert_close(back(x), model(x))


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.fc = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.aux_head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.fc(x)) + self.aux_head(self.fc(x))


@pytest.mark.parity
def test_heads_that_peft_cannot_tell_apart_are_written_together(tmp_path):
    """PEFT knows a head by the end of its name."""
    peft = pytest.importorskip("peft")
    model = disturbed(vl.freeze_base(Heads(), train="head"), "lora", "fc", rank=2)
    vl.export(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["head", "aux_head"]
    x = torch.randn(4, 6)
    assert_close(peft.PeftModel.from_pretrained(Heads(), tmp_path).eval()(x), model(x))
    nested = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6)))
    model = vl.inject(nested, "lora", "1.0", rank=2)
    model[0].requires_grad_(True)
    with pytest.raises(AdapterStateError, match=r"1\.0 is adapted and 0 is trained"):
        vl.export(model, tmp_path / "b")


@pytest.mark.parity
@pytest.mark.parametrize("merged", [False, True])
def test_a_norm_with_a_trained_bias_is_saved_whole_and_alone(merged, tmp_path):
    """BitFit's norms become modules that PEFT saves, without the adapter that is inside them."""
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
    model = disturbed(copy.deepcopy(base), "bitfit", ["0", "1"])
    x = torch.randn(4, 6)
    expected = model(x)
    if merged:
        vl.merge(model)
    vl.export(model, tmp_path)
    assert_close(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()(x), expected)
    assert_close(vl.load(base, tmp_path)(x), expected)


@pytest.mark.parametrize("method", ["lora", "dora", "lora-fa", "vera"])
@pytest.mark.parametrize(
    ("build", "targets", "shape"),
    [(Attention, ["attn[q,v]", "fc"], (2, 5, 8)), (Depthwise, ["0", "1"], (2, 4, 5, 5))],
)
def test_plain_lora_in_our_own_format_is_exact_everywhere(build, targets, shape, method, tmp_path):
    model = disturbed(build(), method, targets, rank=2)
    x = torch.randn(shape)
    report = vl.export(model, tmp_path / "plain.safetensors", format="lora")
    assert report.error == 0
    there = vl.load(build(), report).eval()
    assert_close(there(x), model(x))
    assert {item["method"] for item in vl.inspect(report).options} == {"lora"}
    vl.eject(there)


def test_a_smaller_rank_is_the_best_approximation(tmp_path):
    """Eckart and Young: the error is the root of the dropped squares, per site and overall."""
    base = nn.Sequential(nn.Linear(8, 9), nn.Linear(9, 6)).double()
    model = disturbed(copy.deepcopy(base), "dora", "*", rank=3)
    sites = {
        name: host.adapters["default"]["weight"] for name, host in record.hosts_of(model).items()
    }
    report = vl.export(model, tmp_path / "small.safetensors", format="lora", rank=2)
    missing = whole = 0.0
    for name, delta in sites.items():
        change = delta.delta(model.get_submodule(name).view("weight")).detach()
        values = torch.linalg.svdvals(change)
        expected = float(values[2:].norm() / values.norm())
        assert report.errors[f"{name}.weight"] == pytest.approx(expected, rel=1e-9)
        missing += float(values[2:].square().sum())
        whole += float(values.square().sum())
    assert report.error == pytest.approx((missing / whole) ** 0.5, rel=1e-9)
    assert set(report.ranks.values()) == {2}
    assert "relative error" in str(report)
    there = vl.load(base, report)
    for name, delta in sites.items():
        change = delta.delta(model.get_submodule(name).view("weight")).detach()
        pair = there.get_submodule(name).adapters["default"]["weight"]
        error = (change - pair.delta(change).detach()).norm() / change.norm()
        assert float(error) == pytest.approx(report.errors[f"{name}.weight"], rel=1e-9)


def test_exporting_does_not_change_the_model(tmp_path):
    model = disturbed(Attention(), "lora", "attn", rank=2).train()
    before = {key: item.clone() for key, item in model.state_dict().items()}
    vl.export(model, tmp_path)
    vl.export(model, tmp_path / "plain.safetensors", format="lora", rank=1)
    assert all(torch.equal(model.state_dict()[key], item) for key, item in before.items())
    assert all(module.training for module in model.modules())


def test_a_merged_model_and_a_changed_scale_export_the_same_function(tmp_path):
    model = disturbed(Attention(), "dora", ["attn", "fc"], rank=2)
    vl.set_scale(model, 0.5)
    x = torch.randn(2, 5, 8)
    one = vl.export(model, tmp_path / "1.safetensors", format="lora")
    vl.merge(model)
    two = vl.export(model, tmp_path / "2.safetensors", format="lora")
    for path in (one, two):
        assert_close(vl.load(Attention(), path).eval()(x), model(x))


def test_what_cannot_be_exported_is_refused(tmp_path):
    model = disturbed(Depthwise(), "lora", "1", rank=2)
    with pytest.raises(AdapterStateError, match="1 is a grouped convolution"):
        vl.export(model, tmp_path / "grouped")
    attention = nn.Sequential(nn.MultiheadAttention(8, 2, kdim=4, vdim=4))
    vl.inject(attention, "lora", "0[q]", rank=2)
    with pytest.raises(AdapterStateError, match="different widths"):
        vl.export(attention, tmp_path / "attention")
    with pytest.raises(AdapterFileError, match="unknown export format 'kohya'"):
        vl.export(attention, tmp_path / "attention", format="kohya")
    with pytest.raises(ConfigError, match="rank must be at least 1"):
        vl.export(attention, tmp_path / "attention", format="lora", rank=0)
    headed = disturbed(vl.freeze_base(Attention(), train="fc"), "lora", "fc", rank=2)
    with pytest.raises(AdapterStateError, match="no place for both"):
        vl.export(headed, tmp_path / "b")
    assert not list(tmp_path.iterdir())
