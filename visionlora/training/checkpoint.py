"""Checkpoints of a run: a folder per step that exists only when it is complete.

```
checkpoints/step-00000200/manifest.json        step, processes, and size and SHA-256 of each file
                          state.safetensors    what all processes share
                          rank-0.safetensors   what each process has for itself: random states
```

Files are gathered in a hidden folder that is renamed at the end, so a kill leaves the earlier
checkpoints as they were. With several processes the folder must be on a file system they share.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionlora.errors import OutputError
from visionlora.io.atomic import write_text_atomically
from visionlora.training.tree import read_tree, write_tree

logger = logging.getLogger("visionlora.training")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int
    processes: int

    def shared(self) -> Any:
        """Return the state that all processes share."""
        return read_tree(self.path / "state.safetensors")

    def own(self, rank: int) -> Any:
        """Return the state of one process."""
        return read_tree(self.path / f"rank-{rank}.safetensors")


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        path: folder that holds the checkpoints; made when the first one is saved.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(
        self,
        step: int,
        shared: Any,
        own: Any,
        *,
        keep: int,
        rank: int = 0,
        processes: int = 1,
        barrier: Callable[[], None] = lambda: None,
    ) -> None:
        """Save one step and remove all but the newest `keep`; every process must call it.

        Raises:
            OutputError: the disk is full or not writable; earlier checkpoints are untouched.
        """
        final = self.path / f"step-{step:08d}"
        partial = self.path / f".step-{step:08d}.partial"
        with _as_output_error(final):
            try:
                if rank == 0:
                    shutil.rmtree(partial, ignore_errors=True)
                    partial.mkdir(parents=True)
                barrier()
                write_tree(partial / f"rank-{rank}.safetensors", own)
                barrier()
                if rank == 0:
                    write_tree(partial / "state.safetensors", shared)
                    _write_manifest(partial, step, processes)
                    _sync(partial)
                    if final.exists():  # a damaged one that the run was not resumed from
                        shutil.rmtree(final)
                    partial.rename(final)
                    _sync(self.path)
            except BaseException:
                if rank == 0:
                    shutil.rmtree(partial, ignore_errors=True)
                raise
        if rank == 0:
            for _, old in self._found()[keep:]:
                shutil.rmtree(old, ignore_errors=True)
        barrier()

    def newest(self) -> Checkpoint | None:
        """Return the newest checkpoint that is complete and undamaged, warning about others."""
        for step, path in self._found():
            problem, processes = _inspect(path)
            if not problem:
                return Checkpoint(path, step, processes)
            logger.warning("checkpoint %s is damaged (%s); trying an earlier one", path, problem)
        return None

    def remove_partial(self) -> None:
        """Remove what a killed process left half written."""
        for path in self.path.glob(".step-*.partial"):
            shutil.rmtree(path, ignore_errors=True)

    def _found(self) -> list[tuple[int, Path]]:
        """Return steps and folders, newest first."""
        found = []
        for path in self.path.glob("step-*"):
            digits = path.name.removeprefix("step-")
            if digits.isdecimal():
                found.append((int(digits), path))
        return sorted(found, reverse=True)


def _write_manifest(folder: Path, step: int, processes: int) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.glob("*.safetensors"))
    }
    manifest = {"step": step, "processes": processes, "files": files}
    write_text_atomically(folder / "manifest.json", json.dumps(manifest, indent=1))


def _inspect(folder: Path) -> tuple[str, int]:
    """Return what is wrong with a checkpoint ("" for nothing) and its number of processes."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        processes = int(manifest["processes"])
        for name, expected in manifest["files"].items():
            size = (folder / name).stat().st_size
            if size != expected["bytes"]:
                return f"{name} has {size} of {expected['bytes']} bytes", 0
            if _digest(folder / name) != expected["sha256"]:
                return f"{name} has other content than when it was written", 0
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}", 0
    return "", processes


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(folder: Path) -> None:
    """Make the names inside a folder durable; some file systems cannot, which is no error."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


@contextmanager
def _as_output_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
