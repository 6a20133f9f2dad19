"""Tables of what presets did: on the planted teacher, on the few-shot task, in time and memory.

A product wins if it does better than tuned LoRA in every seed and loses if worse in every seed;
all else is no clear difference. The list below a table says who did which.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import visionlora as vl
from benchmarks.lines import read

RESULTS = Path(__file__).parent / "results"
Line = Mapping[str, Any]
PLAIN, UNDROPPED = "lora", "lora(dropout=0.0)"
NEITHER = "no clear difference"


def planted(path: Path = RESULTS / "planted.jsonl") -> str:
    """Return the table of steps to a loss on the planted teacher, and who needs fewer than LoRA."""
    lines = list(read(path))
    lora = _named(lines, PLAIN)
    if lora is None:
        return "No measurement is stored: run `make presets`."
    targets = list(lora["steps_to"])
    heads = [f"to {100 * float(target):g} %" for target in targets]
    rows = [
        f"| | trained | rate | steps {' | '.join(heads)} | ratio to LoRA | final loss | "
        "beside LoRA |",
        "|" + "---|" * (6 + len(targets)),
    ]
    verdicts: dict[str, dict[str, str]] = {target: {} for target in targets}
    for line in sorted(lines, key=lambda item: _order(item, targets)):
        name, needed = line["method"], line["steps_to"]
        cells = [_steps(needed[target], line["steps"]) for target in targets]
        ratios = [_ratio(needed[target], lora["steps_to"][target]) for target in targets]
        words = [_sooner(needed[target], lora["steps_to"][target]) for target in targets]
        if name != PLAIN:
            for target, word in zip(targets, words, strict=True):
                verdicts[target][name] = word
        rows.append(
            f"| `{name}` | {line['parameters']:,} | {line['lr']:g} | {' | '.join(cells)} | "
            f"{', '.join(ratios)} | {_spread(line['final'])} | "
            f"{'' if name == PLAIN else ', '.join(dict.fromkeys(words))} |"
        )
    said = [
        sentence
        for target, head in zip(targets, heads, strict=True)
        for sentence in (
            _says(f"Sooner {head} than tuned LoRA, in every seed", verdicts[target], "sooner"),
            _says("No clear difference", verdicts[target], NEITHER),
            _says("Later in every seed", verdicts[target], "later"),
            _says(f"Never within {lora['steps']} steps", verdicts[target], "never"),
        )
    ]
    return "\n".join(rows) + "\n\n" + "\n".join(said)


def fewshot(path: Path = RESULTS / "presets.jsonl") -> str:
    """Return the table of presets on the few-shot task, each beside LoRA with the same dropout."""
    lines = list(read(path))
    if any(_named(lines, name) is None for name in (PLAIN, UNDROPPED)):
        return "No measurement is stored: run `make presets`."
    rows = [
        "| | accuracy | less LoRA's | steps to LoRA's loss at half-time | trained | file, kB | "
        "rate | accuracy beside LoRA |",
        "|" + "---|" * 8,
    ]
    verdicts: dict[str, str] = {}
    for line in sorted(lines, key=lambda item: -item["accuracy"]):
        name = line["method"]
        lora = _named(lines, beside(name))
        assert lora is not None
        gains = [a - b for a, b in zip(line["accuracies"], lora["accuracies"], strict=True)]
        verdict = _verdict(gains, ("higher", "lower"))
        if name not in (PLAIN, UNDROPPED):
            verdicts[name] = verdict
        arrived = [
            _arrival(own, other) for own, other in zip(line["losses"], lora["losses"], strict=True)
        ]
        rows.append(
            f"| `{name}` | {line['accuracy']:.1f} ± {line['std']:.1f} | "
            f"{statistics.mean(gains):+.1f} | {_steps(arrived, line['steps'])} | "
            f"{line['parameters']:,} | {line['file_bytes'] / 1000:.0f} | {line['lr']:.2g} | "
            f"{verdict if name in verdicts else ''} |"
        )
    said = [
        _says("Higher accuracy than tuned LoRA in every seed", verdicts, "higher"),
        _says("No clear difference", verdicts, NEITHER),
        _says("Lower in every seed", verdicts, "lower"),
    ]
    first = lines[0]
    head = (
        f"Zero-shot {first['zero_shot']:.1f}; {first['steps']} steps, {len(first['seeds'])} seeds, "
        "mean ± standard deviation.\n\n"
    )
    return head + "\n".join(rows) + "\n\n" + "\n".join(said)


def beside(name: str) -> str:
    """Return which LoRA a product is compared with on the few-shot task: that of its dropout."""
    recipe = vl.parse(name)
    has = "dropout" in vl.get_method(recipe.method).config.__dataclass_fields__
    said = {**recipe.implied, **recipe.options}.get("dropout")
    return PLAIN if has and said != 0.0 else UNDROPPED


def overhead(path: Path = RESULTS / "dynamics.jsonl") -> str:
    """Return the table of step times."""
    lines = list(read(path))
    if not lines:
        return "No measurement is stored: run `make bench`."
    rows = [
        "| | beside | step, ratio | goal | optimiser state, MB | beside it, MB |",
        "|" + "---|" * 6,
    ]
    for line in lines:
        goal = "" if line["goal"] is None else f"≤ {line['goal']:g}"
        state, other = (line[key] / 1e6 for key in ("state_bytes", "beside_state_bytes"))
        rows.append(
            f"| `{line['product']}` | `{line['beside']}` | {line['step_ratio']:.2f} | {goal} | "
            f"{state:.2f} | {other:.2f} |"
        )
    return "\n".join(rows)


def memory(path: Path = RESULTS / "memory.jsonl") -> str:
    """Return the table of bytes, beside full fine-tuning, which is the first line."""
    lines = list(read(path))
    if not lines:
        return "No measurement is stored: run `make bench`."
    keys = {
        "trained": "trained",
        "state": "optimiser state",
        "gradients": "gradients",
        "saved": "kept for backward",
        "file": "file",
    }
    rows = [
        f"| MB | {' | '.join(keys.values())} |",
        "|" + "---|" * 6,
    ]
    whole = lines[0]
    for line in lines:
        cells = [f"{line[key] / 1e6:.2f} ({line[key] / whole[key]:.1%})" for key in keys]
        rows.append(f"| `{line['product']}` | {' | '.join(cells)} |")
    first = (
        f"`{whole['model']}` of {whole['depth']} blocks, batch {whole['batch']}, the largest of "
        f"{whole['steps']} steps; in brackets the share of `{whole['product']}`.\n\n"
    )
    return first + "\n".join(rows)


def _named(lines: Sequence[Line], name: str) -> Line | None:
    return next((line for line in lines if line["method"] == name), None)


def _order(line: Line, targets: Sequence[str]) -> tuple[float, float]:
    """Return what the table is sorted by: the steps to all losses, then the final loss."""
    needed = [item or 2 * line["steps"] for target in targets for item in line["steps_to"][target]]
    return statistics.mean(needed), statistics.mean(line["final"])


def _sooner(needed: Sequence[int | None], lora: Sequence[int | None]) -> str:
    """Return the verdict over all seeds."""
    if not any(needed):
        return "never"
    pairs = zip(needed, lora, strict=True)
    return _verdict(
        [(theirs or math.inf) - (own or math.inf) for own, theirs in pairs], ("sooner", "later")
    )


def _verdict(gains: Sequence[float], words: tuple[str, str]) -> str:
    if all(gain > 0 for gain in gains):
        return words[0]
    return words[1] if all(gain < 0 for gain in gains) else NEITHER


def _says(what: str, verdicts: Mapping[str, str], wanted: str) -> str:
    """Return a line of a list with the names that a verdict is about."""
    found = [f"`{name}`" for name, verdict in verdicts.items() if verdict == wanted]
    return f"- {what} ({len(found)}): {', '.join(found) or 'none'}."


def _steps(needed: Sequence[int | None], steps: int) -> str:
    """Return mean and spread, or how many seeds never arrived."""
    arrived = [item for item in needed if item is not None]
    if len(arrived) == len(needed):
        return _spread(arrived, lambda value: f"{value:.0f}")
    if not arrived:
        return f"> {steps}"
    return f"> {steps} in {len(needed) - len(arrived)} of {len(needed)}"


def _ratio(needed: Sequence[int | None], lora: Sequence[int | None]) -> str:
    """Return the mean of the seeds' ratios, a dash where one never arrived."""
    pairs = list(zip(needed, lora, strict=True))
    ratios = [own / theirs for own, theirs in pairs if own is not None and theirs is not None]
    return f"{statistics.mean(ratios):.2f}" if len(ratios) == len(pairs) else "-"


def _spread(values: Sequence[float], show: Callable[[float], str] = "{:.2g}".format) -> str:
    mean, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{show(mean)} ± {show(spread)}"


def _arrival(losses: Mapping[str, float], lora: Mapping[str, float]) -> int | None:
    """Return when the loss is what LoRA's is half-way, from the means that the log has."""
    steps = sorted(map(int, lora))
    goal = lora[str(next(step for step in steps if 2 * step >= steps[-1]))]
    return next((step for step in steps if losses.get(str(step), math.inf) <= goal), None)
