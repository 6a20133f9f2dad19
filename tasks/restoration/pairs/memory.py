"""Pictures decoded once, as many as fit.

Patches are cut out of the same pictures thousands of times. They are kept as they are stored, in 8
or 16 bits; what does not fit is decoded again whenever it is asked for, so that data sets of any
size can be used. Worker processes share what was read before they were started.
"""

from pathlib import Path

from tasks.restoration.images import Levels, read_picture

MEMORY = 4 * 2**30
"""Bytes that the pictures of one source may take."""


class Memory:
    """Reads pictures, and keeps the first ones.

    Args:
        most: bytes that may be kept.
    """

    def __init__(self, most: int = MEMORY) -> None:
        self.most = most
        self.held = 0
        self.outside: set[Path] = set()
        """Pictures that did not fit."""
        self._kept: dict[Path, Levels] = {}

    def __call__(self, file: Path) -> Levels:
        """Return a picture.

        Raises:
            DataError: it cannot be read.
        """
        if file in self._kept:
            return self._kept[file]
        levels = read_picture(file).levels
        if self.held + levels.nbytes <= self.most:
            self.held += levels.nbytes
            self._kept[file] = levels
        else:
            self.outside.add(file)
        return levels

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        if not self.outside:
            return ()
        return (
            f"{len(self.outside)} pictures do not fit into {self.most / 2**30:.1f} GiB and are "
            "read again for every patch: pictures cut into smaller ones are faster",
        )
