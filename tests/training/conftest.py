"""Settings shared by the tests of the training loop."""

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """Use one thread: equal bits need equal sums, and sums are split by thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
