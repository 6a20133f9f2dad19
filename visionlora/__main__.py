"""The command line of adapter files: look into them and convert them.

    python -m visionlora inspect FILE
    python -m visionlora convert FILE --to peft [--output DIR] [--base FILE.safetensors] [--rank 8]

A user error is one line and exit code 2.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, get_args

from visionlora.errors import ConfigError
from visionlora.io.convert import Target, convert
from visionlora.io.inspect import inspect
from visionlora.io.peft.config import TENSORS
from visionlora.training.cli import run_cli


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are errors of ours: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb.

    Raises:
        VisionLoraError: a wrong argument, or a file that cannot be read, converted or written.
    """
    arguments = _parser().parse_args(argv)
    if arguments.verb == "inspect":
        print("\n".join(str(inspect(path)) for path in arguments.files))
        return
    target = arguments.output or _beside(arguments.file, arguments.to)
    read, written = arguments.file.resolve(), target.resolve()
    if {read, read / TENSORS} & {written, written / TENSORS}:  # as a folder, or as its file
        raise ConfigError(f"--output {target} is the file that is converted; name another")
    print(
        convert(arguments.file, target, to=arguments.to, base=arguments.base, rank=arguments.rank)
    )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m visionlora", description="Look into adapter files and convert them."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="inspect|convert")
    look = verbs.add_parser("inspect", help="describe adapters of either format")
    look.add_argument("files", nargs="+", type=Path, metavar="FILE", help="file or PEFT folder")
    turn = verbs.add_parser("convert", help="write an adapter in another format")
    turn.add_argument("file", type=Path, metavar="FILE", help="native file, or PEFT folder or file")
    turn.add_argument(
        "--to",
        choices=get_args(Target),
        required=True,
        help="peft: PEFT's files. visionlora: a native file of the same method. "
        "lora: a native file of plain LoRA.",
    )
    turn.add_argument(
        "--output", type=Path, help="folder (peft) or file; beside FILE, named after it, by default"
    )
    turn.add_argument(
        "--base",
        type=Path,
        metavar="FILE.safetensors",
        help="state dict of the base model, for methods whose change depends on it",
    )
    turn.add_argument("--rank", type=int, help="highest rank of plain LoRA; exact without it")
    return parser


def _beside(file: Path, to: str) -> Path:
    """Return a path next to a file or folder that says what it is."""
    file = file.resolve()
    stem = file.parent.name if file.name.startswith("adapter_") else file.stem
    folder = file.parent.parent if file.name.startswith("adapter_") else file.parent
    return folder / (f"{stem}-peft" if to == "peft" else f"{stem}-{to}.safetensors")


if __name__ == "__main__":
    run_cli(lambda: main(sys.argv[1:]))
