"""Open a local page on which a CLIP model learns classes from a few pictures.

python scripts/app.py [--backbone tiny] [--port 7860]      see --help
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tasks.fewshot.app.serve import AppConfig, run
from visionlora.training.cli import parse, run_cli

if __name__ == "__main__":
    run_cli(lambda: run(parse(AppConfig)))
