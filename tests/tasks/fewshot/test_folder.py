"""Folders of pictures: both layouts are read, and unusable ones are refused in one line."""

import json
from pathlib import Path

import pytest

from tasks.fewshot.datasets import for_validation, limited, load_dataset
from tasks.fewshot.folder import read_folder
from visionlora.errors import ConfigError, DataError, VisionLoraError


def test_one_tree_is_split_the_same_way_every_time(tmp_path, write_images):
    for name in ("red_fox", "cat"):
        write_images(tmp_path / name, 10)
    classes, splits, own = read_folder(tmp_path)
    assert classes == ("cat", "red fox")
    assert own
    assert {split: len(items) for split, items in splits.items()} == {
        "train": 10,
        "val": 4,
        "test": 6,
    }
    again = read_folder(tmp_path)[1]
    assert [i.source for i in again["test"]] == [i.source for i in splits["test"]]
    sources = [item.source for items in splits.values() for item in items]
    assert len(set(sources)) == 20


def test_given_splits_are_used(tmp_path, write_images):
    for split, count in (("train", 4), ("valid", 2), ("test", 3)):
        for name in ("a", "b"):
            write_images(tmp_path / split / name, count)
    classes, splits, own = read_folder(tmp_path)
    assert (classes, own) == (("a", "b"), False)
    assert [len(splits[name]) for name in ("train", "val", "test")] == [8, 4, 6]
    assert {item.label for item in splits["test"]} == {0, 1}


def test_validation_images_are_the_test_where_there_is_no_test(tmp_path, write_images):
    for split in ("train", "val"):
        for name in ("a", "b"):
            write_images(tmp_path / split / name, 2)
    splits = read_folder(tmp_path)[1]
    assert (len(splits["val"]), len(splits["test"])) == (0, 4)


def test_class_names_may_be_given(tmp_path, write_images):
    for name in ("n01", "n02"):
        write_images(tmp_path / name, 2)
    (tmp_path / "classnames.json").write_text(json.dumps({"n01": "goldfish"}))
    assert read_folder(tmp_path)[0] == ("goldfish", "n02")
    (tmp_path / "classnames.json").write_text(json.dumps({"n03": "goldfish"}))
    with pytest.raises(DataError, match="'n03', which is no class"):
        read_folder(tmp_path)


def empty(root: Path, write_images) -> None:
    """Nothing at all."""


def loose(root: Path, write_images) -> None:
    """Images without class folders."""
    write_images(root, 3)


def single(root: Path, write_images) -> None:
    """One class."""
    write_images(root / "only", 3)


def hollow(root: Path, write_images) -> None:
    """A class folder without images."""
    write_images(root / "a", 3)
    (root / "b").mkdir()


def lonely(root: Path, write_images) -> None:
    """A class with one image cannot be split."""
    write_images(root / "a", 3)
    write_images(root / "b", 1)


def no_train(root: Path, write_images) -> None:
    """A test split without a training split."""
    write_images(root / "test" / "a", 3)


def foreign(root: Path, write_images) -> None:
    """A test class that was never trained."""
    for name in ("shoes", "hat"):
        write_images(root / "train" / name, 2)
    write_images(root / "test" / "shoe", 2)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (empty, "holds no images"),
        (loose, "3 images but no class folders"),
        (single, "one class only"),
        (hollow, "class 'b'.*has no images"),
        (lonely, "class 'b'.*at least 2"),
        (no_train, "no train folder"),
        (foreign, "'shoe' is in .*did you mean 'shoes'"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_unusable_folders_are_refused_in_one_line(tmp_path, write_images, build, message):
    build(tmp_path, write_images)
    with pytest.raises(DataError, match=message) as caught:
        read_folder(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("digit", ConfigError, "did you mean 'digits'"),
        ("folder:", DataError, "needs a path"),
        ("folder:/no/such/place", DataError, "does not exist"),
        ("dtdd", ConfigError, "did you mean 'dtd'"),
    ],
)
def test_unknown_data_sets_name_the_nearest(name, error, message):
    with pytest.raises(error, match=message):
        load_dataset(name)


def test_a_bare_folder_is_pointed_to_its_spelling(tmp_path):
    with pytest.raises(VisionLoraError, match="--dataset folder:"):
        load_dataset(str(tmp_path))


def test_digits_are_split_by_writer_and_limited_evenly():
    full = load_dataset("digits")
    assert (len(full.train), len(full.test), len(full.classes)) == (898, 899, 10)
    part = limited(full, 100)
    assert len(part.test) == 100
    assert {item.label for item in part.test} == set(range(10))


def test_validation_never_touches_the_test_images():
    full = load_dataset("digits")
    held_out = for_validation(full)
    train, test = ({id(item) for item in items} for items in (held_out.train, held_out.test))
    assert train | test == {id(item) for item in full.train}
    assert not train & test
    assert {item.label for item in held_out.test} == set(range(10))
