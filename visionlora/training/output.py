"""The folder of a run: an unused name by default, and nothing left behind by a refused run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from visionlora.errors import ConfigError
from visionlora.training.rundir import RunDirectory
from visionlora.training.sampler import process

__all__ = ["open_run", "taken_back_on_error"]


def open_run(
    output: str | None, default: Path, *, resume: bool, overwrite: bool
) -> tuple[RunDirectory, list[Path]]:
    """Open the run folder; return with it the folders that did not exist before.

    Args:
        output: The folder that the user named, if any.
        default: The folder otherwise, or its first free number; to resume, the newest of them.
        resume: See `RunDirectory`.
        overwrite: See `RunDirectory`.
    """
    path = Path(output).expanduser() if output else _numbered(default, resume or overwrite)
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    return RunDirectory(path, resume, overwrite=overwrite), made


def _numbered(default: Path, continues: bool) -> Path:
    if process()[1] > 1:
        raise ConfigError("a run of several processes needs --output, so that all use one folder")
    path, number = default, 1
    candidates = [path]
    while candidates[-1].exists():
        number += 1
        candidates.append(path.with_name(f"{path.name}-{number}"))
    return candidates[-2] if continues and len(candidates) > 1 else candidates[-1]


@contextmanager
def taken_back_on_error(made: list[Path]) -> Iterator[None]:
    """Remove the folders we made, as long as they are empty, if the body fails."""
    try:
        yield
    except BaseException:
        for folder in made:
            try:
                folder.rmdir()
            except OSError:
                break
        raise
