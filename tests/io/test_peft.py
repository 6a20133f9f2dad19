"""What `export` writes, PEFT reads as the same function."""

import json

import pytest
import torch
from torch import nn

import visionlora as vl
from tests.tolerances import assert_close
from visionlora.errors import AdapterFileError, AdapterStateError

pytestmark = pytest.mark.parity


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


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {"rank": 3, "alpha": 5.0}),
        ("rslora", {"rank": 4, "alpha": 2.0}),
        ("block-lora", {"rank": 4, "dropout": 0.0}),
        ("block-lora", {"rank": 4, "dropout": 0.0, "layout": "grid"}),
        ("lora-fa", {"rank": 2}),
        ("vera", {"rank": 5}),
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


def test_slices_become_one_pair_of_their_joint_rank(tmp_path):
    model, _ = adapted("lora", TARGETS, rank=3)
    vl.export(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"table": 3, "conv": 3}
    assert config["r"] == 6


def test_what_peft_cannot_express_is_refused(tmp_path):
    model, _ = adapted("dora", "qkv", rank=2)
    with pytest.raises(AdapterStateError, match="dora has no factor form"):
        vl.export(model, tmp_path / "dora")
    attention = nn.Sequential(nn.MultiheadAttention(8, 2))
    vl.inject(attention, "lora", "0[q]", rank=2)
    with pytest.raises(AdapterStateError, match="separate q, k, v"):
        vl.export(attention, tmp_path / "attention")
    with pytest.raises(AdapterFileError, match="unknown export format 'kohya'"):
        vl.export(attention, tmp_path / "attention", format="kohya")
    assert not (tmp_path / "attention").exists()
