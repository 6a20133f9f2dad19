"""Pictures and a small backbone for the few-shot tests."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import open_clip
import pytest
from PIL import Image


def _write_images(folder: Path, count: int, size: tuple[int, int] = (24, 20)) -> None:
    """Write small pictures of noise, JPEG and PNG in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(str(folder)))
    for index in range(count):
        pixels = rng.integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03d}.{'jpg' if index % 2 else 'png'}")


@pytest.fixture
def write_images() -> Callable[..., None]:
    """Return `write_images(folder, count)`, which writes small PNG and JPEG files in turn."""
    return _write_images


@pytest.fixture
def small_backbone(tmp_path_factory) -> Iterator[str]:
    """Register a small ViT in open_clip under the name that is returned."""
    config = {
        "embed_dim": 32,
        "vision_cfg": {
            "image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16
        },
        "text_cfg": {
            "context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2
        },
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("open_clip")
    (folder / "ViT-test-small.json").write_text(json.dumps(config))
    registered = open_clip.factory._MODEL_CONFIGS
    before = dict(registered)
    open_clip.add_model_config(folder)
    yield "ViT-test-small"
    registered.clear()
    registered.update(before)
