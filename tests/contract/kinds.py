"""Every kind of weight that the contract runs over: the layer, how it is called, and its sites."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 12


class Net(nn.Module):
    """One adapted layer, called as a model would call it."""

    def __init__(self, layer: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.layer = layer
        self.call = call

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the layer's output tensor."""
        return self.call(self.layer, *inputs)


def _plain(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


def _self_attention(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, x, x, need_weights=False)[0]


def _cross_attention(layer: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return layer(query, key, value, need_weights=True)[0]


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of weight: the layer, how it is called, and which rows each site has."""

    name: str
    layer: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    views: dict[str, tuple[str, slice]]
    """`{site key: (parameter, rows)}`."""
    target: str = "layer"
    call: Callable[..., Tensor] = _plain
    indices: bool = False
    norm: bool = False

    def model(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> Net:
        """Return a fresh base model; the same seed gives the same weights."""
        state = torch.default_generator.get_state()
        torch.default_generator.manual_seed(1000 + seed)
        model = Net(self.layer(), self.call).to(dtype)
        torch.default_generator.set_state(state)
        return model

    def inputs(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
        """Return random inputs."""
        generator = torch.Generator().manual_seed(2000 + seed)
        if self.indices:
            return (torch.randint(0, 20, self.shapes[0], generator=generator),)
        return tuple(
            torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            for shape in self.shapes
        )


_ALL = {"weight": ("weight", slice(None))}
_E = 8
FUSED = {
    "q": ("in_proj_weight", slice(0, _E)),
    "k": ("in_proj_weight", slice(_E, 2 * _E)),
    "v": ("in_proj_weight", slice(2 * _E, 3 * _E)),
    "out": ("out_proj.weight", slice(None)),
}
_SEPARATE = {
    "q": ("q_proj_weight", slice(None)),
    "k": ("k_proj_weight", slice(None)),
    "v": ("v_proj_weight", slice(None)),
    "out": ("out_proj.weight", slice(None)),
}


def _conv(*args: Any, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(*args, **options)


def _mha(**options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layer = nn.MultiheadAttention(_E, 2, **options)
        for bias in (layer.in_proj_bias, layer.out_proj.bias):
            if bias is not None:  # zero at first, which would hide a bias that is applied wrongly
                nn.init.normal_(bias)
        return layer

    return build


def _lively(norm: nn.Module) -> nn.Module:
    """Give a norm weights and biases that are not ones and zeros."""
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return norm


KINDS = [
    Kind("linear-square", lambda: nn.Linear(WIDTH, WIDTH), ((2, 5, WIDTH),), _ALL),
    Kind("linear-tall", lambda: nn.Linear(6, 20), ((7, 6),), _ALL),
    Kind("linear-wide", lambda: nn.Linear(20, 6, bias=False), ((3, 2, 2, 20),), _ALL),
    Kind("linear-vector", lambda: nn.Linear(6, 8), ((6,),), _ALL),
    Kind("linear-many-tokens", lambda: nn.Linear(6, 6), ((64, 6),), _ALL),
    Kind(
        "qkv-slices",
        lambda: nn.Linear(WIDTH, 3 * WIDTH),
        ((2, 5, WIDTH),),
        {"q": ("weight", slice(0, WIDTH)), "v": ("weight", slice(2 * WIDTH, 3 * WIDTH))},
        target="layer[q,v]",
    ),
    Kind(
        "row-range",
        lambda: nn.Linear(WIDTH, 2 * WIDTH),
        ((4, WIDTH),),
        {"rows_0_10": ("weight", slice(0, 10))},
        target="layer[0:10]",
    ),
    Kind("conv-1x1", _conv(4, 6, 1), ((2, 4, 5, 5),), _ALL),
    Kind("conv-strided", _conv(4, 6, 3, stride=2, dilation=2, padding=1), ((2, 4, 9, 8),), _ALL),
    Kind("conv-groups", _conv(4, 6, 3, groups=2, padding=1), ((2, 4, 5, 5),), _ALL),
    Kind("conv-depthwise", _conv(4, 4, 3, groups=4, padding="same"), ((2, 4, 6, 6),), _ALL),
    Kind(
        "conv-multiplier",
        _conv(4, 8, (2, 3), groups=4, bias=False, stride=(1, 2)),
        ((2, 4, 6, 6),),
        _ALL,
    ),
    Kind(
        "conv-circular",
        _conv(2, 4, 3, padding=(1, 2), padding_mode="circular"),
        ((2, 2, 6, 6),),
        _ALL,
    ),
    Kind("conv-single-image", _conv(2, 4, 3), ((2, 6, 6),), _ALL),
    Kind(
        "conv-rows",
        _conv(2, 8, 3),
        ((2, 2, 6, 6),),
        {"rows_2_6": ("weight", slice(2, 6))},
        target="layer[2:6]",
    ),
    Kind("mha-self", _mha(batch_first=True), ((2, 5, _E),), FUSED, call=_self_attention),
    Kind(
        "mha-sequence-first",
        _mha(bias=False),
        ((5, 2, _E),),
        {key: FUSED[key] for key in ("q", "v")},
        target="layer[q,v]",
        call=_self_attention,
    ),
    Kind(
        "mha-cross",
        _mha(batch_first=True),
        ((2, 5, _E), (2, 3, _E), (2, 3, _E)),
        FUSED,
        call=_cross_attention,
    ),
    Kind(
        "mha-widths",
        _mha(kdim=6, vdim=10),
        ((5, 2, _E), (3, 2, 6), (3, 2, 10)),
        _SEPARATE,
        call=_cross_attention,
    ),
    Kind("mha-unbatched", _mha(), ((5, _E),), FUSED, call=_self_attention),
    Kind(
        "embedding",
        lambda: nn.Embedding(20, 8, padding_idx=3),
        ((4, 7),),
        _ALL,
        indices=True,
    ),
    Kind("layer-norm", lambda: _lively(nn.LayerNorm(6)), ((2, 5, 6),), _ALL, norm=True),
    Kind("group-norm", lambda: _lively(nn.GroupNorm(2, 4)), ((2, 4, 3, 3),), _ALL, norm=True),
]
FEW = [
    kind
    for kind in KINDS
    if kind.name
    in ("linear-wide", "qkv-slices", "conv-strided", "mha-self", "embedding", "layer-norm")
]
