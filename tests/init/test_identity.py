"""Equal contents have equal digests, and different contents have different ones."""

import functools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import visionlora as vl
from tests.init.looking import Tower, tower
from visionlora.errors import ConfigError
from visionlora.init.identity import base_digest, digest_of


@dataclass
class Batch:
    images: torch.Tensor
    name: str


class Loss:
    def __init__(self, factor):
        self.factor = factor


def scaled(model, batch, factor=1.0):
    return factor * model(batch).mean()


def enclosing(value):
    def loss(model, batch):
        return value, loss  # it also encloses itself

    return loss


ONES = torch.ones(2, 3)
DIFFERENT = {
    "tensor": lambda: ONES,
    "value": lambda: ONES + torch.tensor([[1e-7, 0, 0], [0, 0, 0]]),
    "dtype": lambda: ONES.double(),
    "shape": lambda: ONES.reshape(3, 2),
    "half": lambda: ONES.bfloat16(),
    "array": lambda: np.ones((2, 3), dtype=np.float32),
    "empty": lambda: torch.zeros(0, 3),
    "scalar": lambda: torch.tensor(1.0),
    "bool": lambda: True,
    "int": lambda: 1,
    "float": lambda: 1.0,
    "text": lambda: "1",
    "bytes": lambda: b"1",
    "none": lambda: None,
    "nested": lambda: [["a"], "b"],
    "flat": lambda: ["a", "b"],
    "other nesting": lambda: ["a", ["b"]],
    "tuple": lambda: ("a", "b"),
    "mapping": lambda: {"a": "b"},
    "set": lambda: {"a", "b"},
    "dataclass": lambda: Batch(ONES, "a"),
    "dataclass of another name": lambda: Batch(ONES, "b"),
    "function": lambda: scaled,
    "partial": lambda: functools.partial(scaled, factor=2.0),
    "other partial": lambda: functools.partial(scaled, factor=3.0),
    "enclosing": lambda: enclosing(1),
    "enclosing another": lambda: enclosing(2),
    "module": lambda: nn.CrossEntropyLoss(label_smoothing=0.1),
    "other module": lambda: nn.BCEWithLogitsLoss(),
    "weighted module": lambda: nn.CrossEntropyLoss(torch.ones(3)),
    "builtin": lambda: len,
    "class": lambda: Batch,
    "method": lambda: [1].append,
}


def test_different_contents_differ_and_equal_ones_do_not():
    digests = {name: digest_of(make()) for name, make in DIFFERENT.items()}
    assert len(set(digests.values())) == len(digests)
    assert digests == {name: digest_of(make()) for name, make in DIFFERENT.items()}


def test_values_are_not_run_together():
    assert digest_of("a", "b") != digest_of("ab")
    assert digest_of(b"a", b"b") != digest_of(b"ab", b"")


@pytest.mark.parametrize("value", [object(), Loss(2.0), iter([1]), np.random.default_rng(0)])
def test_what_cannot_be_read_is_refused(value):
    with pytest.raises(ConfigError, match="a cache needs to tell one"):
        digest_of([value])


def test_adapters_do_not_count_and_everything_else_does():
    def fresh():
        torch.default_generator.manual_seed(0)
        return Tower().double()

    plain = base_digest(fresh())
    torch.default_generator.manual_seed(0)
    adapted = tower()
    assert base_digest(adapted) == plain
    vl.inject(adapted, "vera", "head", rank=2, name="second")
    assert base_digest(adapted) == plain
    assert base_digest(fresh().float()) != plain
    for change in ("norm.running_var", "norm.num_batches_tracked", "head.bias"):
        model = fresh()
        model.state_dict()[change].view(-1)[0] += 1
        assert base_digest(model) != plain
    other = fresh()
    other.drop = nn.Identity()
    assert base_digest(other) != plain
