"""Small trackers for the tests: random ones, and those of the official model's fixtures."""

from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch
from timm.layers import SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import visionlora as vl
from tasks.tracking.model import TRAINED, LoRAT, TrackerShape, Variant, add_adapter

SHAPE = TrackerShape(template_px=28, search_px=56)
"""2 x 2 and 4 x 4 tokens."""
WIDTH, DEPTH, RANK = 24, 2, 3

SMALL = Variant("small", "vit", SHAPE, WIDTH, DEPTH, heads=3, into=96, out_of=96, rank=4)


def vit(
    width: int = WIDTH, depth: int = DEPTH, *, gated: bool = False, native: int = 5, heads: int = 3
) -> VisionTransformer:
    """A ViT in DINOv2's form; its LayerScale lets the blocks matter."""
    ffn = {"mlp_layer": SwiGLUPacked, "mlp_ratio": 256 / 48, "act_layer": nn.SiLU} if gated else {}
    return VisionTransformer(
        img_size=14 * native,
        patch_size=14,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        init_values=0.5,
        num_classes=0,
        dynamic_img_size=True,
        **ffn,
    )


def tracker(method: str | None = f"lorat(rank={RANK},std=0.3)", **options: object) -> LoRAT:
    """A random tracker in evaluation mode, the same one every time."""
    torch.manual_seed(0)
    model = LoRAT(vit(**options), SHAPE)  # type: ignore[arg-type]
    if method is not None:
        add_adapter(model, method)
    vl.freeze_base(model, TRAINED)
    return model.eval()


class Batch(NamedTuple):
    """Input of a tracker."""

    template: Tensor
    search: Tensor
    mask: Tensor


def batch(size: int = 2) -> Batch:
    """Random crops, the object in the first row of the template."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(size, 2, 2, dtype=torch.long)
    mask[:, 0] = 1
    return Batch(
        torch.randn(size, 3, 28, 28, generator=generator),
        torch.randn(size, 3, 56, 56, generator=generator),
        mask,
    )


class Golden(NamedTuple):
    """One fixture of the official model."""

    tensors: dict[str, Tensor]
    rank: int
    shape: TrackerShape
    gated: bool

    def part(self, prefix: str) -> dict[str, Tensor]:
        """The tensors below a prefix, without it."""
        start = f"{prefix}."
        return {k[len(start) :]: v for k, v in self.tensors.items() if k.startswith(start)}

    def inputs(self) -> Batch:
        """What went into the official model."""
        given = self.part("in")
        return Batch(given["z"], given["x"], given["z_feat_mask"].long())


def golden(folder: Path, kind: str) -> Golden:
    """Read the fixture `mlp` or `swiglu`."""
    path = folder / "fixtures" / f"lorat_tiny_{kind}.safetensors"
    with safetensors.safe_open(path, "pt") as stream:
        said = stream.metadata()
    sides = [14 * int(said[key]) for key in ("z", "x")]
    tensors = safetensors.torch.load_file(path)
    return Golden(tensors, int(said["r"]), TrackerShape(*sides), kind == "swiglu")
