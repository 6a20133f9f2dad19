"""Public data sets: CoOp's split files and torchvision's folders are read; downloads may fail."""

import json

import pytest

from tasks.fewshot.datasets import load_dataset
from visionlora.errors import DataError


def test_split_file_of_coop_is_read_as_it_is(tmp_path, write_images):
    folder = tmp_path / "caltech-101"
    write_images(folder / "101_ObjectCategories" / "crab", 3)
    content = {
        "train": [["crab/000.png", 1, "crab"], ["ant/1.png", 0, "red_ant"]],
        "val": [["crab/001.jpg", 1, "crab"]],
        "test": [["crab/002.png", 1, "crab"]],
    }
    (folder / "split_zhou_Caltech101.json").write_text(json.dumps(content))
    dataset = load_dataset("caltech101", tmp_path)
    assert dataset.split == "zhou"
    assert dataset.classes == ("red ant", "crab")
    assert [item.label for item in dataset.train] == [1, 0]
    assert dataset.test[0].source == folder / "101_ObjectCategories" / "crab" / "002.png"


def test_broken_split_file_is_refused(tmp_path):
    folder = tmp_path / "dtd"
    folder.mkdir()
    (folder / "split_zhou_DescribableTextures.json").write_text('{"train": []}')
    with pytest.raises(DataError, match="not a CoOp split file"):
        load_dataset("dtd", tmp_path)


def test_downloaded_eurosat_gets_long_names_and_an_own_split(tmp_path, write_images):
    for name in ("AnnualCrop", "Forest", "SeaLake"):
        write_images(tmp_path / "eurosat" / "2750" / name, 10)
    dataset = load_dataset("eurosat", tmp_path)
    assert dataset.classes == ("Annual Crop Land", "Forest", "Sea or Lake")
    assert dataset.split == "own"
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (15, 6, 9)
    assert dataset.templates == ("a centered satellite photo of {}.",)


def test_downloaded_textures_are_pooled_and_split_again(tmp_path, write_images):
    images, labels = tmp_path / "dtd" / "dtd" / "images", tmp_path / "dtd" / "dtd" / "labels"
    labels.mkdir(parents=True)
    for name in ("banded", "dotted"):
        write_images(images / name, 10)
    for part, numbers in (("train", (0, 1, 2)), ("val", (3, 4, 5)), ("test", (6, 7, 8, 9))):
        lines = [
            f"{name}/{n:03d}.{'jpg' if n % 2 else 'png'}\n"
            for name in ("banded", "dotted")
            for n in numbers
        ]
        (labels / f"{part}1.txt").write_text("".join(lines))
    dataset = load_dataset("dtd", tmp_path)
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (10, 4, 6)
    assert all(item.source.parent.name == dataset.classes[item.label] for item in dataset.test)


def test_sets_without_download_name_the_expected_files(tmp_path):
    with pytest.raises(DataError, match=r"cannot be downloaded; expected .*StanfordCars\.json"):
        load_dataset("cars", tmp_path)


def test_failed_download_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    root = tmp_path / "data"
    with pytest.raises(DataError, match="cannot download eurosat") as caught:
        load_dataset("eurosat", root)
    assert "\n" not in str(caught.value)
    assert not root.exists()
