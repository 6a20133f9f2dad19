"""What is timed beside PEFT is the same tracker, with as many trained numbers."""

import json

import pytest
import torch

pytest.importorskip("peft", reason="the benchmark extra is not installed")

import visionlora as vl
from benchmarks import tracking_step as bench
from tasks.tracking.model.variants import find_variant
from tests.tolerances import assert_close

TRACKER = "tiny"


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(bench, "RANK", 4)


def trained(model):
    return sum(item.numel() for item in model.parameters() if item.requires_grad)


def test_both_sides_are_the_same_tracker():
    ours, theirs = bench.ours(TRACKER).double(), bench.with_peft(TRACKER).double()
    factors = vl.adapter_state_dict(ours)
    with torch.no_grad():
        for name, layer in theirs.named_modules():
            if hasattr(layer, "lora_A"):
                parent, _, part = name.rpartition(".")
                place = f"{parent}.qkv.{part}" if part in ("q", "k", "v") else f"{name}.weight"
                layer.lora_A["default"].weight.copy_(factors[f"adapter.{place}.A"])
                layer.lora_B["default"].weight.copy_(factors[f"adapter.{place}.B"])
        theirs.head.load_state_dict(ours.head.state_dict())
        theirs.embedding.load_state_dict(ours.embedding.state_dict())
    batch = {
        name: item.double() if item.is_floating_point() else item
        for name, item in bench.pairs(find_variant(TRACKER).shape, 1).items()
    }
    assert_close(bench.loss_of(theirs, batch), bench.loss_of(ours, batch))
    assert trained(theirs) == trained(ours)


def test_a_run_writes_a_line_per_row(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    short = ["--batch", "1", "--rounds", "1", "--threads", "1"]
    bench.main(["--tracker", TRACKER, *short, "--json", str(file)])
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert [row["what"] for row in rows] == ["step", "saved", "step", "saved", "frame"]
    plain, lean = (row for row in rows if row["what"] == "saved")
    assert plain["ratio"] == plain["peft"] / plain["ours"]
    assert (plain["lean"], lean["lean"]) == (False, True)
    assert lean["ours"] < plain["ours"]
    assert "one frame, merged" in capsys.readouterr().out
