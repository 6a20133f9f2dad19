"""What the page says about a result: plain sentences, with how sure one can be."""

import html
import math

from tasks.fewshot.app.engine import Adapted
from tasks.fewshot.evaluate import Scores
from tasks.fewshot.predictions import Prediction

Z95 = 1.959964
"""Standard normal quantile of a two-sided 95 % interval."""
NAMED = 5
"""So many unreadable pictures are named."""


def summary(adapted: Adapted) -> str:
    """Return the result as Markdown."""
    lines = []
    if adapted.random_weights:
        lines.append("**Random weights: these figures mean nothing.**")
    if adapted.scores is not None and adapted.zero_shot is not None:
        lines.append(f"### {adapted.scores.accuracy():.1f} % right")
        lines.append(f"{_counts(adapted.scores)}; before adapting {_counts(adapted.zero_shot)}.")
    lines.append(safe(adapted.sentence))
    lines.append(
        f"{safe(adapted.method)}: {adapted.trainable:,} trained numbers, {adapted.steps} steps, "
        f"{adapted.seconds:.0f} s in all."
    )
    lines += _left_out(adapted.unreadable, adapted.doubles)
    return "\n\n".join(lines)


def confusion_title(scores: Scores) -> str:
    """Return the title of the confusion picture."""
    return f"{scores.accuracy():.1f} % of {len(scores.labels)} pictures"


def predicted(found: list[Prediction]) -> str:
    """Return what there is to say besides the predictions themselves."""
    errors = [f"{item.file.name}: {item.error}" for item in found if item.error]
    good = len(found) - len(errors)
    first = f"{good} picture{'' if good == 1 else 's'} classified."
    return "\n\n".join([first, *_left_out(errors, 0)])


def caption(item: Prediction) -> str:
    """Return the likeliest class and its probability, for below a picture."""
    return f"{item.names[0]} {100 * item.probabilities[0]:.0f} %"


def table_row(item: Prediction) -> list[str]:
    """Return the file and its likeliest classes with probabilities."""
    if item.error:
        return [item.file.name, f"unreadable: {item.error}", "", ""]
    cells = [
        f"{name} {100 * value:.1f} %"
        for name, value in zip(item.names, item.probabilities, strict=True)
    ]
    return [item.file.name, *cells, *[""] * (3 - len(cells))]


def wilson(right: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share, in percent, after Wilson (1927).

    Unlike the usual one it stays within 0 and 100 and has a width where all or none are right.
    """
    share, z2 = right / count, Z95**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    spread = share * (1 - share) / count + z2 / (4 * count**2)
    half = Z95 * math.sqrt(spread) / (1 + z2 / count)
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


def safe(text: str) -> str:
    """Return text of a user so that neither HTML nor Markdown sees more in it than letters."""
    escaped = html.escape(text)
    return "".join(f"\\{sign}" if sign in "\\`*_[]()#!|~$" else sign for sign in escaped)


def _counts(scores: Scores) -> str:
    count = len(scores.labels)
    right = int((scores.logits.argmax(1) == scores.labels).sum())
    low, high = wilson(right, count)
    return f"{right} of {count} (95 % interval {low:.0f} to {high:.0f} %)"


def _left_out(unreadable: list[str], doubles: int) -> list[str]:
    lines = []
    if unreadable:
        more = f" and {len(unreadable) - NAMED} more" if len(unreadable) > NAMED else ""
        names = "; ".join(safe(text) for text in unreadable[:NAMED])
        lines.append(f"{len(unreadable)} unreadable and left out: {names}{more}.")
    if doubles:
        lines.append(f"{doubles} second copies of the same picture left out.")
    return lines
