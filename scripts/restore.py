"""Restore pictures: pre-train with mixed degradations, adapt to a task, evaluate, use.

python scripts/restore.py pretrain --clean DIR [options]                 a base network
python scripts/restore.py contribution --base B --data ROOT              what each layer matters
python scripts/restore.py adapt --base B --data ROOT --task T            an adapter for a task
python scripts/restore.py evaluate --base B --adapter DIR --data ROOT    PSNR and SSIM
python scripts/restore.py run IN OUT --adapter DIR                       restore files and folders
python scripts/restore.py compare --base B --data ROOT --task T          several methods and seeds
python scripts/restore.py merge --base B --adapter DIR --output FILE     both in one file
python scripts/restore.py preview IN [options]                           a sheet of degradations
python scripts/restore.py degrade IN OUT [options]                       degraded copies of pictures
python scripts/restore.py check ROOT [options]                           how pairs lie on disk

Each command has its own --help.
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from visionlora.errors import ConfigError, nearest
from visionlora.training.cli import parse, run_cli


def pretrain(words: list[str]) -> None:
    from tasks.restoration.training import pretrain
    from tasks.restoration.training.config import PretrainConfig

    pretrain.run(parse(PretrainConfig, words))


def contribution(words: list[str]) -> None:
    from tasks.restoration.contribution import ContributionConfig, run

    run(parse(ContributionConfig, words))


def adapt(words: list[str]) -> None:
    from tasks.restoration.training import adapt
    from tasks.restoration.training.config import AdaptConfig

    adapt.run(parse(AdaptConfig, words))


def evaluate(words: list[str]) -> None:
    from tasks.restoration.evaluate import EvaluateConfig, run

    run(parse(EvaluateConfig, words))


def run(words: list[str]) -> None:
    from tasks.restoration.run import RunConfig, run

    run(parse(RunConfig, named(words, "input", "output")))


def compare(words: list[str]) -> None:
    from tasks.restoration.training import compare
    from tasks.restoration.training.config import CompareConfig

    compare.run(parse(CompareConfig, words))


def merge(words: list[str]) -> None:
    from tasks.restoration.training.merge import MergeConfig, run

    run(parse(MergeConfig, words))


def preview(words: list[str]) -> None:
    from tasks.restoration.degradations.preview import PreviewConfig, run

    run(parse(PreviewConfig, named(words, "input")))


def degrade(words: list[str]) -> None:
    from tasks.restoration.degradations.degrade import DegradeConfig, run

    run(parse(DegradeConfig, named(words, "input", "output")))


def check(words: list[str]) -> None:
    from tasks.restoration.check import CheckConfig, run

    run(parse(CheckConfig, named(words, "data")))


def named(words: list[str], *names: str) -> list[str]:
    """Give the first arguments, which need no name, the names that `parse` knows them by."""
    given = []
    for name in names:
        if not words or words[0].startswith("--"):
            break
        given.append(f"--{name}={words[0]}")
        words = words[1:]
    return [*given, *words]


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "pretrain": pretrain,
    "contribution": contribution,
    "adapt": adapt,
    "evaluate": evaluate,
    "run": run,
    "compare": compare,
    "merge": merge,
    "preview": preview,
    "degrade": degrade,
    "check": check,
}


def main() -> None:
    """Run the command that the first word names."""
    command, words = "".join(sys.argv[1:2]), sys.argv[2:]
    if command in ("-h", "--help"):
        print(__doc__)
        return
    if command not in COMMANDS:
        what = (
            f"unknown command {command!r}{nearest(command, COMMANDS)}" if command else "no command"
        )
        raise ConfigError(f"{what}; known: {', '.join(COMMANDS)}")
    COMMANDS[command](words)


if __name__ == "__main__":
    run_cli(main)
