"""What can be asked for by `--method`, and the learning rate that it has unless another is said.

colora     factor pairs whose ranks follow the contribution of each layer, under a budget
lora       factor pairs of one rank, the largest under the same budget, or --adapter.rank
full       every parameter
decoder    every parameter of the decoding half
bias       no layer: biases, norms and scale vectors alone
scratch    every parameter, from fresh weights instead of those of the base
NAME       any method of the registry on every layer that it can serve, as in dora(rank=2)+glad

All but full, decoder and scratch also train the extras: biases, norms, and vectors such as the beta
and gamma of NAFNet and the temperature of Restormer. Rates are those of small experiments with the
tiny NAFNet (derived).
"""

import re
from collections.abc import Mapping
from typing import Any

from visionlora.compose import Recipe, parse
from visionlora.errors import ConfigError, nearest
from visionlora.registry import (
    build_config,
    list_dynamics,
    list_initialisers,
    list_methods,
    list_presets,
)

COLORA, LORA, FULL, DECODER, BIAS, SCRATCH = (
    *("colora", "lora", "full", "decoder", "bias", "scratch"),
)
OWN = (COLORA, LORA, FULL, DECODER, BIAS, SCRATCH)
WHOLE = (FULL, DECODER, SCRATCH)
"""These train parameters as they are, with or without what else is asked for."""
USUAL_RATE = 1e-3
RATES = {FULL: 4e-4, DECODER: 4e-4, SCRATCH: 1.5e-3}


def rate_of(method: str) -> float:
    """Return the learning rate that a method has by default."""
    return RATES.get(method, USUAL_RATE)


def recipe_of(method: str) -> Recipe | None:
    """Return what the registry makes of a name, None for a method of this task."""
    return None if method in OWN else parse(method)


def check_method(method: str, options: Mapping[str, Any]) -> None:
    """Refuse a name or an option that does not exist.

    Raises:
        ConfigError: see above.
    """
    if method in (COLORA, LORA):
        if method == COLORA and "rank" in options:
            raise ConfigError("colora decides ranks itself: set --budget, or take --method lora")
        build_config("lora", options)
        return
    if method in OWN:
        if options:
            raise ConfigError(f"{method} has no options, got --adapter.{next(iter(options))}")
        return
    first = re.split(r"[+(]", method, maxsplit=1)[0].strip()
    presets = [preset.name for preset in list_presets()]
    known = [*OWN, *list_methods(), *presets, *list_initialisers(), *list_dynamics()]
    if first not in known:
        raise ConfigError(
            f"unknown method {first!r}{nearest(first, known)}; {', '.join(OWN)}, or one of the "
            "registry (python -m visionlora methods)"
        )
    parse(method).config(**options)
