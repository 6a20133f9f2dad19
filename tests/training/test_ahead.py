"""Workers decide when a sample is made, never which; their errors keep their message."""

import pytest

from visionlora.errors import ConfigError, DataError
from visionlora.training.ahead import Ahead


def numbers(step):
    return [2 * step, 2 * step + 1]


def square(number):
    if number == 9:
        raise DataError("sample 9 cannot be read")
    return number * number


@pytest.mark.parametrize("workers", [0, 1])
def test_a_step_has_its_samples_whatever_was_asked_before(workers):
    ahead = Ahead(square, numbers, workers)
    for step in (1, 2, 0):
        assert ahead(step) == [square(number) for number in numbers(step)]
    with pytest.raises(DataError, match=r"^sample 9 cannot be read$"):
        ahead(4)
    ahead.close()
    assert ahead(0) == [0, 1]
    ahead.close()


def test_a_negative_number_of_workers_is_refused():
    with pytest.raises(ConfigError, match="got -1"):
        Ahead(square, numbers, -1)
