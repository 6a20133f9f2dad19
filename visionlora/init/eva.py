r"""EVA: A starts along the components of the input (Paischer et al. 2024, arXiv 2410.07170).

    A = V_r^T: r x in, the strongest components of the centred inputs,   B = 0,   Delta W = 0
    whiten: row i of A divided by sqrt(sigma_i), sigma_i: singular value of component i

Ranks are shared out anew. A budget of the sum of all ranks goes to the components that explain most
of their own layer's variance, over all layers, up to `rho` times the old rank in one layer:

    r_l = number of components of layer l among the sum(r) largest ratios,   r_l <= rho r

The scale s of a site stays what it was; a site that gets no component loses its adapter. `rho=1`
leaves all ranks as they are, and so does Block-LoRA, whose rank is bound to its number of blocks.

`tau`: no more batches are read once the first r components of every layer have turned by less than
arccos(tau) with the last one; None reads all batches. How many that takes depends on their order.

The components are exact and independent of how the batches are cut (see `visionlora.init.inputs`;
the reference truncates after every batch). Between frozen bases (LoRA-XS) and where A is one of
three factors (SLoRA) only A is set. Needs forwards only; the loss is evaluated for the record.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import torch

from visionlora.config import AdapterConfig, Form
from visionlora.errors import ConfigError
from visionlora.init.base import Components, Given, Initialiser, Need, SiteStats, Start
from visionlora.registry import register_initialiser, register_preset


@dataclass(frozen=True, kw_only=True)
class EVA(Initialiser):
    """Principal components of the inputs."""

    name: ClassVar[str] = "eva"
    needs: ClassVar[frozenset[Need]] = frozenset({"components"})
    forms: ClassVar[frozenset[Form]] = frozenset({"pair", "rescaled", "blocks", "middle", "core"})

    rho: float = 2.0
    """How many times its rank a site may get; 1 keeps all ranks."""
    tau: float | None = 0.99
    """Cosine of successive components at which no more batches are read; None reads all."""
    whiten: bool = False
    """Whether strong components start smaller."""

    def __post_init__(self) -> None:
        """Check types and ranges."""
        super().__post_init__()
        if self.rho < 1:
            raise ConfigError(f"eva: rho must be at least 1, got {self.rho}")
        if self.tau is not None and not 0 < self.tau < 1:
            raise ConfigError(f"eva: tau must lie in (0, 1) or be None, got {self.tau}")

    @property
    def components(self) -> int:
        """Number of principal components per rank."""
        return ceil(self.rho)

    @property
    def steady(self) -> float | None:
        """Cosine of successive components at which enough batches were read."""
        return self.tau

    def ranks(
        self, configs: Mapping[str, AdapterConfig], stats: Mapping[str, SiteStats]
    ) -> Mapping[str, int] | None:
        """Return the rank of every site by explained variance."""
        if self.rho == 1 or any(config.form == "blocks" for config in configs.values()):
            return None
        old = {name: int(getattr(config, "rank", 0)) for name, config in configs.items()}
        offers = [
            (-ratio, order, name)
            for order, name in enumerate(configs)
            for ratio in _offered(_found(stats[name], name), round(self.rho * old[name]))
        ]
        ranks = dict.fromkeys(configs, 0)
        for _, _, name in sorted(offers)[: sum(old.values())]:
            ranks[name] += 1
        return ranks

    def start(self, given: Given) -> Start:
        """Return the components as the rows of A."""
        found = _found(given.stats, given.where)
        there = len(_offered(found, given.rank))
        if there < given.rank:
            raise ConfigError(
                f"eva: the inputs of {given.where} have {there} directions, fewer than rank "
                f"{given.rank}; look at more batches or lower the rank"
            )
        rows, singular = found.vectors[: given.rank], found.singular[: given.rank]
        return Start(down=rows / singular.sqrt()[:, None] if self.whiten else rows)


def _found(stats: SiteStats, where: str) -> Components:
    if stats.components is None:
        raise ConfigError(
            f"eva: there are no components for {where}: they are found in batches, use "
            "visionlora.initialise(model, 'eva', batches, loss_fn)"
        )
    return stats.components


def _offered(found: Components, count: int) -> list[float]:
    """Return the ratios of the first components, without those that are only rounding."""
    noise = 10 * torch.finfo(found.ratio.dtype).eps
    return found.ratio[:count][found.ratio[:count] > noise].tolist()


register_initialiser(EVA)
register_preset("eva", "lora", "LoRA whose A starts along the components of the input", "eva")
