"""The trackers by name: backbone, sizes of the crops, and what they cost.

| | width | depth | heads | FFN (into fc1, out of fc2's input) | drop-path |
|---|---|---|---|---|---|
| S | 384 | 12 | 6 | GELU, 1536, 1536 | 0 |
| B | 768 | 12 | 12 | GELU, 3072, 3072 | 0 |
| L | 1024 | 24 | 16 | GELU, 4096, 4096 | 0.1 |
| g | 1536 | 40 | 24 | SwiGLU, 8192, 4096 | 0.4 |
| tiny | 192 | 6 | 3 | GELU, 768, 768 | 0 |

S to g stand on DINOv2 (patch 14, positions for 518 px) and are those of LoRAT (Lin et al. 2024,
2403.05231): `-224` looks for the object on 224 px with a template of 112 px, `-378` on 378 px with
196 px. Figures of S are ours; the paper has B, L and g. `tiny` stands on the project's own small
ViT. The area factor f says how much of the picture a crop shows (`tasks/tracking/geometry`).
"""

from dataclasses import dataclass

from visionlora.errors import ConfigError, nearest

TINY = "tiny"
TINY_VIT = "tiny-vit"
RANK = 64
"""Rank of LoRAT's adapters on DINOv2."""
TINY_RANK = 16
"""The same share of the width."""


@dataclass(frozen=True)
class TrackerShape:
    """Sizes of the two crops; both sides of a crop are equal."""

    template_px: int
    search_px: int
    template_factor: float = 2.0
    """Area factor of the template crop."""
    search_factor: float = 4.0
    """Area factor of the search crop."""
    patch: int = 14
    """Pixels per token side."""

    def __post_init__(self) -> None:
        """Check that the crops divide into patches, and the template fits into the search grid."""
        for what, size in (("template", self.template_px), ("search", self.search_px)):
            if size < self.patch or size % self.patch:
                raise ConfigError(
                    f"the {what} crop must be a multiple of the patch side {self.patch}, "
                    f"got {size} px"
                )
        if self.template_px > self.search_px:
            raise ConfigError(
                f"the template ({self.template_px} px) must not be larger than the search crop "
                f"({self.search_px} px), whose positions it shares"
            )

    @property
    def template_grid(self) -> int:
        """Tokens per side of the template."""
        return self.template_px // self.patch

    @property
    def search_grid(self) -> int:
        """Tokens per side of the search crop."""
        return self.search_px // self.patch

    @property
    def tokens(self) -> int:
        """Tokens of one forward pass."""
        return self.template_grid**2 + self.search_grid**2


@dataclass(frozen=True)
class Variant:
    """One tracker: what it is built from."""

    name: str
    backbone: str
    """Name in timm, or `tiny-vit`."""
    shape: TrackerShape
    width: int
    depth: int
    heads: int
    into: int
    """Outputs of an FFN's first layer."""
    out_of: int
    """Inputs of its second layer: half of `into` where the one half gates the other."""
    drop_path: float = 0.0
    """The same in every block."""
    rank: int = RANK
    file: str = ""
    """Name of the backbone's weights file as DINOv2 publishes it."""
    patch_macs: int = 0
    """Multiply-adds of the patch embedding per token."""

    @property
    def gated(self) -> bool:
        """Whether the FFN is SwiGLU."""
        return self.into != self.out_of

    @property
    def embedded(self) -> bool:
        """Whether the backbone's weights come with this package."""
        return self.backbone == TINY_VIT

    @property
    def macs(self) -> int:
        """Multiply-adds of one frame with merged adapters, template included.

        depth (L lin + 2 L^2 d) + L patch + N_x (4 d^2 + 5 d), lin = 4 d^2 + d into + out_of d,
        for L tokens, N_x of them of the search crop (norms and GELU are not counted).
        """
        d, tokens = self.width, self.shape.tokens
        linear = 4 * d * d + d * self.into + self.out_of * d
        blocks = self.depth * (tokens * linear + 2 * tokens * tokens * d)
        head = self.shape.search_grid**2 * (4 * d * d + 5 * d)
        return blocks + tokens * self.patch_macs + head


def find_variant(name: str) -> Variant:
    """Return the variant called `name`.

    Raises:
        ConfigError: there is none.
    """
    if name not in VARIANTS:
        raise ConfigError(
            f"unknown tracker {name!r}{nearest(name, VARIANTS)}; known: {', '.join(VARIANTS)}"
        )
    return VARIANTS[name]


_SHAPES = {
    "224": TrackerShape(template_px=112, search_px=224, search_factor=4.0),
    "378": TrackerShape(template_px=196, search_px=378, search_factor=5.0),
}
# timm's word for the size, width, depth, heads, into fc1, out of fc2's input, drop-path
_SIZES = {
    "s": ("small", 384, 12, 6, 1536, 1536, 0.0),
    "b": ("base", 768, 12, 12, 3072, 3072, 0.0),
    "l": ("large", 1024, 24, 16, 4096, 4096, 0.1),
    "g": ("giant", 1536, 40, 24, 8192, 4096, 0.4),
}


def _dinov2(size: str, px: str) -> Variant:
    word, width, depth, heads, into, out_of, drop_path = _SIZES[size]
    return Variant(
        name=f"lorat-{size}-{px}",
        backbone=f"vit_{word}_patch14_dinov2.lvd142m",
        shape=_SHAPES[px],
        width=width,
        depth=depth,
        heads=heads,
        into=into,
        out_of=out_of,
        drop_path=drop_path,
        file=f"dinov2_vit{size}14_pretrain.pth",
        patch_macs=3 * 14 * 14 * width,
    )


VARIANTS = {variant.name: variant for variant in (_dinov2(s, px) for px in _SHAPES for s in _SIZES)}
VARIANTS[TINY] = Variant(
    name=TINY,
    backbone=TINY_VIT,
    shape=TrackerShape(template_px=128, search_px=256, patch=16),
    width=192,
    depth=6,
    heads=3,
    into=768,
    out_of=768,
    rank=TINY_RANK,
    # four convolutions of stride 2, to 24, 48, 96 and 192 channels
    patch_macs=9 * (64 * 3 * 24 + 16 * 24 * 48 + 4 * 48 * 96 + 96 * 192),
)
