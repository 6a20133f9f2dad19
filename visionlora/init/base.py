r"""What an initialiser is: a pure function from a weight, and perhaps data, to initial values.

    (W, statistics of data) -> (U, C, D),   initial change s * U C D   (C: identity if missing)

Where the start is *taken off*, the change begins at exactly zero: the product stays as a constant
pair that is subtracted (`visionlora.methods.parts.pair`), and the frozen weight is never touched.

An initialiser is one frozen dataclass whose fields are its options. It declares which statistics it
needs, and for which forms of method it makes sense; `visionlora.init.initialise` does the rest.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from visionlora.config import AdapterConfig, Form, check_fields
from visionlora.sites import Site

Need = Literal["gradient", "covariance", "components"]


@dataclass(frozen=True)
class Components:
    """Principal components of a layer's input, the strongest first."""

    vectors: Float[Tensor, "k in"]
    singular: Float[Tensor, " k"]
    """Singular values of the centred or raw inputs."""
    ratio: Float[Tensor, " k"]
    """Part of the input's variance that each explains."""


@dataclass(frozen=True)
class SiteStats:
    """What a pass over data gathered for one site, on the CPU."""

    gradient: Float[Tensor, "out in"] | None = None
    """Gradient of the mean loss at the frozen weight."""
    covariance: Float[Tensor, "in in"] | None = None
    """Mean of `x x^T` over the layer's inputs."""
    components: Components | None = None


@dataclass(frozen=True)
class Given:
    """What an initialiser may look at for one site."""

    site: Site
    form: Form
    weight: Float[Tensor, "out in"]
    """The frozen weight, float64 on the CPU."""
    rank: int
    """Inner dimension of the pair."""
    scale: float
    """The factor s in front of the product."""
    generator: torch.Generator
    """Depends on the adapter's seed and the site's name."""
    stats: SiteStats = field(default_factory=SiteStats)
    arms: int = 1
    """Up-matrices that share the down-matrix and are added up (Block-LoRA)."""

    @property
    def where(self) -> str:
        """Name of the layer for messages."""
        return self.site.name or "the layer"


@dataclass(frozen=True)
class Start:
    """Initial values of one site; what is None stays as the method itself draws it.

    Methods with several arms give each the same part of `up`; for those with frozen bases `up` and
    `down` are the bases and `core` is what is trained between them.
    """

    up: Float[Tensor, "out rank"] | None = None
    down: Float[Tensor, "rank in"] | None = None
    core: Float[Tensor, "rank rank"] | None = None
    taken_off: bool = False
    """The change starts at zero: the product is a constant that is subtracted."""


@dataclass(frozen=True, kw_only=True)
class Initialiser:
    """Base of all initialisers; options are dataclass fields."""

    name: ClassVar[str] = ""
    """Registered name."""
    needs: ClassVar[frozenset[Need]] = frozenset()
    """Statistics beside the weight."""
    forms: ClassVar[frozenset[Form]] = frozenset({"pair", "rescaled", "blocks", "middle"})
    """Forms of method that it can start."""
    implies: ClassVar[Mapping[str, Any]] = {}
    """Options of the method that it asks for, where the method has them and the user is silent."""
    sketchable: ClassVar[bool] = True
    """A low-rank sketch of the gradient is enough."""

    def __post_init__(self) -> None:
        """Check the types of all options."""
        check_fields(self)

    @property
    def residual(self) -> bool:
        """Whether the start is taken off, so that the function does not change."""
        return False

    @property
    def components(self) -> int:
        """Number of principal components per rank that it needs, 0 for none."""
        return 0

    @property
    def steady(self) -> float | None:
        """Cosine of successive components at which enough batches were read; None reads all."""
        return None

    def check(self, config: AdapterConfig) -> None:
        """Raise `ConfigError` for options of the method that make no sense with this start."""

    def ranks(
        self, configs: Mapping[str, AdapterConfig], stats: Mapping[str, SiteStats]
    ) -> Mapping[str, int] | None:
        """Return the rank of every site where data decide, 0 to leave it out; None: as they are."""
        return None

    def start(self, given: Given) -> Start:
        """Return the initial values of one site.

        Raises:
            ConfigError: the weight or the statistics cannot start this site.
        """
        raise NotImplementedError

    def describe(self) -> str:
        """Return name and options on one line."""
        shown = ", ".join(f"{key}={value!r}" for key, value in vars(self).items())
        return f"{self.name}({shown})" if shown else self.name
