"""Real pictures, which tests use where they are at hand."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "restoration"


@pytest.fixture(scope="session")
def restoration_data() -> Path:
    """Folder of real noisy, rainy and hazy pairs and of clean test pictures."""
    if not ROOT.is_dir():
        pytest.skip(f"the real restoration pictures are not at {ROOT}")
    return ROOT
