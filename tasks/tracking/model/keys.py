"""Names of the official LoRAT files and ours, both ways.

| theirs | ours |
|---|---|
| `token_type_embed`, `pos_embed`, `patch_embed.*` | `embedding.{types,positions,patch_embed.*}` |
| `head.*`, `norm.*`, `blocks.i.{norm1,norm2,ls1,ls2}.*` | the same |
| `blocks.i.attn.qkv.{q,k,v}.lora.{A,B}` | slices q, k, v of `blocks.i.attn.qkv` |
| `blocks.i.attn.proj.lora.{A,B}` | `blocks.i.attn.proj` |
| `blocks.i.mlp.{fc1,fc2}`, SwiGLU `{w12,w3}`, `.lora.{A,B}` | `blocks.i.mlp.{fc1,fc2}` |

A full file also has the frozen weight of every adapted layer, `<layer>.linear.weight` (or plainly
`<layer>.weight`); those of q, k and v are thirds of one matrix here.
"""

import re
from dataclasses import dataclass

QKV = ("q", "k", "v")


@dataclass(frozen=True)
class Layout:
    """What decides which names and shapes a file has."""

    width: int
    depth: int
    into: int
    """Outputs of an FFN's first layer."""
    out_of: int
    """Inputs of its second one."""
    grid: int | None = None
    """Cells per side of the search crop, where it is known."""

    @property
    def gated(self) -> bool:
        """Whether the FFN is SwiGLU."""
        return self.into != self.out_of

    def __str__(self) -> str:
        ffn = f"{self.into} -> {self.out_of}" if self.gated else str(self.into)
        grid = "" if self.grid is None else f", search grid {self.grid} x {self.grid}"
        return f"width {self.width}, {self.depth} blocks, FFN {ffn}{grid}"


@dataclass(frozen=True)
class AdaptedLayer:
    """One adapted layer of the official model, and the site that it is here."""

    theirs: str
    module: str
    key: str
    out_features: int
    in_features: int


def adapted_layers(layout: Layout) -> list[AdaptedLayer]:
    """Return all adapted layers in the order of the model."""
    d = layout.width
    first, second = ("w12", "w3") if layout.gated else ("fc1", "fc2")
    found = []
    for block in (f"blocks.{index}" for index in range(layout.depth)):
        qkv, proj = f"{block}.attn.qkv", f"{block}.attn.proj"
        found += [AdaptedLayer(f"{qkv}.{key}", qkv, key, d, d) for key in QKV]
        found += [
            AdaptedLayer(proj, proj, "weight", d, d),
            AdaptedLayer(f"{block}.mlp.{first}", f"{block}.mlp.fc1", "weight", layout.into, d),
            AdaptedLayer(f"{block}.mlp.{second}", f"{block}.mlp.fc2", "weight", d, layout.out_of),
        ]
    return found


def trained_shapes(width: int) -> dict[str, tuple[int, ...]]:
    """Return `{their name: shape}` of what trains beside the adapter."""
    shapes: dict[str, tuple[int, ...]] = {"token_type_embed": (3, width)}
    for mlp, out in (("cls_mlp", 1), ("reg_mlp", 4)):
        for index, rows in enumerate((width, width, out)):
            shapes[f"head.{mlp}.layers.{index}.weight"] = (rows, width)
            shapes[f"head.{mlp}.layers.{index}.bias"] = (rows,)
    return shapes


def frozen_names(layout: Layout) -> dict[str, tuple[str, ...]]:
    """Return `{our name: their names}` of the frozen tensors; three are stacked in this order."""
    names: dict[str, tuple[str, ...]] = {"embedding.positions": ("pos_embed",)}
    for kind in ("weight", "bias"):
        names[f"embedding.patch_embed.proj.{kind}"] = (f"patch_embed.proj.{kind}",)
        names[f"norm.{kind}"] = (f"norm.{kind}",)
    for layer in adapted_layers(layout):
        for kind in ("weight", "bias"):
            ours = f"{layer.module}.{kind}"
            names[ours] = (*names.get(ours, ()), f"{layer.theirs}.{kind}")
    for block in (f"blocks.{index}" for index in range(layout.depth)):
        same = [f"{block}.{n}.{kind}" for n in ("norm1", "norm2") for kind in ("weight", "bias")]
        same += [f"{block}.{scale}.gamma" for scale in ("ls1", "ls2")]
        names |= {name: (name,) for name in same}
    return names


def our_name(theirs: str) -> str:
    """Return our name of a tensor that trains beside the adapter."""
    return "embedding.types" if theirs == "token_type_embed" else theirs


def plain(theirs: str) -> str:
    """Return a name without the level that wraps the frozen part of an adapted layer."""
    return re.sub(r"\.linear\.(weight|bias)$", r".\1", theirs)
