"""One tiny run of every preset, options shrunk so that all that it does happens within it.

The cases come from the registry. A run is what a user does: parse, inject, initialise, optimiser,
dynamics, `fit`. What it leaves is read from its last checkpoint: parameters, constant pairs,
moments, masks, positions of entries, the states of generators.

As a script: `runs.py pair FOLDER` is one of two processes that train all cases on a half of each
batch; `runs.py killed FOLDER` trains all cases in processes that are killed, twice each.
"""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import visionlora as vl
from tests.tolerances import assert_close
from visionlora.errors import DataError
from visionlora.registry import list_presets
from visionlora.training import RunDirectory, TrainSettings, cosine, fit, process, shard
from visionlora.training.checkpoint import CheckpointStore
from visionlora.training.state import carried
from visionlora.training.tree import write_tree

WIDTH, BATCH, STEPS, LOOKS = 6, 6, 8, 2

# Every preset, the method that brings a dynamics of its own, and products of three factors.
CASES = [preset.name for preset in list_presets()]
CASES += [
    "lora",
    "spiel",
    "block-lora+lora-ga+glad",
    "dora+pissa+relora",
    "slora+lora-one+ggpo",
    "lora-xs+eva+sam",
    "lora+lora-ga+lora-pro",
    "spiel+sam",
]

# By name of the option, as in tests.contract.cases: periods end, ranks fit, all is used.
SMALL = {
    "rank": 2,
    "length": 16,
    "coefficients": 5,
    "experts": 3,
    "density": 0.3,
    "every": 3,
    "reselect_every": 3,
    "observe": 2,
    "warmup": 1,
    "ratio": 4.0,
}
# What depends on how samples are cut into batches, by its definition: the balance of experts is a
# product of means over the tokens of a forward, and EVA stops reading when a batch changes little.
WHOLE = {"balance_weight": 0.0, "tau": None}
KILLED_IN = (5, 7)


class Block(nn.Module):
    """A normed perceptron on a residual stream."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 10), nn.Linear(10, WIDTH)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(self.drop(torch.tanh(self.fc1(self.norm(x)))))


class Net(nn.Module):
    """Three blocks and a head that is random, not zero."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(3))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).mean(1)


def examples(step: int, size: int = BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the samples of a step: three tokens each, and what should come of them."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, 3, WIDTH, generator=generator, dtype=torch.float64)
    return x, x.mean(1)[:, :2].square() - x.mean(1)[:, 2:4]


def mean_loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the mean squared error."""
    return (model(batch[0]) - batch[1]).square().mean()


def micro_batches(step: int, parts: int, dtype: torch.dtype) -> list[tuple[torch.Tensor, ...]]:
    """Return the micro-batches of a step, of each the part of this process."""
    cut = [item.to(dtype).chunk(parts) for item in examples(step)]
    rank, world = process()
    mine = shard(range(BATCH // parts), rank, world)
    return [tuple(item[mine] for item in pair) for pair in zip(*cut, strict=True)]


def small(item: Any, **options: Any) -> Any:
    """Return a dataclass of options with those that it has replaced."""
    names = {field.name for field in fields(item)}
    return replace(item, **{k: v for k, v in {**SMALL, **options}.items() if k in names})


@torch.no_grad()
def unsettle(model: nn.Module) -> None:
    """Change everything that a checkpoint has: another machine computes other starts."""
    for _, item in vl.trainable_parameters(model):
        item.add_(1.0)
    for item in carried(model).values():
        item.copy_(item + 1.0 if item.is_floating_point() else item.roll(1))


@dataclass(frozen=True)
class Run:
    """A run that ended."""

    model: nn.Module
    folder: Path
    loss: float
    resumed_from: int | None
    report: vl.InitReport | None

    def left(self) -> dict[str, Any]:
        """Return all that the last checkpoint holds, but for settings and times."""
        return left(self.folder)

    def outputs(self) -> torch.Tensor:
        """Return what the model makes of other samples, in its own precision."""
        return outputs(self.model)


def left(folder: Path) -> dict[str, Any]:
    """Return all that the last checkpoint in a folder holds, but for settings and times."""
    found = CheckpointStore(folder / "checkpoints").newest()
    assert found is not None
    shared = found.shared()
    return {key: shared[key] for key in ("trained", "stepper", "window")}


@torch.no_grad()
def outputs(model: nn.Module) -> torch.Tensor:
    """Return what a model makes of samples that no run sees."""
    model.eval()
    return model(examples(1000, 64)[0].to(next(model.parameters()).dtype))


def network(dropout: float = 0.0) -> Net:
    """Return the network before any adapter."""
    torch.default_generator.manual_seed(0)
    return Net(dropout)


def train(
    case: str,
    folder: Path,
    *,
    parts: int = 1,
    dtype: torch.dtype = torch.float64,
    dropout: float = 0.0,
    resume: bool = False,
    ends: int | None = None,
    at_step: Callable[[int, torch.Tensor], torch.Tensor] = lambda step, loss: loss,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> Run:
    """Train one case.

    Args:
        case: a product.
        folder: where the run goes.
        parts: micro-batches per step.
        dtype: of the model and the data.
        dropout: of the model, outside of the adapter.
        resume: continue the run in the folder.
        ends: the micro-batch that is missing, if one is.
        at_step: may replace the loss of a step, given its number; called after every forward.
        options: options of the method, the initialiser and the dynamics that have them.
        **settings: of the training.
    """
    recipe = vl.parse(case)
    options = options or {}
    config = small(recipe.config(), **options)
    init = None if recipe.init is None else small(recipe.init, **options)
    recipe = replace(recipe, dynamics=tuple(small(item, **options) for item in recipe.dynamics))
    model = vl.inject(network(dropout).to(dtype), config, ["blocks.*.fc1", "blocks.*.fc2"])
    vl.freeze_base(model, ["head"])
    report = None
    if init is not None:
        seen = [part for look in range(LOOKS) for part in micro_batches(-look - 1, parts, dtype)]
        report = vl.initialise(model, init, seen, mean_loss)
    if resume:
        unsettle(model)
    optimizer = torch.optim.AdamW(vl.parameter_groups(model, lr=0.01, weight_decay=0.01), eps=1e-6)

    latest = 0

    def batches(index: int) -> tuple[torch.Tensor, ...]:
        nonlocal latest
        latest = index
        if index == ends:
            raise StopIteration
        step, part = divmod(index, parts)
        return micro_batches(step, parts, dtype)[part]

    def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return at_step(latest // parts, mean_loss(model, batch))

    result = fit(
        model,
        optimizer,
        loss_fn,
        batches,
        TrainSettings(
            steps=STEPS,
            device="cpu",
            accumulate=parts,
            **{"checkpoint_every": STEPS, "log_every": 2, **settings},
        ),
        RunDirectory(folder, resume=resume),
        dynamics=recipe.build_dynamics(model, optimizer, STEPS),
        schedule=cosine(STEPS, warmup=2, floor=0.1),
    )
    return Run(model, folder, result.loss, result.resumed_from, report)


# -- comparing what runs left


def assert_same(actual: Any, expected: Any, *, factor: float | None = None, at: str = "") -> None:
    """Compare nested states: numbers and tensors of floats closely, all else exactly.

    Args:
        actual: what came out.
        expected: what should have.
        factor: multiple of the suite's tolerance, None for equal bits.
        at: where this is, for messages.
    """
    assert type(actual) is type(expected), at
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), at
        for key, value in expected.items():
            assert_same(actual[key], value, factor=factor, at=f"{at}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), at
        for index, value in enumerate(expected):
            assert_same(actual[index], value, factor=factor, at=f"{at}.{index}")
    elif isinstance(expected, torch.Tensor):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), at
        if factor is None or not expected.is_floating_point():
            assert torch.equal(actual, expected), at
        else:
            try:
                assert_close(actual, expected, factor)
            except AssertionError as error:
                raise AssertionError(f"{at}: {error}") from None
    elif isinstance(expected, float) and factor is not None:
        assert_same(
            torch.tensor(actual).double(), torch.tensor(expected).double(), factor=factor, at=at
        )
    else:
        assert actual == expected, at


# -- what other processes do


def pair(folder: Path) -> None:
    """Train all cases as one of two processes."""
    torch.distributed.init_process_group("gloo")
    for case in CASES:
        run = train(case, folder / case, options=WHOLE)
        final = {"model": dict(run.model.state_dict()), "report": told(run)}
        write_tree(folder / case / f"final-{process()[0]}.safetensors", final)
    try:  # the data of one process end, and both must learn it
        train("lora", folder / "ended", options=WHOLE, ends=[None, 5][process()[0]])
    except DataError as error:
        (folder / f"ended-{process()[0]}").write_text(str(error))
    train("lora", folder / "ended", options=WHOLE, resume=True)
    torch.distributed.destroy_process_group()


def told(run: Run) -> Any:
    """Return what the initialiser reported."""
    return None if run.report is None else asdict(run.report)


def killed(folder: Path) -> None:
    """Train every case in a process that dies in a step, and again in one that resumes it.

    All are forks of this one, which has trained already, so that what torch loads while it trains
    is there.
    """
    train("lora", folder / "first")
    for case in CASES:
        for attempt in range(len(KILLED_IN)):
            child = os.fork()
            if not child:
                _die(case, folder / case, attempt)
            _, status = os.waitpid(child, 0)
            if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
                raise SystemExit(f"{case} was not killed in its run {attempt}: status {status}")


def _die(case: str, folder: Path, attempt: int) -> None:
    """Train, and kill this process in the middle of a step; never return."""
    forwards = 0

    def at_step(step: int, loss: torch.Tensor) -> torch.Tensor:
        nonlocal forwards
        forwards += step == KILLED_IN[attempt]
        if forwards == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss

    try:
        resumable(case, folder, resume=attempt > 0, at_step=at_step)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def resumable(case: str, folder: Path, **settings: Any) -> Run:
    """Train with dropout, in two micro-batches a step, with a checkpoint after every second."""
    return train(case, folder, parts=2, dropout=0.2, checkpoint_every=2, **settings)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"pair": pair, "killed": killed}[sys.argv[1]](Path(sys.argv[2]))
