"""The named trackers: sizes, counts and multiply-adds of the published models."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

import visionlora as vl
from tasks.shared.tiny_vit import TinyViT, tiny_vit
from tasks.shared.tiny_vit.weights import FILE
from tasks.tracking.model import VARIANTS, backbone, build, find_variant
from tasks.tracking.model.export import layout_of
from tasks.tracking.model.released import LAYOUTS
from tests.tasks.tracking.lorats import SMALL, vit
from tests.tolerances import assert_close
from visionlora.errors import ConfigError

# lora, head, types, trainable, total, total after merging, all at -224
COUNTS = {
    "s": (5_308_416, 593_285, 1_152, 5_902_853, 27_530_885, 22_222_469),
    "b": (10_616_832, 2_366_213, 2_304, 12_985_349, 98_708_741, 88_091_909),
    "l": (28_311_552, 4_203_525, 3_072, 32_518_149, 335_744_005, 307_432_453),
    "g": (70_778_880, 9_451_013, 4_608, 80_234_501, 1_215_001_093, 1_144_222_213),
}


REST = [("s", "224"), ("b", "378"), *((size, px) for size in "lg" for px in ("224", "378"))]


@pytest.mark.parametrize(
    ("size", "px"),
    [("s", "378"), ("b", "224"), *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)],
)
def test_counts_are_those_of_the_published_models(size: str, px: str) -> None:
    lora, head, types, trainable, total, merged = COUNTS[size]
    model = build(f"lorat-{size}-{px}", device="meta")
    more = (27**2 - 16**2) * (types // 3) if px == "378" else 0
    sizes = {name: item.numel() for name, item in model.named_parameters()}
    trained = sum(item.numel() for _, item in vl.trainable_parameters(model))
    assert sum(n for name, n in sizes.items() if ".adapters." in name) == lora
    assert sum(n for name, n in sizes.items() if name.startswith("head.")) == head
    assert sizes["embedding.types"] == types
    assert trained == trainable == lora + head + types
    assert sum(sizes.values()) == total + more
    vl.eject(model)
    assert sum(item.numel() for item in model.parameters()) == merged + more


@pytest.mark.parametrize(
    ("name", "billions"),
    [("b-224", 30), ("b-378", 97), ("l-224", 103), ("l-378", 325), ("g-224", 378), ("g-378", 1161)],
)
def test_multiply_adds_are_those_of_the_paper(name: str, billions: int) -> None:
    assert VARIANTS[f"lorat-{name}"].macs / 1e9 == pytest.approx(billions, abs=0.7)


@pytest.mark.parametrize(
    "name", ["tiny", "lorat-s-224", pytest.param("lorat-g-378", marks=pytest.mark.slow)]
)
def test_multiply_adds_are_what_the_model_does(name: str) -> None:
    variant, model = VARIANTS[name], build(name, method=None, device="meta")
    template, search = (
        torch.empty(1, 3, px, px, device="meta")
        for px in (variant.shape.template_px, variant.shape.search_px)
    )
    side = variant.shape.template_grid
    mask = torch.empty(1, side, side, dtype=torch.long, device="meta")
    with FlopCounterMode(display=False) as counter:
        model(template, search, mask)
    assert counter.get_total_flops() == 2 * variant.macs


def test_tiny_is_what_its_table_says() -> None:
    variant, model = VARIANTS["tiny"], build("tiny", device="meta")
    assert LAYOUTS["tiny"] == layout_of(model)
    assert model.blocks[0].attn.num_heads == variant.heads
    trained = sum(item.numel() for _, item in vl.trainable_parameters(model))
    d, rank = variant.width, variant.rank
    assert trained == 6 * 18 * rank * d + (4 * d * d + 9 * d + 5) + 3 * d


def test_tiny_takes_weights_of_its_backbone_and_its_whole_grid(tmp_path: Path) -> None:
    torch.manual_seed(5)
    trunk = TinyViT()
    save_file(trunk.state_dict(), tmp_path / "own.safetensors")
    model = build("tiny", backbone_weights=tmp_path / "own.safetensors")
    assert torch.equal(model.embedding.positions, trunk.pos_embed)
    assert torch.equal(model.blocks[5].mlp.fc2.weight, trunk.blocks[5].mlp.fc2.weight)
    with torch.no_grad(), vl.disabled(model):
        template = torch.randn(1, 3, 128, 128)
        tokens = model.remember(template, torch.zeros(1, 8, 8, dtype=torch.long))
        expected = trunk.patch_embed(template).flatten(1, 2) + trunk.window(8, 8, 0, 0)
        assert_close(tokens, expected + model.embedding.types[0])


@pytest.mark.skipif(not FILE.is_file(), reason="tiny-vit has no weights yet")
def test_tiny_stands_on_the_embedded_weights() -> None:
    assert torch.equal(
        build("tiny").blocks[0].attn.qkv.weight, tiny_vit().blocks[0].attn.qkv.weight
    )


def test_sizes_of_crops() -> None:
    small, large = VARIANTS["lorat-b-224"].shape, VARIANTS["lorat-b-378"].shape
    assert (small.template_grid, small.search_grid, small.tokens) == (8, 16, 320)
    assert (large.template_grid, large.search_grid, large.tokens) == (14, 27, 925)
    assert (small.search_factor, large.search_factor) == (4.0, 5.0)


def test_rank_follows_the_variant_unless_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbone, "_create", lambda variant: vit())

    def rank(method: str, **options: int) -> int:
        model = build(SMALL, method=method, device="meta", **options)
        return len(model.blocks[0].attn.proj.adapters["default"]["weight"].A)

    assert rank("lorat") == SMALL.rank
    assert rank("lora(rank=2)") == 2
    assert rank("lora", rank=3) == 3
    assert {variant.rank for name, variant in VARIANTS.items() if "-" in name} == {64}


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'lorat-b-224'"):
        find_variant("lorat-b-225")
