"""Write the tables and method pages of the README and the docs, from the registry and the results.

Usage: python scripts/tables.py [--check]
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

import visionlora as vl
from benchmarks import composition, fewshot_speed, outcomes, shift_report
from visionlora.config import AdapterConfig
from visionlora.io.atomic import write_text_atomically
from visionlora.methods import Delta
from visionlora.registry import list_presets
from visionlora.sites import Site

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
CLAIMS = ROOT / "benchmarks" / "claims.json"
PAGES = ROOT / "docs" / "methods"
# The running example of the field: q and v of the 12 blocks of ViT-B/16.
VIEWS, WIDTH = 24, 768


def method_table() -> str:
    """Return the table of registered methods: where they act, what they train, what they become."""
    rows = [
        "| method | what it is | layers | as plain LoRA | trained on ViT-B/16 q, v |",
        "|---|---|---|---|---|",
    ]
    for name in vl.list_methods():
        method = vl.get_method(name)
        config = method.config()
        layers = ", ".join(sorted(config.kinds))
        link = f"[`{name}`](docs/methods/{name}.md)"
        rows.append(
            f"| {link} | {_title(method.summary)} | {layers} | {_as_lora(config)} | "
            f"{_count(config)} |"
        )
    return "\n".join(rows)


def method_index() -> str:
    """Return the same table with links that hold inside `docs/methods/`, and the presets."""
    table = method_table().replace("(docs/methods/", "(")
    presets = ["| preset | of | what it sets |", "|---|---|---|"]
    presets += [
        f"| `{item.name}` | `{'+'.join([item.method, *item.factors])}` | {item.summary} |"
        for item in list_presets()
    ]
    return table + "\n\n" + "\n".join(presets)


def _title(summary: str) -> str:
    return re.sub(r"^[\w-]+(?: and [\w-]+)?: ", "", summary).rstrip(".")


def _example(config: AdapterConfig) -> Delta | None:
    """Return the change of one projection of ViT-B/16, or None where the method serves none."""
    if "linear" not in config.kinds:
        return None
    layer = vl.inject(nn.Linear(WIDTH, WIDTH), config, "type:Linear")
    (delta,) = (module for module in layer.modules() if isinstance(module, Delta))
    return delta


@torch.no_grad()
def _as_lora(config: AdapterConfig) -> str:
    """Say what `export(format="lora")` gives."""
    delta = _example(config)
    if delta is None:
        return "no (norms)"
    if delta.bias_change() is not None:
        return "exact (biases)"
    if not delta.mergeable:
        return "after freezing the routing"
    return "best of a rank" if delta.factors() is None else "exact"


def _count(config: AdapterConfig) -> str:
    """Return the trained scalars in closed form, with the rank they are for."""
    if "linear" not in config.kinds:
        return "-"
    method = vl.get_method(config.method)
    count = VIEWS * method.delta.parameter_count(config, WIDTH, WIDTH)
    if method.shared is not None:
        sites = [Site(f"blocks.{i}", "weight", "linear", WIDTH, WIDTH) for i in range(VIEWS)]
        count += method.shared.parameter_count(config, sites)
    rank = getattr(config, "rank", None)
    return f"{count:,}" + (f" (rank {rank})" if rank else "")


def measured_table() -> str:
    """Return what every method did on the embedded task, beside what its paper says."""
    items = _lines("methods.jsonl")
    if not items:
        return "No measurement is stored: run `make methods`."
    steps = {
        item["method"]: item for item in _lines("step.jsonl") if item["library"] == "visionlora"
    }
    claims: dict[str, str] = json.loads(CLAIMS.read_text(encoding="utf-8"))
    rows = [
        "| method | accuracy | trained | file, kB | step | saved | what its authors report |",
        "|---|---|---|---|---|---|---|",
    ]
    for item in sorted(items, key=lambda item: -item["accuracy"]):
        step = steps.get(item["method"])
        costs = ("-", "-") if step is None else (step["step_ratio"], step["saved_ratio"])
        shown = [cost if isinstance(cost, str) else f"{cost:.2f}" for cost in costs]
        accuracy = f"{item['accuracy']:.1f} ± {item['std']:.1f}"
        rows.append(
            f"| `{item['method']}` | {accuracy} | {item['parameters']:,} | "
            f"{item['file_bytes'] / 1000:.0f} | {' | '.join(shown)} | "
            f"{claims[item['method']] or 'nothing quoted'} |"
        )
    first = items[0]
    head = (
        f"Zero-shot {first['zero_shot']:.1f}; {first['steps']} steps, "
        f"{len(first['seeds'])} seeds, mean ± standard deviation.\n\n"
    )
    return head + "\n".join(rows)


def step_table() -> str:
    """Return the measured steps of what PEFT has too, ours beside PEFT's."""
    items = _lines("step.jsonl")
    found = {(item["library"], item["method"]): item for item in items}
    rows = [
        "| method | step | PEFT | saved bytes | PEFT |",
        "|---|---|---|---|---|",
    ]
    for (library, method), ours in found.items():
        peer = found.get(("peft", method))
        if library == "torch":
            rows.append(
                f"| *{method}* | {ours['step_ratio']:.2f} | | {ours['saved_ratio']:.2f} | |"
            )
        elif library == "visionlora" and peer is not None:
            pairs = [(ours[key], peer[key]) for key in ("step_ratio", "saved_ratio")]
            cells = [f"{one:.2f} | {other:.2f}" for one, other in pairs]
            rows.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(rows) if items else "No measurement is stored: run `make bench`."


def _lines(name: str) -> list[dict[str, Any]]:
    path = RESULTS / name
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


TABLES = {
    "methods": method_table,
    "method-index": method_index,
    "measured": measured_table,
    "step": step_table,
    "starts": composition.starts,
    "dynamics": composition.dynamics,
    "composition": composition.compatibility,
    "exclusions": composition.exclusions,
    "planted": outcomes.planted,
    "presets": outcomes.fewshot,
    "overhead": outcomes.overhead,
    "memory": outcomes.memory,
    "fewshot-speed": fewshot_speed.markdown,
    "tracking-shift": shift_report.table,
}
FILES = (
    "README.md",
    "docs/index.md",
    "docs/methods/index.md",
    "docs/methods/starts-and-dynamics.md",
    "docs/performance.md",
    "docs/tracking/index.md",
)


def filled(text: str) -> str:
    """Return a page with the content between its table markers made anew."""
    for name, make in TABLES.items():
        opening, closing = f"<!-- table: {name} -->\n", "<!-- end -->"
        if opening in text:
            before, _, rest = text.partition(opening)
            _, _, after = rest.partition(closing)
            text = f"{before}{opening}{make()}\n{closing}{after}"
    return text


def method_page(name: str) -> str:
    """Return the page of one method: its module docstring, and its options."""
    method = vl.get_method(name)
    values = method.config().to_dict()
    values.pop("offset", None)  # not for users: starts and restarts set it
    options = json.dumps(values, indent=2)
    return (
        f"# {name}\n\n```text\n{method.documentation.strip()}\n```\n\n"
        f'Defaults: `vl.inject(model, "{name}", ...)`\n\n```json\n{options}\n```\n'
    )


def pages() -> dict[Path, str | None]:
    """Return every generated page with its content; None for one whose method is gone."""
    wanted: dict[Path, str | None] = {
        ROOT / name: filled((ROOT / name).read_text(encoding="utf-8")) for name in FILES
    }
    known = {PAGES / f"{name}.md": method_page(name) for name in vl.list_methods()}
    wanted |= dict.fromkeys(
        path for path in PAGES.glob("*.md") if path not in known and path not in wanted
    )
    return {**wanted, **known}


def main() -> int:
    """Rewrite the pages, or with --check report the stale ones."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; 1 if one is stale")
    check = parser.parse_args().check
    stale = []
    for path, fresh in pages().items():
        text = path.read_text(encoding="utf-8") if path.exists() else None
        if fresh == text:
            continue
        stale.append(str(path.relative_to(ROOT)))
        if check:
            continue
        if fresh is None:
            path.unlink()
        else:
            write_text_atomically(path, fresh)
    if check and stale:
        print(f"error: stale pages {', '.join(stale)}: run make tables", file=sys.stderr)
        return 1
    print(f"tables: {', '.join(stale) or 'nothing'} {'stale' if check else 'rewritten'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
