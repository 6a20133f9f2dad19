"""Make tiny-vit, the backbone that ships with the project, from photographs.

python scripts/make_tiny_vit.py photographs --source PICTURES --output PHOTOGRAPHS
python scripts/make_tiny_vit.py distil --photographs PHOTOGRAPHS --output RUN [options, see --help]
python scripts/make_tiny_vit.py export --run RUN [--output FILE]

`torchrun --nproc-per-node 2` before `distil` uses two cores as two processes, which on a machine
that has other work wait less for each other than threads do.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tasks.shared.tiny_vit import distil, export, photographs
from visionlora.errors import ConfigError, nearest
from visionlora.training.cli import parse, run_cli


@dataclass(frozen=True, kw_only=True)
class PhotographsConfig:
    """Pictures in, photographs out."""

    source: Path
    """Folder with pictures, at any depth."""
    output: Path
    """Folder for the prepared photographs."""
    scenes: int = 2
    """How many grounds every cut-out of an object is pasted on."""
    skip: list[str] = field(default_factory=list)
    """Names of files or folders to leave out."""


def prepare() -> None:
    """Prepare photographs and say how many there are."""
    config = parse(PhotographsConfig, sys.argv[2:])
    skip = frozenset(config.skip)
    entries = photographs.prepare(config.source, config.output, scenes=config.scenes, skip=skip)
    whole = sum("#" not in entry.file for entry in entries)
    print(f"{whole} photographs and {len(entries) - whole} scenes in {config.output}")


def teach() -> None:
    """Distil, and say where the weights are."""
    config = parse(distil.DistilConfig, sys.argv[2:])
    result = distil.distil(config)
    print(f"loss {result.loss:.3f} after {result.steps} steps; {config.output}")


def ship() -> None:
    """Write the file that ships."""
    config = parse(export.ExportConfig, sys.argv[2:])
    export.export(config)
    print(f"{config.output}: {config.output.stat().st_size / 1e6:.1f} MB")


VERBS = {"photographs": prepare, "distil": teach, "export": ship}


def main() -> None:
    """Parse the command line and run one part."""
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    if verb in ("", "-h", "--help"):
        print(__doc__)
    elif verb not in VERBS:
        raise ConfigError(f"unknown part {verb!r}{nearest(verb, VERBS)}: {', '.join(VERBS)}")
    else:
        VERBS[verb]()


if __name__ == "__main__":
    run_cli(main)
