"""Adapt a CLIP model to a few labelled images per class, or classify pictures with the result.

python scripts/fewshot.py [options]                                  train and test, see --help
python scripts/fewshot.py predict --adapter DIR --images FOLDER      use a saved adapter
python scripts/fewshot.py protocol --name base-to-new [options]      fill a whole table
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tasks.fewshot import predict, train
from tasks.fewshot.config import FewshotConfig
from tasks.fewshot.protocol import run as protocol
from tasks.fewshot.protocol.config import ProtocolConfig
from visionlora.training.cli import parse, run_cli


def main() -> None:
    """Parse the command line and run the task."""
    if sys.argv[1:2] == ["predict"]:
        predict.run(parse(predict.PredictConfig, sys.argv[2:]))
    elif sys.argv[1:2] == ["protocol"]:
        protocol.run(parse(ProtocolConfig, sys.argv[2:]))
    else:
        train.run(parse(FewshotConfig))


if __name__ == "__main__":
    run_cli(main)
