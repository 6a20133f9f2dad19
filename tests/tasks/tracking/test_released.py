"""Files of the official format, and of backbones: round trips, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

import visionlora as vl
from tasks.tracking.model import VARIANTS, LoRAT, add_adapter, backbone, build
from tasks.tracking.model.export import layout_of, write_released
from tasks.tracking.model.keys import adapted_layers, frozen_names, trained_shapes
from tasks.tracking.model.released import LAYOUTS, read_released
from tasks.tracking.model.tensors import read_tensors
from tasks.tracking.model.trained import load_trained
from tests.tasks.tracking.lorats import RANK, SHAPE, SMALL, WIDTH, batch, golden, tracker, vit
from tests.tolerances import assert_close
from visionlora.errors import AdapterFileError, ConfigError, DataError
from visionlora.record import hosts_of


def fresh(**options: object) -> LoRAT:
    """The backbone of `tracker()`, with another head and no adapter."""
    model = tracker(None, **options)
    model.head.load_state_dict({k: v + 1 for k, v in model.head.state_dict().items()})
    return model


def same(one: LoRAT, other: LoRAT) -> bool:
    return torch.allclose(one(*batch()).boxes, other(*batch()).boxes, atol=1e-6)


def edited(path: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """Rewrite a file after a change of its tensors."""
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)
    return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variant SMALL can be built."""
    monkeypatch.setattr(backbone, "_create", lambda variant: vit())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An exported tracker of rank 3; safetensors in spite of its name."""
    return write_released(tracker(), tmp_path / "tracker.bin")


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    "recipe", ["lorat(rank=3)", "lorat(rank=3,alpha=6)", "rslora(rank=3)+normal(std=0.1)"]
)
def test_round_trip(tmp_path: Path, recipe: str, gated: bool) -> None:
    model, other = tracker(recipe, gated=gated), fresh(gated=gated)
    assert not same(model, other)
    load_trained(other, read_released(write_released(model, tmp_path / "t.safetensors")))
    assert same(model, other)


@pytest.mark.data
@pytest.mark.parametrize("kind", ["mlp", "swiglu"])
def test_official_names_both_ways(tracking_data: Path, tmp_path: Path, kind: str) -> None:
    given = golden(tracking_data, kind)
    adapter = given.part("adapter")
    safetensors.torch.save_file(adapter, tmp_path / "in.bin")
    file = read_released(tmp_path / "in.bin")
    model = LoRAT(vit(48, gated=given.gated, native=37), given.shape)
    load_trained(model, file)
    written = safetensors.torch.load_file(write_released(model, tmp_path / "out.bin"))
    assert written.keys() == adapter.keys() | {"use_rslora"}
    for name, value in adapter.items():
        assert torch.equal(written[name].double(), value.double()), name


def test_published_files_have_as_many_tensors() -> None:
    for name, count in (("lorat-b-224", 157), ("lorat-l-378", 301), ("lorat-g-224", 493)):
        assert 2 * len(adapted_layers(LAYOUTS[name])) + 13 == count


def test_without_alpha_it_is_the_rank(file: Path) -> None:
    edited(file, lambda t: (t.pop("lora_alpha"), t.pop("use_rslora")))
    model = fresh()
    load_trained(model, read_released(file))
    assert same(model, tracker())
    doubled = fresh()
    load_trained(doubled, read_released(file), f"lora(alpha={2 * RANK})")
    assert not same(doubled, model)


def test_alpha_of_one_layer_counts(file: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["blocks.0.attn.proj.lora.alpha"] = torch.tensor(2.0 * RANK)
        tensors["blocks.1.mlp.fc2.lora.use_rslora"] = torch.tensor(True)

    model, expected = fresh(), tracker()
    load_trained(model, read_released(edited(file, change)))
    for module, factor in (("0.attn.proj", 2.0), ("1.mlp.fc2", RANK**0.5)):
        delta = expected.blocks.get_submodule(module).adapters["default"]["weight"]
        delta.B.data *= factor
    assert same(model, expected)
    assert not same(model, tracker())


def full(model: LoRAT) -> dict[str, Tensor]:
    """What the official code saves of a whole model."""
    state = model.state_dict()
    found: dict[str, Tensor] = {}
    for ours, theirs in frozen_names(layout_of(model)).items():
        for name, part in zip(theirs, state[ours].chunk(len(theirs)), strict=True):
            layer, _, kind = name.rpartition(".")
            wrapped = any(item.theirs == layer for item in adapted_layers(layout_of(model)))
            found[f"{layer}.linear.{kind}" if wrapped else name] = part.clone()
    return found


@pytest.mark.parametrize("gated", [False, True])
def test_full_files_bring_the_backbone(tmp_path: Path, gated: bool) -> None:
    model = tracker(gated=gated)
    path = write_released(model, tmp_path / "full.bin")
    edited(path, lambda tensors: tensors.update(full(model)))
    torch.manual_seed(7)
    other = LoRAT(vit(gated=gated), SHAPE).eval()
    load_trained(other, read_released(path))
    assert same(model, other)
    with pytest.raises(AdapterFileError, match="lacks pos_embed"):
        read_released(edited(path, lambda tensors: tensors.pop("pos_embed")))


def test_head_alone(tmp_path: Path) -> None:
    model, other = tracker(None), fresh()
    path = write_released(model, tmp_path / "head.safetensors")
    assert len(safetensors.torch.load_file(path)) == 13
    load_trained(other, read_released(path))
    assert same(model, other)
    adapted = fresh()
    load_trained(adapted, read_released(path), "lora", rank=2)
    assert same(model, adapted)
    assert sum(len(host.slots) for host in hosts_of(adapted).values()) == 6 * len(model.blocks)


def test_pickles_of_tensors_are_read_and_no_others(file: Path, tmp_path: Path) -> None:
    torch.save(safetensors.torch.load_file(file), tmp_path / "old.safetensors")
    assert read_released(tmp_path / "old.safetensors").rank == RANK
    torch.save({"code": Path("x")}, tmp_path / "code.bin")
    (tmp_path / "noise.bin").write_bytes(b"noise")
    (tmp_path / "cut.bin").write_bytes(file.read_bytes()[:2000])
    for name in ("code.bin", "noise.bin", "cut.bin", "absent.bin"):
        with pytest.raises(DataError, match=name) as caught:
            read_tensors(tmp_path / name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.1.attn.qkv.k.lora.A"), "lacks blocks.1.attn.qkv.k.lora.A"),
        (lambda t: t.pop("head.cls_mlp.layers.2.bias"), "lacks head.cls_mlp.layers.2.bias"),
        (lambda t: t.pop("token_type_embed"), "no LoRAT tracker"),
        (lambda t: t.update(extra=torch.ones(1)), "unexpected extra"),
        (lambda t: t.update({"blocks.7.attn.proj.lora.A": torch.ones(3, 24)}), "lacks|unexpected"),
        (lambda t: t.update({"blocks.1.attn.proj.lora.A": torch.ones(4, 24)}), "proj.lora.A is"),
        (lambda t: t["token_type_embed"].fill_(float("nan")), "holds NaN"),
    ],
)
def test_incomplete_or_foreign_files_are_refused(
    file: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    with pytest.raises(AdapterFileError, match=message) as caught:
        read_released(edited(file, change))
    assert "\n" not in str(caught.value)


def test_another_model_or_rank_is_refused(file: Path) -> None:
    with pytest.raises(AdapterFileError, match=r"for another model \(width 24, 2 blocks"):
        build("lorat-b-224", weights=file, device="meta")
    released = read_released(file)
    with pytest.raises(ConfigError, match="rank 3, not 8"):
        load_trained(fresh(), released, "lora(rank=8)")
    with pytest.raises(ConfigError, match="holds LoRA, not dora"):
        load_trained(fresh(), released, "dora")
    with pytest.raises(ConfigError, match="leave method out"):
        load_trained(fresh(), released, None)
    with pytest.raises(AdapterFileError, match="3 blocks"):
        load_trained(fresh(depth=3), released)


def test_the_right_variant_is_named(tmp_path: Path) -> None:
    shapes = trained_shapes(384)
    for layer in adapted_layers(LAYOUTS["lorat-s-224"]):
        shapes[f"{layer.theirs}.lora.A"] = (2, layer.in_features)
        shapes[f"{layer.theirs}.lora.B"] = (layer.out_features, 2)
    path = tmp_path / "s.bin"
    safetensors.torch.save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    message = r"is for lorat-s-224 or lorat-s-378 \(.*not for lorat-b-224"
    with pytest.raises(AdapterFileError, match=message):
        build("lorat-b-224", weights=path)
    model = build("lorat-s-378", weights=path, device="meta")
    assert len(model.blocks[0].attn.proj.adapters["default"]["weight"].A) == 2


@pytest.mark.parametrize("method", ["dora", "hira(rank=2)", "block-lora"])
def test_only_lora_is_exported(tmp_path: Path, method: str) -> None:
    with pytest.raises(ConfigError, match=f"LoRA alone, not {method[:4]}"):
        write_released(tracker(method), tmp_path / "x.bin")
    assert not list(tmp_path.iterdir())


def test_a_start_that_was_taken_off_is_exported(tmp_path: Path) -> None:
    model = tracker("pissa")
    for name, item in model.named_parameters():
        if ".adapters." in name:
            item.data += 0.01
    other = fresh()
    load_trained(other, read_released(write_released(model, tmp_path / "t.bin")))
    assert_close(other(*batch()).boxes, model(*batch()).boxes)


def test_scaled_and_merged_trackers_are_exported_as_they_are(tmp_path: Path) -> None:
    model, other = tracker(), fresh()
    vl.set_scale(model, 0.5)
    vl.merge(model)
    load_trained(other, read_released(write_released(model, tmp_path / "t.bin")))
    assert same(model, other)


def test_partial_adapters_are_not_exported(tmp_path: Path) -> None:
    model = tracker(None)
    vl.inject(model, "lora", "mlp.fc1")
    with pytest.raises(ConfigError, match="every linear layer"):
        write_released(model, tmp_path / "x.bin")
    vl.inject(model, "lora", "mlp.fc1", name="second")
    with pytest.raises(ConfigError, match="default, second"):
        write_released(model, tmp_path / "x.bin")


def test_native_files_are_read_as_well(tmp_path: Path, small: None) -> None:
    model = build(SMALL, method="dora", backbone_weights="random")
    model.head.cls_mlp.layers[-1].bias.data += 3
    path = vl.save(model, tmp_path / "native.safetensors")
    again = build(SMALL, weights=path, backbone_weights="random", seed=5)
    for name, item in vl.trainable_parameters(model):
        assert torch.equal(item, again.get_parameter(name)), name
    with pytest.raises(ConfigError, match="holds an adapter; leave method out"):
        build(SMALL, method=None, weights=path, backbone_weights="random")
    with pytest.raises(ConfigError, match="holds dora, not lora"):
        build(SMALL, method="lora", weights=path, backbone_weights="random")
    with pytest.raises(AdapterFileError, match="rank"):
        build(SMALL, method="dora", weights=path, backbone_weights="random", rank=2)
    build(SMALL, method="dora", weights=path, backbone_weights="random", dropout=0.1)


@pytest.mark.parametrize("gated", [False, True])
def test_dinov2_checkpoints_become_timms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gated: bool
) -> None:
    torch.manual_seed(3)
    source = vit(gated=gated)
    theirs = {"mask_token": torch.zeros(1, WIDTH)}
    for name, value in source.state_dict().items():
        if gated:
            name = name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        theirs[name] = value
    torch.save(theirs, tmp_path / "dinov2.pth")
    safetensors.torch.save_file(source.state_dict(), tmp_path / "timm.safetensors")
    monkeypatch.setattr(backbone, "_create", lambda variant: vit(gated=gated))
    for path in tmp_path.iterdir():
        found = backbone.load_backbone(SMALL, path)
        for name, value in source.state_dict().items():
            assert torch.equal(found.state_dict()[name], value), name
        assert not any(item.requires_grad for item in found.parameters())


def test_wrong_backbone_files_are_refused(tmp_path: Path, file: Path, small: None) -> None:
    file_named = replace(SMALL, file=VARIANTS["lorat-s-224"].file)
    with pytest.raises(DataError, match=r"does not hold vit: it lacks blocks.0.attn.proj.bias"):
        backbone.load_backbone(SMALL, file)
    with pytest.raises(ConfigError, match="hub, random, or a file such as dinov2_vits14_pretrain"):
        backbone.load_backbone(file_named, tmp_path / "absent.pth")


def test_random_backbones_are_announced(caplog: pytest.LogCaptureFixture, small: None) -> None:
    backbone.load_backbone(SMALL, "random")
    assert "small: random backbone" in caplog.text


def test_added_adapter_keeps_the_recipe() -> None:
    recipe = add_adapter(tracker(None), "block-lora+glad(rho=0.2)", usual_rank=4)
    assert [item.name for item in recipe.dynamics] == ["glad"]


def test_missing_weights_are_soon_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"lorat-g-378 .*dinov2_vitg14_pretrain.pth of DINOv2"):
        build("lorat-g-378")
