"""Settings of the whole suite: one thread and a fixed seed per test, no network."""

import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    """Sums are split by thread, so equal bits need one; sizes here are too small for more."""
    torch.set_num_threads(1)
    torch.default_generator.manual_seed(0)  # torch.manual_seed takes 5 ms without a GPU
