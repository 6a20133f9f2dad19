"""What `adapt` leaves behind and others read: one small adapter and what it belongs to.

adapter.safetensors   the factors, and the biases, norms and scales that were trained with them
adapter.json          task, method, base and its digest, ranks, which pairs were for what
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import visionlora as vl
from tasks.restoration.networks.files import Base
from visionlora.errors import AdapterFileError
from visionlora.io.atomic import write_text_atomically

WEIGHTS, CARD = "adapter.safetensors", "adapter.json"


@dataclass(frozen=True, kw_only=True)
class Card:
    """What an adapter is."""

    task: str
    method: str
    base: str
    """Name of the base network."""
    digest: str
    """Digest of its weights."""
    trainable: int
    parameters: int
    budget: float | None = None
    """Share of the network that could be trained, where the method has a budget."""
    score: str | None = None
    """What ranks follow, where they follow contributions."""
    ranks: dict[str, int] | None = None
    dense: list[str] | None = None
    """Layers that are trained as a whole."""
    parts: dict[str, list[str]] = field(default_factory=dict)
    """Names of the pairs for train, validation and test."""

    @property
    def percent(self) -> float:
        """Share of the network that is trained, in percent."""
        return 100 * self.trainable / self.parameters


def save_adapter(base: Base, card: Card, folder: Path) -> Path:
    """Write the adapter of a trained network."""
    path = vl.save(base.model, folder / WEIGHTS)
    write_text_atomically(folder / CARD, json.dumps(asdict(card), indent=1) + "\n")
    return path


def read_card(folder: str | Path) -> Card:
    """Return what the adapter in a folder is.

    Raises:
        AdapterFileError: the folder holds no adapter of this task.
    """
    path = Path(folder).expanduser() / CARD
    try:
        said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Card(**said)
    except FileNotFoundError:
        raise AdapterFileError(
            f"{folder} holds no adapter: {CARD} is missing; give the folder that `adapt` wrote"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise AdapterFileError(f"{path} is damaged: {error}") from error


def check_base(card: Card, base: Base, folder: str | Path) -> None:
    """Refuse the adapter of another base.

    Raises:
        AdapterFileError: naming both.
    """
    if card.digest != base.digest:
        raise AdapterFileError(
            f"{folder} is an adapter of {card.base} ({card.digest[:12]}), not of {base.name} "
            f"({base.digest[:12]}); give its base with --base"
        )


def load_adapter(base: Base, folder: str | Path, name: str = "default") -> Card:
    """Put an adapter into the network of a base, in place, and return what it is.

    Raises:
        AdapterFileError: the folder holds no adapter, a damaged one, or one of another base.
    """
    card = read_card(folder)
    check_base(card, base, folder)
    vl.load(base.model, Path(folder).expanduser() / WEIGHTS, name=name)
    return card
