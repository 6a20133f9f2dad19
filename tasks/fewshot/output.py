"""The folder of a run: an unused name by default, and nothing left behind by a refused run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tasks.fewshot.config import FewshotConfig
from visionlora.errors import ConfigError
from visionlora.training import RunDirectory, process

RUNS = Path("runs/fewshot")


def open_run(config: FewshotConfig) -> tuple[RunDirectory, list[Path]]:
    """Open the run folder; return with it the folders that did not exist before."""
    path = Path(config.output).expanduser() if config.output else _default_output(config)
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    return RunDirectory(path, config.resume, overwrite=config.overwrite), made


def _default_output(config: FewshotConfig) -> Path:
    """Return `runs/fewshot/<name>`, or its first free number; the newest one to resume."""
    if process()[1] > 1:
        raise ConfigError("a run of several processes needs --output, so that all use one folder")
    path, number = RUNS / config.run_name, 1
    candidates = [path]
    while candidates[-1].exists():
        number += 1
        candidates.append(path.with_name(f"{path.name}-{number}"))
    continues = (config.resume or config.overwrite) and len(candidates) > 1
    return candidates[-2] if continues else candidates[-1]


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
