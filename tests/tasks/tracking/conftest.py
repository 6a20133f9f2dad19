"""What the tracking tests share: the sequences and golden fixtures outside the repository."""

from pathlib import Path

import numpy as np
import pytest

DATA = Path(__file__).parents[4] / "shared" / "data" / "tracking"


@pytest.fixture(scope="session")
def tracking_data() -> Path:
    """The folder of real sequences and golden fixtures; tests that use it are marked `data`."""
    if not (DATA / "fixtures").is_dir():
        pytest.skip(f"no tracking data in {DATA}")
    return DATA


@pytest.fixture(scope="session")
def lorat_ops(tracking_data: Path) -> dict[str, np.ndarray]:
    """Crops, labels, losses and post-processing as the official implementation computes them."""
    with np.load(tracking_data / "fixtures" / "lorat_ops.npz") as stored:
        return dict(stored)
