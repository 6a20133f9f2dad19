"""The data set of a generator: adapters saved at the end of several training runs.

recorder = SnapshotRecorder(clip, folder, steps=320, last=64, every=2)
fit(..., dynamics=[recorder])
digits = TaskSnapshots("digits", task_vector, recorder.files)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from visionlora.dynamics import Dynamics, StepContext
from visionlora.errors import AdapterFileError, ConfigError
from visionlora.generate.canonical import canonical_tensors
from visionlora.generate.flatten import Layout
from visionlora.io.adapter_file import AdapterFile, read_adapter
from visionlora.io.native import save
from visionlora.methods.lora import LoRAConfig
from visionlora.training.sampler import process

_SAME_BASE = 2e-2
"""Norms of adapted weights may differ by this share: half precision is still the same model."""


@dataclass(frozen=True)
class TaskSnapshots:
    """The adapters of one task, and the vector that describes the task."""

    name: str
    vector: Tensor
    files: Sequence[Path]


class SnapshotRecorder(Dynamics):
    """Saves the adapter of `model` during the last steps of a run, the final one included.

    Args:
        model: the adapted model, outside any wrapper that training puts around it.
        folder: where the files go; files that are there are replaced.
        steps: steps of the whole run.
        last: how many of them are recorded.
        every: steps between two files.
        adapter: which adapter; may be omitted if there is one.
    """

    name = "snapshots"

    def __init__(
        self,
        model: nn.Module,
        folder: str | Path,
        *,
        steps: int,
        last: int,
        every: int = 1,
        adapter: str | None = None,
    ) -> None:
        if not 1 <= every <= last <= steps:
            raise ConfigError(
                f"snapshots need 1 <= every <= last <= steps, got every {every}, last {last}, "
                f"steps {steps}"
            )
        self.model = model
        self.folder = Path(folder)
        self.adapter = adapter
        self.recorded = range(steps, steps - last, -every)[::-1]

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of a finished run, in order."""
        return tuple(self._file(step) for step in self.recorded)

    def on_step_end(self, context: StepContext) -> None:
        """Save the adapter as this step left it."""
        done = context.step + 1
        if done in self.recorded and process()[0] == 0:
            save(self.model, self._file(done), name=self.adapter)

    def _file(self, step: int) -> Path:
        return self.folder / f"step_{step:06d}.safetensors"


@dataclass(frozen=True)
class Snapshots:
    """The canonical adapters of all tasks as vectors, and the architecture that they share."""

    adapter: AdapterFile
    """One snapshot, for its description."""
    layout: Layout
    vectors: Sequence[Tensor]
    """One `[snapshots, length]` per task."""


def read_snapshots(tasks: Sequence[TaskSnapshots]) -> Snapshots:
    """Read the adapters of all tasks; those of a task are turned towards its last one.

    Raises:
        AdapterFileError: a file that is unreadable, no plain LoRA, or of another architecture,
            scale or base model than the first.
    """
    first: AdapterFile | None = None
    vectors = []
    for task in tasks:
        if not task.files:
            raise ConfigError(f"task {task.name!r} has no snapshots")
        rows: list[Tensor] = []
        last: dict[str, Tensor] | None = None
        for path in reversed(task.files):
            file = read_adapter(path)
            if first is None:
                first = file
                layout = Layout.of(file.tensors)
            _check(file, first, layout)
            tensors = canonical_tensors(file.tensors, [site for site, _ in file.plan], last)
            last = tensors if last is None else last
            rows.insert(0, layout.flatten(tensors))
        vectors.append(torch.stack(rows))
    if first is None:
        raise ConfigError("there is no task to learn from")
    return Snapshots(first, layout, vectors)


def _check(file: AdapterFile, first: AdapterFile, layout: Layout) -> None:
    for _, config in file.plan:
        if config.method != LoRAConfig.method:
            raise AdapterFileError(
                f"{file.path} holds {config.method}; a generator learns from plain LoRA, so "
                "convert it first"
            )
        if config.offset:  # type: ignore[attr-defined]
            raise AdapterFileError(
                f"{file.path} began at a part of the weight; convert it to plain LoRA first"
            )
    if difference := layout.difference(Layout.of(file.tensors)):
        raise AdapterFileError(
            f"{file.path} has another architecture than {first.path}: {difference}"
        )
    here = {site.name: config.meaning() for site, config in file.plan}
    for site, config in first.plan:
        if here[site.name] != config.meaning():
            raise AdapterFileError(
                f"{file.path} gives {site.name} other options than {first.path}: "
                f"{here[site.name]} and {config.meaning()}"
            )
        if not math.isclose(file.base[site.name][0], first.base[site.name][0], rel_tol=_SAME_BASE):
            raise AdapterFileError(
                f"{file.path} was trained on other base weights than {first.path}: {site.name} "
                "differs"
            )
