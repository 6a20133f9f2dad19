"""Training images: unreadable ones are replaced, and every batch is a function of its number."""

import pytest
import torch

from tasks.fewshot.datasets import load_dataset
from tasks.fewshot.images import Transform
from tasks.fewshot.shots import Batches, Shots, load_shots
from visionlora.errors import DataError

TRANSFORM = Transform(16, (0.5,) * 3, (0.5,) * 3)


@pytest.fixture
def folder(tmp_path, write_images):
    """Two classes with four training and two test images each."""
    for split, count in (("train", 4), ("test", 2)):
        for name in ("cat", "dog"):
            write_images(tmp_path / split / name, count)
    return tmp_path


def load(folder, shots: int, **options) -> Shots:
    """Load the shots of seed 1."""
    return load_shots(load_dataset(f"folder:{folder}"), shots, 1, TRANSFORM, "none", **options)


def test_an_unreadable_shot_is_replaced_by_another_one_of_its_class(folder):
    for file in list((folder / "train" / "cat").iterdir())[:2]:
        file.write_bytes(b"")
    shots = load(folder, 2)
    assert torch.bincount(shots.labels).tolist() == [2, 2]
    assert all("cat" in reason for reason in shots.skipped)
    shots = load(folder, 4)
    assert torch.bincount(shots.labels).tolist() == [2, 4]
    assert len(shots.skipped) == 2


def test_unreadable_shots_do_not_change_the_other_classes(folder):
    before = load(folder, 2)
    for file in (folder / "train" / "cat").iterdir():
        if file.name != "000.png":
            file.write_bytes(b"")
    after = load(folder, 2)
    dogs = [
        [image for image, label in zip(shots.images, shots.labels, strict=True) if label == 1]
        for shots in (before, after)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*dogs, strict=True))


def test_a_class_without_readable_images_is_an_error(folder):
    for file in (folder / "train" / "cat").iterdir():
        file.write_bytes(b"")
    with pytest.raises(DataError, match="'cat' has no readable training image"):
        load(folder, 2)
    assert len(load(folder, 2, labels=range(1, 2)).images) == 2


def test_restricting_keeps_the_draw():
    digits = load_dataset("digits")
    full = load_shots(digits, 4, 3, TRANSFORM, "none")
    part = load_shots(digits, 4, 3, TRANSFORM, "none", labels=range(5, 10))
    chosen = [i for i, label in enumerate(full.labels) if label >= 5]
    assert torch.equal(part.labels, full.labels[chosen] - 5)
    assert all(
        torch.equal(full.images[i], image) for i, image in zip(chosen, part.images, strict=True)
    )


def test_batches_are_functions_of_their_number():
    shots = load_shots(load_dataset("digits"), 4, 1, TRANSFORM, "shift")
    first, second = (Batches(shots, 16, 8, "shift", seed=1) for _ in range(2))
    expected = [first(step) for step in range(6)]
    for step in (4, 0, 5):
        images, labels = second(step)
        assert torch.equal(images, expected[step][0])
        assert torch.equal(labels, expected[step][1])


def test_one_epoch_sees_every_image_once():
    shots = Shots(list(torch.zeros(12, 3, 16, 16)), torch.arange(12), [], [])
    batches = Batches(shots, 16, 4, "none", seed=1)
    assert sorted(torch.cat([batches(step)[1] for step in range(3)]).tolist()) == list(range(12))


def test_fewer_images_than_a_batch_make_a_smaller_batch():
    shots = Shots(list(torch.zeros(3, 3, 16, 16)), torch.arange(3), [], [])
    assert len(Batches(shots, 16, 32, "none", seed=1)(0)[1]) == 3
