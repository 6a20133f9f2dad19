"""Write the tables of the README and the docs from the registry and the measured results.

Usage: python scripts/tables.py [--check]
"""

import argparse
import json
import re
import sys
from pathlib import Path

import visionlora as vl
from visionlora.io.atomic import write_text_atomically
from visionlora.registry import list_presets

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "step.jsonl"
# The running example of the field: q and v of the 12 blocks of ViT-B/16.
VIEWS, WIDTH = 24, 768


def method_table() -> str:
    """Return the table of registered methods with their closed-form parameter counts."""
    rows = ["| method | what it is | trained on ViT-B/16 q, v | at |", "|---|---|---|---|"]
    for name in vl.list_methods():
        method = vl.get_method(name)
        config = method.config()
        count = VIEWS * method.delta.parameter_count(config, WIDTH, WIDTH)
        title = re.sub(r"^[\w-]+: ", "", method.summary).rstrip(".")
        rows.append(f"| `{name}` | {title} | {count:,} | rank {getattr(config, 'rank', '-')} |")
    for preset in list_presets():
        rows.append(f"| `{preset.name}` | preset of `{preset.method}`: {preset.summary} | | |")
    return "\n".join(rows)


def method_pages() -> str:
    """Return one section per method: its module docstring, where the equation is."""
    parts = []
    for name in vl.list_methods():
        parts.append(f"## {name}\n\n```text\n{vl.get_method(name).documentation.strip()}\n```")
    return "\n\n".join(parts)


def step_table() -> str:
    """Return the measured step table, or say that there is none."""
    if not RESULTS.exists():
        return "No measurement is stored: run `make bench`."
    rows = ["| library | method | step | forward | saved bytes |", "|---|---|---|---|---|"]
    for line in RESULTS.read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        figures = (f"{item[key]:.2f}" for key in ("step_ratio", "forward_ratio", "saved_ratio"))
        rows.append(f"| {item['library']} | {item['method']} | {' | '.join(figures)} |")
    return "\n".join(rows)


TABLES = {"methods": method_table, "method-pages": method_pages, "step": step_table}
FILES = ("README.md", "docs/index.md", "docs/methods.md", "docs/performance.md")


def filled(text: str) -> str:
    """Return a page with the content between its table markers made anew."""
    for name, make in TABLES.items():
        opening, closing = f"<!-- table: {name} -->\n", "<!-- end -->"
        if opening in text:
            before, _, rest = text.partition(opening)
            _, _, after = rest.partition(closing)
            text = f"{before}{opening}{make()}\n{closing}{after}"
    return text


def main() -> int:
    """Rewrite the pages, or with --check report the stale ones."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if one is stale")
    check = parser.parse_args().check
    stale = []
    for name in FILES:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        fresh = filled(text)
        if fresh != text:
            stale.append(name)
            if not check:
                write_text_atomically(path, fresh)
    if check and stale:
        print(f"error: stale tables in {', '.join(stale)}: run make tables", file=sys.stderr)
        return 1
    print(f"tables: {', '.join(stale) or 'nothing'} {'stale' if check else 'rewritten'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
