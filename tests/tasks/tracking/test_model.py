"""The network as a whole: golden outputs, what trains, merging, independence of samples."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import visionlora as vl
from tasks.tracking.model import TRAINED, LoRAT, TrackerShape, add_adapter, backbone, build
from tasks.tracking.model.backbone import from_dinov2
from tasks.tracking.model.released import read_released
from tasks.tracking.model.tensors import fill
from tasks.tracking.model.trained import load_trained
from tests.tasks.tracking.lorats import RANK, SHAPE, SMALL, WIDTH, batch, golden, tracker, vit
from tests.tolerances import assert_close
from visionlora.errors import ConfigError
from visionlora.record import hosts_of


@pytest.mark.data
@pytest.mark.parametrize("kind", ["mlp", "swiglu"])
def test_official_outputs_unmerged_and_merged(
    tracking_data: Path, tmp_path: Path, kind: str
) -> None:
    from safetensors.torch import save_file

    given = golden(tracking_data, kind)
    trunk = vit(48, gated=given.gated, native=37)
    fill(trunk, from_dinov2(given.part("backbone")), "the fixture")
    model = LoRAT(trunk, given.shape).eval()
    assert torch.equal(model.embedding.positions, given.tensors["pos_embed"])
    save_file(given.part("adapter"), tmp_path / "adapter.bin")
    load_trained(model, read_released(tmp_path / "adapter.bin"))
    wanted = given.part("out")

    def difference() -> float:
        found = model(*given.inputs())
        pairs = ((found.score, wanted["score_map"]), (found.boxes, wanted["boxes"]))
        return max(float((a - b).abs().max()) for a, b in pairs)

    with torch.no_grad():
        assert difference() <= 1e-5
        vl.merge(model)
        assert difference() <= 1e-5
        vl.unmerge(model)
        with vl.disabled(model):
            assert difference() > 1e-3  # so the adapter matters in this fixture


def test_projections_have_adapters_of_their_own() -> None:
    model = tracker()
    adapter = sum(
        item.numel() for host in hosts_of(model).values() for item in host.adapters.parameters()
    )
    assert adapter == 2 * 18 * RANK * WIDTH  # one on the fused qkv would make it 16
    assert list(model.blocks[0].attn.qkv.adapters["default"]) == ["q", "k", "v"]


def test_only_adapter_types_and_head_learn() -> None:
    model = tracker().train()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    prediction = model(*batch())
    (prediction.score.square().sum() + prediction.boxes.square().sum()).backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        trains = name.startswith(("embedding.types", "head.")) or ".adapters." in name
        assert (parameter.grad is not None) == trains, name
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    assert all(float(p.grad.abs().max()) > 0 for p in model.parameters() if p.requires_grad)


def test_lorats_start_has_the_size_it_should() -> None:
    torch.manual_seed(0)
    model = LoRAT(vit(96), SHAPE)
    add_adapter(model, "lorat(rank=16)")
    for host in hosts_of(model).values():
        for slot in host.slots:
            change = slot.delta.delta(host.view(slot.key))
            assert float(change.detach().std()) == pytest.approx(16**0.5 * 4e-4, rel=0.1)


def test_plain_lora_starts_as_the_backbone() -> None:
    with_adapter, without = tracker(f"lora(rank={RANK})"), tracker(None)
    assert torch.equal(with_adapter(*batch()).boxes, without(*batch()).boxes)


def test_merging_is_undone_and_training_goes_on() -> None:
    model = tracker()
    weight = model.blocks[0].mlp.fc1.weight.clone()
    before = model(*batch())
    vl.merge(model)
    assert float((model.blocks[0].mlp.fc1.weight - weight).abs().max()) > 1e-4
    assert_close(model(*batch()).score, before.score)
    vl.unmerge(model)
    assert torch.equal(model.blocks[0].mlp.fc1.weight, weight)
    model.train()
    model(*batch()).score.sum().backward()
    delta = model.blocks[0].mlp.fc1.adapters["default"]["weight"]
    assert float(delta.A.grad.abs().max()) > 0
    assert float(delta.B.grad.abs().max()) > 0


def test_samples_do_not_see_each_other() -> None:
    model, both = tracker(), batch(3)
    together = model(*both)
    for index in range(3):
        alone = model(*(item[index : index + 1] for item in both))
        assert_close(alone.score, together.score[index : index + 1])
        assert_close(alone.boxes, together.boxes[index : index + 1])


def test_template_and_search_are_not_interchangeable() -> None:
    torch.manual_seed(0)
    model = LoRAT(vit(), TrackerShape(56, 56)).eval()
    one, other = torch.randn(2, 1, 3, 56, 56)
    mask = torch.zeros(1, 4, 4, dtype=torch.long)
    assert not torch.allclose(model(one, other, mask).score, model(other, one, mask).score)


def test_remembered_template_gives_the_same_prediction() -> None:
    model, (template, search, mask) = tracker(), batch()
    remembered = model.remember(template, mask)
    assert torch.equal(model.locate(remembered, search).boxes, model(template, search, mask).boxes)


def test_half_precision_still_predicts_in_single() -> None:
    model = tracker()
    with torch.autocast("cpu", torch.bfloat16):
        prediction = model(*batch())
    assert prediction.score.dtype == prediction.boxes.dtype == torch.float32
    assert_close(prediction.score.bfloat16(), model(*batch()).score)


@pytest.mark.parametrize("method", ["dora", "block-lora+glad", "pissa", "norm", "oft(block=8)"])
def test_other_methods_take_the_place_of_lora(method: str) -> None:
    model = LoRAT(vit(), SHAPE)
    add_adapter(model, method, usual_rank=2)
    vl.freeze_base(model, TRAINED)
    model(*batch()).score.sum().backward()
    adapted = [item for n, item in model.named_parameters() if ".adapters." in n]
    assert any(item.grad is not None and bool(item.grad.any()) for item in adapted)
    assert model.embedding.types.grad is not None


def test_same_seed_same_tracker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone, "_create", lambda variant: vit())

    def made(seed: int) -> dict[str, Tensor]:
        return build(SMALL, backbone_weights="random", seed=seed).state_dict()

    first, again, other = made(3), made(3), made(4)
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
        drawn = name == "embedding.types" or ".adapters." in name or "mlp.layers" in name
        changes = drawn and not name.endswith("bias")
        assert torch.equal(value, other[name]) != changes, name


def test_crops_of_another_size_are_refused() -> None:
    template, _, mask = batch()
    with pytest.raises(ConfigError, match="56 x 56 px here, got 28 x 28"):
        tracker()(template, template, mask)
