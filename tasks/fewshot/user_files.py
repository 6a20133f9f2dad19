"""Small files that users write: JSON, or one entry per line of text."""

import json
from pathlib import Path
from typing import Any

from visionlora.errors import VisionLoraError


def read_entries(file: Path, option: str, error: type[VisionLoraError]) -> Any:
    """Return what a `.json` file holds, or the lines of any other.

    Args:
        file: The file.
        option: The command-line option that named it, for messages.
        error: What is raised where it cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8")
        return json.loads(text) if file.suffix.lower() == ".json" else text.splitlines()
    except OSError as failure:
        raise error(f"{option} {file}: {failure.strerror or failure}") from failure
    except ValueError as failure:
        raise error(f"{option} {file} is not readable: {failure}") from failure
