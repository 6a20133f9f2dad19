"""The folder of one run: config.yaml, log.jsonl, result.json and checkpoints."""

import dataclasses
import errno
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from visionlora.errors import ConfigError, OutputError
from visionlora.io.atomic import write_text_atomically
from visionlora.training.checkpoint import CheckpointStore
from visionlora.training.provenance import git_commit, peak_memory_mb, versions
from visionlora.training.sampler import process

VOLATILE = ("output", "resume", "overwrite", "device")
_MARKS = ("result.json", "config.yaml", "log.jsonl", "checkpoints", "tensorboard")


class RunDirectory:
    """Everything that one run leaves on disk.

    Only the first process of a distributed run writes; the others may call the same methods.

    Args:
        path: the folder; made if missing.
        resume: continue the run that is in the folder, or start one if there is none.
        overwrite: remove the run that is in the folder; other files in it stay.

    Raises:
        OutputError: the folder cannot be written, or holds a run and neither `resume` nor
            `overwrite` was asked for.
    """

    def __init__(self, path: str | Path, resume: bool = False, *, overwrite: bool = False) -> None:
        if resume and overwrite:
            raise ConfigError("resume and overwrite exclude each other")
        self.path = Path(path)
        self.resume = resume
        self.overwrite = overwrite
        self.checkpoints = CheckpointStore(self.path / "checkpoints")
        self.main = process()[0] == 0
        self.seconds_before = 0.0
        self._began = time.monotonic()
        self._config: Any = None
        if self.main:
            self._claim()

    def child(self, name: str) -> "RunDirectory":
        """Return the folder of one part of this run, such as one seed, opened in the same way."""
        return RunDirectory(self.path / name, self.resume, overwrite=self.overwrite)

    def write_config(self, config: Any, volatile: Collection[str] = VOLATILE) -> None:
        """Write config.yaml; in a resumed run check that it says the same.

        Args:
            config: a dataclass or a mapping.
            volatile: top-level fields that may differ between the runs.

        Raises:
            ConfigError: the run being resumed had another configuration.
        """
        self._config = plain(config)
        path = self.path / "config.yaml"
        if self.resume and path.exists():
            try:
                before = yaml.safe_load(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, yaml.YAMLError) as error:
                raise ConfigError(f"cannot read {path}: {error}".splitlines()[0]) from error
            check_same(before, self._config, f"the run in {self.path}", volatile)
        if self.main:
            write_text_atomically(path, yaml.safe_dump(self._config, sort_keys=False))

    def log(self, line: Mapping[str, Any]) -> None:
        """Append one line to log.jsonl."""
        if not self.main:
            return
        path = self.path / "log.jsonl"
        try:
            with path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(plain(line)) + "\n")
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror or error}") from error

    def truncate_log(self, step: int) -> None:
        """Remove the lines of log.jsonl that a resumed run will write again."""
        path = self.path / "log.jsonl"
        if not self.main or not path.exists():
            return
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _upto(line, step)]
        write_text_atomically(path, "".join(f"{line}\n" for line in kept))

    def write_result(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Write result.json and return it: the figures, then provenance that they do not name."""
        full = {
            **plain(result),
            **{key: value for key, value in self._provenance().items() if key not in result},
        }
        if self.main:
            write_text_atomically(self.path / "result.json", json.dumps(full, indent=2) + "\n")
        return full

    def reserve(self, size: int) -> None:
        """Check that `size` bytes can be written.

        Raises:
            OutputError: the folder is not writable or the disk is too full.
        """
        try:
            with tempfile.TemporaryFile(dir=self.path) as stream:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(stream.fileno(), 0, size)
                else:
                    stream.write(b"\0" * min(size, 1 << 20))
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                return  # this file system writes but does not reserve
            reason = error.strerror or error
            raise OutputError(f"cannot write {size} bytes to {self.path}: {reason}") from error

    def wall_seconds(self) -> float:
        """Return the seconds since this run began, those before a resume included."""
        return self.seconds_before + time.monotonic() - self._began

    def _provenance(self) -> dict[str, Any]:
        return {
            "config": self._config,
            "wall_seconds": round(self.wall_seconds(), 3),
            "peak_memory_mb": round(peak_memory_mb(), 1),
            "git_commit": git_commit(),
            "versions": versions(),
        }

    def _claim(self) -> None:
        """Make the folder, check that it can be written and that it holds no other run."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make {self.path}: {error.strerror or error}") from error
        self.reserve(1 << 16)
        found = [name for name in _MARKS if (self.path / name).exists()]
        if found and not self.resume and not self.overwrite:
            state = "a finished run" if "result.json" in found else "an unfinished run"
            raise OutputError(
                f"{self.path} already holds {state} ({', '.join(found)}): choose another output "
                "folder, resume it (--resume), or replace it (--overwrite)"
            )
        self.checkpoints.remove_partial()
        if self.overwrite:
            for name in found:
                _remove(self.path / name)


def check_same(before: Any, now: Any, what: str, volatile: Collection[str] = ()) -> None:
    """Raise a ConfigError that names the fields in which two configurations differ."""
    old, new = _flat(before), _flat(now)
    changed = [
        f"{key} was {old.get(key)!r} and is {new.get(key)!r}"
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key) and key.split(".")[0] not in volatile
    ]
    if changed:
        raise ConfigError(f"cannot resume {what} with another configuration: {'; '.join(changed)}")


def plain(value: Any) -> Any:
    """Return `value` in terms of JSON: dataclasses as dicts, paths as text, NaN as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "item") and callable(value.item):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat.update(_flat(item, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _upto(line: str, step: int) -> bool:
    """Tell whether a log line is whole and not later than `step`."""
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return isinstance(record, dict) and int(record.get("step") or 0) <= step


def _remove(path: Path) -> None:
    try:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    except OSError as error:
        raise OutputError(f"cannot remove {path}: {error.strerror or error}") from error
