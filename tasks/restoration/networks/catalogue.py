"""Networks by name: what they are called, and what they are built from."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from tasks.restoration.networks.nafnet import NAFNet
from tasks.restoration.networks.restormer import Restormer
from visionlora.errors import ConfigError, nearest

FAMILIES: dict[str, type[nn.Module]] = {"nafnet": NAFNet, "restormer": Restormer}
SMALL = ((1, 1, 1), 1, (1, 1, 1))
OFFICIAL = ((2, 2, 4, 8), 12, (2, 2, 2, 2))
GOPRO = ((1, 1, 1, 28), 1, (1, 1, 1, 1))


@dataclass(frozen=True)
class Spec:
    """What a network is built from; plain values, so that a file can hold it."""

    family: str
    arguments: dict[str, Any]

    def build(self) -> nn.Module:
        """Return the network with fresh weights.

        Raises:
            ConfigError: an unknown family, or arguments that it does not take.
        """
        if self.family not in FAMILIES:
            raise ConfigError(
                f"unknown network family {self.family!r}{nearest(self.family, FAMILIES)}; known: "
                + ", ".join(FAMILIES)
            )
        try:
            return FAMILIES[self.family](**self.arguments)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{self.family} cannot be built: {error}") from error


def _nafnet(width: int, stages: tuple[tuple[int, ...], int, tuple[int, ...]]) -> Spec:
    encoders, middle, decoders = stages
    sizes = {"encoders": list(encoders), "middle": middle, "decoders": list(decoders)}
    return Spec("nafnet", {"width": width, **sizes})


NETWORKS: dict[str, Spec] = {
    "nafnet-tiny": _nafnet(16, SMALL),
    "nafnet-small": _nafnet(24, SMALL),
    "nafnet-32": _nafnet(32, OFFICIAL),
    "nafnet-64": _nafnet(64, OFFICIAL),
    "nafnet-gopro-32": _nafnet(32, GOPRO),
    "nafnet-gopro-64": _nafnet(64, GOPRO),
    "restormer": Spec("restormer", {"width": 48}),
    "restormer-bias-free": Spec("restormer", {"width": 48, "bias_free": True}),
    "restormer-tiny": Spec(
        "restormer",
        {"width": 16, "blocks": [1, 1, 1, 1], "refinement": 1, "heads": [1, 1, 2, 2]},
    ),
}


def find_network(name: str) -> Spec:
    """Return what a name stands for.

    Raises:
        ConfigError: an unknown name.
    """
    if name not in NETWORKS:
        raise ConfigError(
            f"unknown network {name!r}{nearest(name, NETWORKS)}; known: {', '.join(NETWORKS)}"
        )
    return NETWORKS[name]
