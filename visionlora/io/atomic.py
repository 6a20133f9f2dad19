"""Files that are either complete or absent, however the process ends."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from visionlora.errors import OutputError


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> Path:
    """Let `write(temporary)` fill a file beside `path`, sync it, and rename it into place.

    The old file stays untouched until the new one is on disk, so a kill, a full disk or an
    exception in `write` leaves what was there before.

    Raises:
        OutputError: the folder is missing, is not a folder, is not writable, or the disk is full.
    """
    target = Path(path)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return target


def write_text_atomically(path: str | Path, text: str) -> Path:
    """Write `text` as UTF-8 to `path`, completely or not at all."""
    return write_atomically(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
