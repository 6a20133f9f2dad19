"""Which methods and which base models an initialiser can start."""

from collections.abc import Iterable

from torch import nn

from visionlora.config import AdapterConfig
from visionlora.errors import ConfigError
from visionlora.hosts.base import is_quantised, parameter_name, stored
from visionlora.init.base import Initialiser
from visionlora.sites import Site


def check_form(initialiser: Initialiser, config: AdapterConfig) -> None:
    """Refuse a method that the initialiser cannot start.

    Raises:
        ConfigError: with the reason.
    """
    if config.form not in initialiser.forms:
        why = _WHY.get(config.form, "it has no factor pair to set")
        raise ConfigError(f"{initialiser.name} cannot start {config.method}: {why}")
    if getattr(config, "layout", "rank") == "grid":
        raise ConfigError(
            f"{initialiser.name} cannot start {config.method} in layout 'grid': its down-matrix "
            "repeats one block along the input; use layout 'rank'"
        )
    offset: int = getattr(config, "offset", 0)
    if initialiser.residual and offset:
        raise ConfigError(f"{initialiser.name}: this adapter has a start that is taken off already")
    dropout: float = getattr(config, "dropout", 0.0)
    if dropout and "gradient" in initialiser.needs:
        raise ConfigError(
            f"{initialiser.name} starts along the gradient, which dropout {dropout} on the branch "
            "would scatter: set dropout=0"
        )
    initialiser.check(config)


_WHY = {
    "core": "its factors are frozen bases, and only what stands between them trains",
    "pair": "it has no matrix between its factors",
    "rescaled": "it has no matrix between its factors",
    "blocks": "it has no matrix between its factors",
    "middle": "the matrix between its factors trains as well and would spoil the first step",
    "frozen-down": "its down-matrix is drawn from the seed and never trains",
    "sparse": "it trains entries of the weight, not factors",
    "full": "it trains the whole matrix, not factors",
}


def check_weights(
    model: nn.Module, initialiser: Initialiser, sites: Iterable[tuple[nn.Module, Site]]
) -> None:
    """Refuse quantised weights, and shared ones where a start would belong to both layers.

    Raises:
        ConfigError: naming the layer.
    """
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            owners.setdefault(id(parameter), []).append(f"{path}.{name}" if path else name)
    for module, site in sites:
        weight = stored(module, parameter_name(module, site.key))
        where = site.name or "the layer"
        if is_quantised(weight):
            raise ConfigError(
                f"{initialiser.name}: the weight of {where} is quantised "
                f"({str(weight.dtype).removeprefix('torch.')}); start from the unquantised model"
            )
        names = owners.get(id(weight), [])
        if len(names) > 1 and (initialiser.residual or "gradient" in initialiser.needs):
            raise ConfigError(
                f"{initialiser.name}: the weight of {where} is shared ({', '.join(names)}), so "
                "its start would belong to both; exclude it"
            )
