"""Train a generator of LoRA adapters on several few-shot tasks and test what it generates.

python scripts/generate_adapters.py [options]        see --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tasks.fewshot import generate
from visionlora.training.cli import parse, run_cli


def main() -> None:
    """Parse the command line and run the task."""
    generate.run(parse(generate.GenerateConfig))


if __name__ == "__main__":
    run_cli(main)
