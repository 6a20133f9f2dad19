"""Images of a public data set through torchvision; nothing is left of a download that fails."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from visionlora.errors import ConfigError, DataError

TIMEOUT = 30.0


def download(name: str, torchvision_class: str, root: Path, expected: Path) -> None:
    """Let torchvision fetch and unpack the images below `root`.

    Raises:
        DataError: no network, or an address that is gone.
    """
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ConfigError(f"{name} needs torchvision: pip install torchvision") from error
    before = set(root.iterdir()) if root.is_dir() else None
    try:
        with _socket_timeout(TIMEOUT):
            getattr(datasets, torchvision_class)(root, download=True)
    except (RuntimeError, OSError) as error:
        _remove_empty(root, before)
        reason = str(getattr(error, "reason", error)).splitlines()[0]
        raise DataError(
            f"cannot download {name} to {root} ({reason}); put the images into {expected} "
            "yourself, or use --dataset folder:PATH or digits"
        ) from error


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _remove_empty(root: Path, before: set[Path] | None) -> None:
    """Take back the empty folders that a failed download made."""
    if not root.is_dir():
        return
    made = set(root.iterdir()) - (before or set())
    for folder in sorted(
        {path for top in made for path in [top, *top.rglob("*")] if path.is_dir()}, reverse=True
    ):
        if not any(folder.iterdir()):
            folder.rmdir()
    if before is None and not any(root.iterdir()):
        root.rmdir()
