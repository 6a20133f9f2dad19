r"""FourierFT: a few trained entries of the change's spectrum (Gao et al. 2024, arXiv 2405.03003).

    Delta W = s * Re(ifft2(F)),   F: out x in, zero but for F[p_j, q_j] = c_j,   j = 1 .. n
            = s / (out in) * sum_j c_j cos(2 pi (k p_j / out + l q_j / in))  at row k, column l

c: n trained; the n positions (p_j, q_j) are drawn once without replacement, s = 150.

Initial values: `init="zero"`: c = 0, no change. `init="normal"`: c from N(0, 1), as in the paper.

The real part is the inverse transform of the Hermitian half of F, so a real inverse FFT forms it. A
spectrum so sparse that a factor pair of rank 2 n is cheaper than the matrix also has `factors`,

    up = [cos a, -sin a] diag(c, c) / (out in),  down = [cos b; sin b],
    a_kj = 2 pi k p_j / out,  b_jl = 2 pi l q_j / in

with angles in float64, of products reduced modulo out and in.

Trained: n scalars a site. Files hold c; the positions follow from `seed` and the shape alone, so
that sites of one shape share them and `seed=777` gives those of PEFT, and their fingerprint is
compared. Merge: W + Delta W.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from visionlora.config import AdapterConfig
from visionlora.errors import ConfigError
from visionlora.methods.base import Delta, Shared
from visionlora.registry import register
from visionlora.sites import Site


@dataclass(frozen=True, kw_only=True)
class FourierFTConfig(AdapterConfig):
    """Options of FourierFT."""

    method: ClassVar[str] = "fourier-ft"

    coefficients: int = 1000
    """Number n of trained entries of the spectrum."""
    scale: float = 150.0
    """Factor s in front of the inverse transform."""
    init: Literal["zero", "normal"] = "zero"
    """`zero`: c = 0, so that nothing changes at first. `normal`: c from N(0, 1)."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        if self.coefficients < 1:
            raise ConfigError(
                f"fourier-ft: coefficients must be at least 1, got {self.coefficients}"
            )
        if self.scale == 0:
            raise ConfigError("fourier-ft: scale must not be 0, or nothing is trained")

    def check_site(self, site: Site) -> None:
        """Refuse more coefficients than the spectrum has entries."""
        entries = site.out_features * site.in_features
        if self.coefficients > entries:
            raise ConfigError(
                f"fourier-ft: {self.coefficients} coefficients are more than "
                f"{site.name or 'the layer'} allows: its view is {site.out_features} x "
                f"{site.in_features}, so at most {entries}"
            )


class FourierFT(Delta):
    """Trained entries of a sparse spectrum."""

    positions: Tensor

    def __init__(self, config: FourierFTConfig, site: Site, shared: Shared | None = None) -> None:
        super().__init__(config, site, shared)
        self.options = config
        self.out_features, self.in_features = site.out_features, site.in_features
        self.c = nn.Parameter(torch.empty(config.coefficients))
        self.register_buffer(
            "positions", torch.empty(2, config.coefficients, dtype=torch.int64), persistent=False
        )

    @property
    def zero_at_init(self) -> bool:  # type: ignore[override]
        """Whether the change starts at zero."""
        return self.options.init == "zero"

    @torch.no_grad()
    def reset_parameters(self, weight: Float[Tensor, "out in"], generator: torch.Generator) -> None:
        """Draw the positions and set c."""
        source = torch.Generator("cpu").manual_seed(self.options.seed)
        flat = torch.randperm(self.out_features * self.in_features, generator=source)
        flat = flat[: self.options.coefficients]
        self.positions.copy_(torch.stack([flat // self.in_features, flat % self.in_features]))
        if self.options.init == "normal":
            self.c.copy_(torch.empty(self.c.shape).normal_(generator=generator))
        else:
            self.c.zero_()

    def delta(self, weight: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """Return s Re(ifft2(F))."""
        c = self._values()
        p, q = self.positions
        # Half of every entry goes to its position and half to the opposite frequency. A real
        # transform reads the columns up to in / 2 of that: one of the two, or both in the first
        # column and in column in / 2, which are their own opposites.
        width = self.in_features // 2 + 1
        read = q < width
        row = torch.where(read, p, -p % self.out_features)
        column = torch.where(read, q, self.in_features - q)
        both = 2 * q % self.in_features == 0
        index = torch.cat([row * width + column, -row % self.out_features * width + column])
        values = torch.cat([c / 2, c / 2 * both])
        half = c.new_zeros(self.out_features * width).index_add(0, index, values)
        half = half.view(self.out_features, width)
        spectrum = torch.complex(half, torch.zeros_like(half))
        return self.scale * torch.fft.irfft2(spectrum, s=(self.out_features, self.in_features))

    def factors(self) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]] | None:
        """Return the pair of rank 2 n where its products are cheaper than the matrix."""
        out, width, rank = self.out_features, self.in_features, 2 * self.options.coefficients
        if 3 * rank * (out + width) > out * width:
            return None
        c = self._values()
        a, b = _angles(self.positions[0], out), _angles(self.positions[1], width)
        waves = torch.cat([a.cos(), -a.sin()], 1).to(c.dtype)
        down = torch.cat([b.cos(), b.sin()], 1).to(c.dtype).t()
        return waves * (c / (out * width)).repeat(2), down

    def _values(self) -> Tensor:
        return self.c if self.c.dtype in (torch.float32, torch.float64) else self.c.float()

    def frozen(self) -> dict[str, Tensor]:
        """The positions."""
        return {"positions": self.positions}

    @staticmethod
    def parameter_count(config: Any, out_features: int, in_features: int) -> int:
        """Return n."""
        return int(config.coefficients)


def _angles(frequencies: Tensor, size: int) -> Tensor:
    """Return `2 pi k f / size` for all k and f, exact up to one rounding in float64."""
    steps = torch.arange(size, device=frequencies.device)
    turns = (steps[:, None] * frequencies % size).to(torch.float64) / size
    return turns * (2 * math.pi)


register(FourierFTConfig, FourierFT)
