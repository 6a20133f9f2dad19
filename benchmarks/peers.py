"""The methods that PEFT has too: our configuration as PEFT's, setting by setting.

To compare a new method, add one function here; everything else finds it through the registry.
"""

from collections.abc import Callable
from typing import Any

from peft import LoraConfig, VeraConfig


def _lora(config: Any, **more: Any) -> LoraConfig:
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.rank if config.alpha is None else config.alpha,
        use_rslora=config.scaling == "rslora",
        lora_dropout=config.dropout,
        **more,
    )


def _dora(config: Any) -> LoraConfig:
    return _lora(config, use_dora=True)


def _vera(config: Any) -> VeraConfig:
    return VeraConfig(
        r=config.rank,
        d_initial=config.d_initial,
        vera_dropout=config.dropout,
        projection_prng_key=config.seed,
    )


PEERS: dict[str, Callable[[Any], Any]] = {"lora": _lora, "dora": _dora, "vera": _vera}
"""By registered name. LoRA-FA is missing because PEFT has it as an optimiser, not as a layer."""
