"""Adapters that began with an initialiser are plain LoRA in PEFT, with alpha to match the rank."""

import json

import pytest

import visionlora as vl
from tests.init.given import matrix
from tests.methods.chains import chain, delta_of, disturb
from tests.tolerances import assert_close

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.parity

SHAPES = (12, 10), (10, 9)
X, GOAL = matrix(8, 12, seed=4), matrix(8, 9, seed=5)


def loss_fn(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


@pytest.mark.parametrize(
    ("method", "init", "options", "rank"),
    [
        ("lora", "lora-ga", {}, 8),
        ("lora", "lora-ga", {"scaling": "rslora"}, 8),
        ("lora", "milora", {"scaling": "rslora"}, 8),
        ("lora", "lora-one", {}, 4),
        ("slora", "nlora", {}, 4),
        ("lora-xs", "lora-sb", {}, 4),
        ("lora-xs", "nlora", {}, 4),
    ],
)
def test_peft_computes_the_same_output(method, init, options, rank, tmp_path):
    model = vl.inject(chain(*SHAPES), method, rank=4, alpha=6.0, **options)
    vl.initialise(model, init, [(X, GOAL)], loss_fn)
    disturb(model, 0.1).eval()
    vl.export(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["r"] == rank
    # the rank is another one, what stands before the product is not
    divisor = rank**0.5 if config["use_rslora"] else rank
    assert config["lora_alpha"] / divisor == pytest.approx(delta_of(model[0]).scale)
    there = peft.PeftModel.from_pretrained(chain(*SHAPES), tmp_path, autocast_adapter_dtype=False)
    assert_close(there.eval()(X), model(X))
