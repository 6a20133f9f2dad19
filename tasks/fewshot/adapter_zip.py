"""An adapter as one file: a zip archive of its tensors and its description."""

import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.fewshot.adapter_files import DESCRIPTION, TENSORS
from visionlora.errors import AdapterFileError
from visionlora.io.atomic import write_atomically

MAX_BYTES = {TENSORS: 8 << 30, DESCRIPTION: 16 << 20}
"""Larger members are refused: no adapter is, and a small archive can hold a huge file."""
CHUNK = 1 << 20
UNREADABLE = (zipfile.BadZipFile, zlib.error, KeyError, RuntimeError, EOFError, OSError)
"""What a damaged, encrypted or foreign archive raises; RuntimeError has NotImplementedError."""


def pack(folder: Path, file: Path) -> Path:
    """Write the adapter in `folder` to the archive `file`."""

    def write(temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for name in (TENSORS, DESCRIPTION):
                archive.write(folder / name, name)

    return write_atomically(file, write)


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """Yield a folder with the adapter at `path`, which is that folder or an archive of it.

    Only the two files of an adapter are read from an archive, by their exact names.

    Raises:
        AdapterFileError: the file is no archive of an adapter.
    """
    if not path.is_file():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="visionlora-adapter-") as name:
        folder = Path(name)
        try:
            with zipfile.ZipFile(path) as archive:
                for member, limit in MAX_BYTES.items():
                    _extract(archive, member, folder / member, limit)
        except UNREADABLE as error:
            reason = str(error.args[0]) if error.args else repr(error)
            raise AdapterFileError(f"{path} is no archive of an adapter: {reason}") from error
        yield folder


def _extract(archive: zipfile.ZipFile, member: str, target: Path, limit: int) -> None:
    if archive.getinfo(member).file_size > limit:
        raise AdapterFileError(f"{member} in {archive.filename} is larger than {limit:,} bytes")
    with archive.open(member) as source, target.open("wb") as stream:
        while chunk := source.read(CHUNK):
            stream.write(chunk)
