"""The embedded backbone: positions, folded norms, its file, and its names."""

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import visionlora as vl
from tasks.fewshot.vision_only import load_vision
from tasks.shared.tiny_vit import TinyViT, tiny_vit
from tasks.shared.tiny_vit.model import DEPTH, GRID, NAME, PATCH, WIDTH
from tasks.shared.tiny_vit.weights import FILE
from tests.tolerances import assert_close
from visionlora.errors import DataError

SMALL = {"grid": 4, "width": 24, "depth": 2, "heads": 3}


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return TinyViT(norm=True, **SMALL)


def pictures(side, count=2):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


def test_parameters_and_names_are_those_of_a_timm_vit():
    with torch.device("meta"):
        model = TinyViT()
    assert 2.9e6 < sum(p.numel() for p in model.parameters()) < 3.0e6
    assert {name.split(".")[0] for name in model.state_dict()} == {
        "patch_embed", "pos_embed", "blocks", "norm",
    }  # fmt: skip
    assert model.pos_embed.shape == (1, GRID * GRID, WIDTH)
    assert model.blocks[DEPTH - 1].attn.qkv.weight.shape == (3 * WIDTH, WIDTH)


def test_targets_written_for_timm_fit():
    model = TinyViT(**SMALL)
    targets = ["blocks.*.attn.qkv[q,k,v]", "blocks.*.attn.proj", "blocks.*.mlp.fc1", "*.mlp.fc2"]
    vl.inject(model, "lora", targets=targets, rank=2)
    width, depth = SMALL["width"], SMALL["depth"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == depth * 18 * 2 * width


def test_fold_preserves_output(vit):
    vit.train()
    vit(pictures(64, 8) * 3 + 1)  # so that the running statistics are not those of the start
    folded = vit.eval().fold()
    assert not any("norms" in name for name in folded.state_dict())
    assert_close(folded(pictures(64)), vit(pictures(64)))


def test_features_do_not_depend_on_the_batch(vit):
    vit.eval()
    both = vit.features(pictures(64))
    assert_close(both[1:], vit.features(pictures(64)[1:]))


def test_mean_of_features_is_the_output(vit):
    vit.eval()
    assert_close(vit(pictures(32)), vit.features(pictures(32)).mean(1))


def test_smaller_pictures_have_the_middle_of_the_grid(vit):
    table = vit.pos_embed.unflatten(1, (4, 4))
    assert torch.equal(vit.window(2, 2), table[:, 1:3, 1:3].flatten(1, 2))
    assert torch.equal(vit.window(4, 4), vit.pos_embed)
    assert torch.equal(vit.window(2, 3, top=0, left=1), table[:, :2, 1:].flatten(1, 2))


def test_larger_pictures_have_the_grid_resampled(vit):
    with torch.no_grad():
        vit.pos_embed.copy_(
            torch.linspace(0, 1, 4).repeat(4)[None, :, None].expand_as(vit.pos_embed)
        )
    rows = vit.window(6, 8).unflatten(1, (6, 8))[0, :, :, 0]
    assert torch.allclose(rows[0], rows[5], atol=1e-5)  # no change along a column
    assert (rows[0].diff() > 0).all()
    assert vit.eval()(pictures(96)).shape == (2, SMALL["width"])


def test_positions_change_features(vit):
    vit.eval()
    corner, middle = (vit.features(pictures(32), top, left) for top, left in ((0, 0), (1, 1)))
    assert not torch.allclose(corner, middle)


def test_file_round_trip(tmp_path):
    model = TinyViT()
    save_file({key: value.half() for key, value in model.state_dict().items()}, tmp_path / "t")
    found = tiny_vit(file=tmp_path / "t", num_classes=3)
    assert not found.training
    assert found(pictures(32)).shape == (2, 3)
    for name, value in found.state_dict().items():
        if "head" not in name:
            assert torch.equal(value, model.state_dict()[name].half().float()), name


def test_other_files_are_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        tiny_vit(file=tmp_path / "nothing")
    save_file(TinyViT(**SMALL).state_dict(), tmp_path / "small")
    with pytest.raises(DataError, match="does not hold"):
        tiny_vit(file=tmp_path / "small")


def test_timm_builds_it_and_classification_takes_it(tmp_path):
    save_file(TinyViT().state_dict(), tmp_path / "t.safetensors")
    assert isinstance(timm.create_model(NAME), TinyViT)
    found = load_vision(f"timm:{NAME}", str(tmp_path / "t.safetensors"), 64)
    assert found.model.width == WIDTH
    assert found.transform.size == 64


@pytest.mark.skipif(not FILE.is_file(), reason="the weights were not made yet")
def test_shipped_weights_are_small_and_finite():
    assert FILE.stat().st_size < 20e6
    assert all(value.isfinite().all() for value in load_file(FILE).values())
    features = tiny_vit().features(pictures(GRID * PATCH, 1))
    assert features.isfinite().all()
    assert features.std() > 0.1
