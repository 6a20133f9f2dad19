"""One browser tab: a folder of its own, its adapter, its cancel button; all gone when it closes."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.fewshot.app.engine import Adapted, Cancelled


class Session:
    """What belongs to one tab."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.adapted: Adapted | None = None
        self.cancel = threading.Event()
        self._busy = threading.Lock()
        self._closed = False
        self._works = 0

    @contextmanager
    def work(self) -> Iterator[Path]:
        """Yield a new folder for one adaptation.

        If it ends with another adapter, everything older is removed, else the new folder is.
        """
        with self._busy:
            self.cancel.clear()
            if self._closed:
                raise Cancelled
            self._works += 1
            place = self.folder / str(self._works)
            place.mkdir(parents=True)
            before = self.adapted
            try:
                yield place
            finally:
                done = self.adapted is not before
                for folder in list(self.folder.iterdir()):
                    if (folder == place) != done:
                        shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """End what is under way and remove everything."""
        self._closed = True
        self.cancel.set()
        with self._busy:
            self.adapted = None
            shutil.rmtree(self.folder, ignore_errors=True)


class Sessions:
    """The open tabs by name, with their folders below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._open: dict[str, Session] = {}
        self._lock = threading.Lock()
        self._opened = 0

    def of(self, name: str) -> Session:
        """Return the session of a tab, a new one at first."""
        with self._lock:
            if name not in self._open:
                self._opened += 1
                self._open[name] = Session(self.root / f"tab_{self._opened}")
            return self._open[name]

    def close(self, name: str) -> None:
        """Forget a tab and what it left on disk."""
        with self._lock:
            session = self._open.pop(name, None)
        if session is not None:
            session.close()
