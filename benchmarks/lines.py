"""Results as JSON lines, one per method, written as they come: a stopped run continues."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from visionlora.io.atomic import write_text_atomically


def each(names: Sequence[str], path: Path, measure: Callable[[str], dict[str, Any]]) -> None:
    """Measure the methods that are not in the file yet, and append each as it is done."""
    done = {item["method"] for item in read(path)}
    waiting = [name for name in names if name not in done]
    start = time.monotonic()
    for index, name in enumerate(waiting):
        item = measure(name)
        lines = [json.dumps(line) for line in [*read(path), item]]
        write_text_atomically(path, "\n".join(lines) + "\n")
        left = (time.monotonic() - start) / (index + 1) * (len(waiting) - index - 1)
        print(
            f"{json.dumps(item)}   {index + 1}/{len(waiting)}, {left / 60:.0f} min left", flush=True
        )
    print(f"{len(waiting)} methods measured, {len(done)} were there; all in {path}")


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Return the lines of a results file, none if it does not exist."""
    if path.exists():
        yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())
