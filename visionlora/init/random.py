r"""Random starts: kaiming, gaussian, normal and orthogonal.

    kaiming      A uniform in +-1/sqrt(in), B = 0: LoRA's own start (Hu et al. 2021, 2106.09685)
    gaussian     A ~ N(0, (1/r)^2), B = 0, the variant of the reference implementations
    normal       A and B ~ N(0, 0.02^2), as LoRAT trains its trackers (Lin et al. 2024, 2403.05231)
    orthogonal   A = Q_odd^T G_A / 10, B = G_B Q_even / 10, the definition of PEFT

where Q is a random orthogonal matrix, r x r, Q_even and Q_odd its alternate rows, r/2 x r each, and
G_A: r/2 x in, G_B: out x r/2 are standard normal.

The change is exactly zero for kaiming and gaussian, where A has no gradient in the first step. For
orthogonal it is zero up to rounding (negligible in float32, not in bfloat16), because
`Q_even Q_odd^T = 0`, though neither factor is: both train from the first step. For normal it is
small but not zero.

On an Embedding, kaiming and gaussian are the method's own start, A = 0 and B normal: A holds one
column per token. Where the factors are frozen around a trained core, kaiming draws both of them,
B uniform in +-1/sqrt(r): the ablation of LoRA-XS with random bases.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from visionlora.config import Form
from visionlora.errors import ConfigError
from visionlora.init.base import Given, Initialiser, Start
from visionlora.methods.base import uniform
from visionlora.registry import register_initialiser, register_preset


@dataclass(frozen=True, kw_only=True)
class Kaiming(Initialiser):
    """LoRA's own start."""

    name: ClassVar[str] = "kaiming"
    forms: ClassVar[frozenset[Form]] = Initialiser.forms | {"core"}

    def start(self, given: Given) -> Start:
        """Leave the method its own start; draw random bases around a core."""
        if given.form != "core":
            return Start()
        rows, columns = given.weight.shape
        up = uniform((rows, given.rank), given.rank**-0.5, given.generator)
        return Start(up=up, down=uniform((given.rank, columns), columns**-0.5, given.generator))


@dataclass(frozen=True, kw_only=True)
class Gaussian(Initialiser):
    """A normal with standard deviation 1/r, B zero."""

    name: ClassVar[str] = "gaussian"

    def start(self, given: Given) -> Start:
        """Draw A, B is zero anyway; an Embedding keeps the method's own start."""
        if given.site.kind == "embedding":
            return Start()
        shape = (given.rank, given.weight.shape[1])
        return Start(down=_normal(shape, given) / given.rank)


@dataclass(frozen=True, kw_only=True)
class Normal(Initialiser):
    """Both factors normal and small."""

    name: ClassVar[str] = "normal"

    std: float = 0.02
    """Standard deviation of both factors."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        if not self.std > 0:
            raise ConfigError(f"normal: std must be positive, got {self.std}")

    def start(self, given: Given) -> Start:
        """Draw A, then B."""
        rows, columns = given.weight.shape
        down = self.std * _normal((given.rank, columns), given)
        return Start(up=self.std * _normal((rows, given.rank), given), down=down)


@dataclass(frozen=True, kw_only=True)
class Orthogonal(Initialiser):
    """Two factors in orthogonal halves of the inner dimension."""

    name: ClassVar[str] = "orthogonal"

    def start(self, given: Given) -> Start:
        """Draw Q, then both factors in its alternate rows."""
        rank, (rows, columns) = given.rank, given.weight.shape
        if rank % 2:
            raise ConfigError(
                f"orthogonal: the rank must be even, because each factor takes half of it, got "
                f"{rank} at {given.where}"
            )
        Q = torch.linalg.qr(_normal((rank, rank), given)).Q
        down = Q[1::2].t() @ _normal((rank // 2, columns), given)
        up = _normal((rows, rank // 2), given) @ Q[0::2]
        return Start(up=up / 10, down=down / 10)


def _normal(shape: tuple[int, int], given: Given) -> Tensor:
    return torch.empty(shape, dtype=torch.float64).normal_(generator=given.generator)


for _kind in (Kaiming, Gaussian, Normal, Orthogonal):
    register_initialiser(_kind)
register_preset("gaussian", "lora", "LoRA that draws A from N(0, (1/r)^2)", "gaussian")
register_preset("orthogonal", "lora", "LoRA whose two factors train at once", "orthogonal")
