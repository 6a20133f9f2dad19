"""Which pictures train and which test, and an honest sentence about it.

```
held-out          a third of every class tests the adapter that is handed out; it trains on the rest
cross-validation  k rounds; in each the i-th part of every class tests an adapter trained on the
                  others. The adapter handed out is one more, trained on all pictures.
none              everything trains, nothing is measured
```
Cross-validation with one picture of a class in every part is leave-one-out.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from tasks.fewshot.sampling import Item
from visionlora.errors import ConfigError

Measure = Literal["automatic", "held-out", "cross-validation", "none"]
HELD_OUT_FROM = 6
"""Classes of at least so many pictures can spare a third of them."""
MAX_ROUNDS = 5
SEED = 1


@dataclass(frozen=True)
class Part:
    """What one training sees, and what tests it."""

    train: list[Item]
    test: list[Item]


@dataclass(frozen=True)
class Plan:
    """Rounds that only measure, then the training whose adapter is handed out."""

    rounds: list[Part]
    final: Part
    sentence: str

    @property
    def trainings(self) -> int:
        """How many adapters are trained."""
        return len(self.rounds) + 1


def plan(classes: Mapping[str, Sequence[Path]], shots: int, measure: Measure) -> Plan:
    """Divide the pictures, of which at most `shots` per class train at once.

    Raises:
        ConfigError: an unknown way of measuring, or a class that is too small for it.
    """
    if measure not in get_args(Measure):
        raise ConfigError(f"accuracy can be measured by {', '.join(get_args(Measure))}")
    mixed = _shuffled(classes)
    smallest = min(classes, key=lambda name: len(classes[name]))
    least = len(classes[smallest])
    if measure == "automatic":
        measure = "none" if least < 2 else "cross-validation"
        measure = "held-out" if least >= HELD_OUT_FROM else measure
        why = f"; class {smallest!r} has one picture, and two are needed" if least < 2 else ""
    elif measure != "none" and least < 2:
        raise ConfigError(f"class {smallest!r} has one picture: {measure} needs two or more")
    else:
        why = ""
    if measure == "none":
        return Plan([], _all(mixed, shots), f"Accuracy was not measured{why}.")
    if measure == "held-out":
        return _held_out(mixed, shots)
    return _cross_validation(mixed, shots)


def _held_out(mixed: list[list[Item]], shots: int) -> Plan:
    train: list[Item] = []
    test: list[Item] = []
    for group in mixed:
        kept = min(shots, len(group) - max(1, len(group) // 3))
        train += group[:kept]
        test += group[kept:]
    sentence = (
        f"Held-out test: {len(test)} pictures that the adapter was not trained on; "
        f"{len(train)} pictures trained it."
    )
    return Plan([], Part(train, test), sentence)


def _cross_validation(mixed: list[list[Item]], shots: int) -> Plan:
    largest = max(len(group) for group in mixed)
    rounds = min(largest, MAX_ROUNDS)
    parts = []
    for number in range(rounds):
        train: list[Item] = []
        test: list[Item] = []
        for group in mixed:
            test += group[number::rounds]
            train += [item for index, item in enumerate(group) if index % rounds != number][:shots]
        parts.append(Part(train, test))
    kind = "Leave-one-out" if largest <= rounds else f"{rounds}-fold cross-validation"
    final = _all(mixed, shots)
    sentence = (
        f"{kind}: each of {sum(len(group) for group in mixed)} pictures was tested by an adapter "
        f"that had not seen it ({rounds} extra trainings). The adapter below is one more, trained "
        f"on {len(final.train)} pictures; it was not tested itself."
    )
    return Plan(parts, final, sentence)


def _all(mixed: list[list[Item]], shots: int) -> Part:
    return Part([item for group in mixed for item in group[:shots]], [])


def _shuffled(classes: Mapping[str, Sequence[Path]]) -> list[list[Item]]:
    """Return the items of each class, shuffled with a fixed seed."""
    mixed = []
    for label, files in enumerate(classes.values()):
        group = [Item(file, label) for file in files]
        random.Random(f"{SEED} {label}").shuffle(group)
        mixed.append(group)
    return mixed
