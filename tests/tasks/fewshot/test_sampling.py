"""The K-shot draw is CoOp's, and base and new classes divide the labels."""

import random

import pytest

from tasks.fewshot.sampling import (
    Item,
    base_and_new,
    draw,
    few_shot,
    restrict,
    short_classes,
    spares,
)
from visionlora.errors import DataError


def pool(sizes: dict[int, int]) -> list[Item]:
    """Items of several classes, interleaved, with readable names."""
    items = [Item(f"{label}-{i}", label) for label, n in sizes.items() for i in range(n)]
    random.Random(5).shuffle(items)
    return items


def coop(items: list[Item], shots: int) -> list[Item]:
    """The published procedure, on the global random stream."""
    groups: dict[int, list[Item]] = {}
    for item in items:
        groups.setdefault(item.label, []).append(item)
    drawn: list[Item] = []
    for group in groups.values():
        drawn += random.sample(group, shots) if len(group) >= shots else group
    return drawn


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_draw_equals_the_published_procedure(seed):
    train, val = pool({0: 20, 1: 30, 2: 9, 3: 25}), pool({0: 9, 1: 3, 2: 7, 3: 5})
    state = random.getstate()
    random.seed(seed)
    expected = coop(train, 16), coop(val, 4)
    random.setstate(state)
    assert few_shot(train, val, 16, seed) == expected


def test_draw_leaves_the_global_stream_alone():
    before = random.getstate()
    few_shot(pool({0: 5, 1: 5}), [], 2, seed=1)
    assert random.getstate() == before


def test_few_validation_shots_follow_few_shots():
    _, val = few_shot(pool({0: 9, 1: 9}), pool({0: 9, 1: 9}), 2, seed=1)
    assert len(val) == 2 * 2


def test_short_class_is_kept_whole_or_repeated():
    items = pool({0: 3, 1: 20})
    kept = draw(items, 8, random.Random(1), "keep")
    repeated = draw(items, 8, random.Random(1), "repeat")
    assert sum(item.label == 0 for item in kept) == 3
    assert sum(item.label == 0 for item in repeated) == 8
    assert short_classes(items, 8) == {0: 3}


def test_zero_shots_are_refused():
    with pytest.raises(DataError, match="at least 1"):
        draw(pool({0: 3}), 0, random.Random(1))


def test_spares_are_exactly_the_rest():
    items = pool({0: 6, 1: 4})
    drawn = draw(items, 3, random.Random(1))
    rest = spares(items, drawn, seed=1)
    sources = sorted(item.source for item in [*drawn, *rest[0], *rest[1]])
    assert sources == sorted(item.source for item in items)


@pytest.mark.parametrize(("classes", "base", "new"), [(5, 3, 2), (10, 5, 5), (2, 1, 1)])
def test_base_is_the_larger_half(classes, base, new):
    first, second = base_and_new(classes)
    assert (len(first), len(second)) == (base, new)
    assert sorted([*first, *second]) == list(range(classes))


def test_restricting_relabels_from_zero_and_keeps_the_draw():
    drawn, _ = few_shot(pool({label: 9 for label in range(5)}), [], 4, seed=2)
    base, new = base_and_new(5)
    part = restrict(drawn, new)
    assert {item.label for item in part} == {0, 1}
    assert {item.source for item in part} < {item.source for item in drawn}
    assert {item.source for item in restrict(drawn, base)}.isdisjoint(
        {item.source for item in part}
    )
