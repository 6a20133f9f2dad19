"""Follow objects in videos: train LoRAT trackers, evaluate them, use them.

python scripts/track.py evaluate --tracker tiny --benchmark lasot --root DIR     score a tracker
python scripts/track.py video FILE --box x,y,w,h                                 follow one object
python scripts/track.py train [options]                                          train a tracker
python scripts/track.py compare [options]                                        several results

Each command has its own --help.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from visionlora.errors import ConfigError, nearest
from visionlora.training.cli import parse, run_cli


def train(words: list[str]) -> None:
    from tasks.tracking.training import train
    from tasks.tracking.training.config import TrainConfig

    train.run(parse(TrainConfig, words))


def evaluate(words: list[str]) -> None:
    from tasks.tracking.evaluate import EvaluateConfig, run

    run(parse(EvaluateConfig, words))


def video(words: list[str]) -> None:
    from tasks.tracking.video.run import VideoConfig, run

    # The one argument that needs no name; `parse` knows options only.
    given = [f"--source={words[0]}", *words[1:]] if words and words[0][:2] != "--" else words
    run(parse(VideoConfig, given))


def compare(words: list[str]) -> None:
    from tasks.tracking.evaluation.compare import CompareConfig, run

    run(parse(CompareConfig, words))


COMMANDS = {"train": train, "evaluate": evaluate, "video": video, "compare": compare}


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
