"""Pretrain the tiny CLIP on rendered characters, about two minutes on one core."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tasks.fewshot.tiny.pretrain import PretrainConfig, pretrain
from visionlora.errors import VisionLoraError


def main() -> int:
    """Parse the command line, train, and return the exit code."""
    defaults = PretrainConfig()
    parser = argparse.ArgumentParser(
        description="Pretrain the tiny CLIP on rendered characters with captions.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--output", type=Path, default=defaults.output, help="the checkpoint to write"
    )
    parser.add_argument(
        "--seed", type=int, default=defaults.seed, help="seed of weights, glyphs and batches"
    )
    parser.add_argument("--steps", type=int, default=defaults.steps, help="optimiser steps")
    options = parser.parse_args()
    try:
        pretrain(PretrainConfig(output=options.output, seed=options.seed, steps=options.steps))
    except VisionLoraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
