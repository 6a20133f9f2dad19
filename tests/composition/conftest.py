"""Plain runs, once for all files."""

import functools

import pytest

from tests.composition.runs import WHOLE, train


@pytest.fixture(scope="session")
def plain(tmp_path_factory):
    """Return a function that gives the run of a case in one process and whole batches."""
    folder = tmp_path_factory.mktemp("plain")
    return functools.cache(lambda case: train(case, folder / case, options=WHOLE))
