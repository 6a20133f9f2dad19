"""Own splits and downloads of public data sets: asked for, labelled, kept, and always the same."""

import json

import numpy as np
import pytest

from tasks.fewshot.datasets import load_dataset
from visionlora.errors import DataError


def test_downloaded_eurosat_gets_long_names_and_an_own_split(tmp_path, write_images):
    for name in ("AnnualCrop", "Forest", "SeaLake"):
        write_images(tmp_path / "eurosat" / "2750" / name, 10)
    dataset = load_dataset("eurosat", tmp_path, own_split=True)
    assert dataset.classes == ("Annual Crop Land", "Forest", "Sea or Lake")
    assert dataset.split == "own"
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (15, 6, 9)
    assert dataset.templates == ("a centered satellite photo of {}.",)


def test_an_own_split_is_kept_and_made_the_same_way_again(tmp_path, write_images):
    for name in ("banded", "dotted"):
        write_images(tmp_path / "dtd" / "dtd" / "images" / name, 10)
    made = load_dataset("dtd", tmp_path, own_split=True)
    file = tmp_path / "dtd" / "dtd" / "split_visionlora_DescribableTextures.json"
    content = json.loads(file.read_text())
    assert content["train"][0][1:] == [0, "banded"]
    for _ in ("read back", "made again"):
        again = load_dataset("dtd", tmp_path, own_split=True)
        for part in ("train", "val", "test"):
            first, second = getattr(made, part), getattr(again, part)
            assert [(i.source, i.label) for i in first] == [(i.source, i.label) for i in second]
        file.unlink()
    sources = [item.source for part in (made.train, made.val, made.test) for item in part]
    assert len(set(sources)) == len(sources) == 20


def test_an_own_split_can_be_made_on_a_disk_that_cannot_be_written(
    tmp_path, write_images, monkeypatch
):
    for name in ("banded", "dotted"):
        write_images(tmp_path / "dtd" / "images" / name, 4)

    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.mkstemp", full)
    assert load_dataset("dtd", tmp_path, own_split=True).split == "own"
    assert not list((tmp_path / "dtd").glob("*.json"))


def test_caltech_drops_and_renames(tmp_path, write_images):
    images = tmp_path / "caltech101" / "101_ObjectCategories"
    for name in ("BACKGROUND_Google", "Faces", "Faces_easy", "Motorbikes", "ant"):
        write_images(images / name, 4)
    dataset = load_dataset("caltech101", tmp_path, own_split=True)
    assert dataset.classes == ("face", "motorbike", "ant")
    assert {item.source.parent.name for item in dataset.train} == {"Faces", "Motorbikes", "ant"}


def test_pets_keep_their_test_images_and_give_a_fifth_for_validation(tmp_path, write_images):
    lists = tmp_path / "oxford-iiit-pet" / "annotations"
    lists.mkdir(parents=True)
    (tmp_path / "oxford-iiit-pet" / "images").mkdir()
    breeds = ("Abyssinian", "german_shorthaired")
    for part, numbers in (("trainval", range(10)), ("test", range(10, 16))):
        rows = [f"{name}_{n} {y} 1 1" for y, name in enumerate(breeds, 1) for n in numbers]
        (lists / f"{part}.txt").write_text("\n".join(["#Image CLASS-ID", *rows]))
    dataset = load_dataset("pets", tmp_path, own_split=True)
    assert dataset.classes == ("abyssinian", "german shorthaired")
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (16, 4, 12)
    assert dataset.test[0].source.name == "Abyssinian_10.jpg"


def test_cars_put_the_year_first(tmp_path):
    scipy = pytest.importorskip("scipy.io")
    home = tmp_path / "stanford_cars"
    (home / "devkit").mkdir(parents=True)
    (home / "cars_train").mkdir()
    names = np.array(["AM General Hummer SUV 2000", "Acura RL Sedan 2012"], dtype=object)
    scipy.savemat(home / "devkit" / "cars_meta.mat", {"class_names": names[None]})
    for file, count in (("devkit/cars_train_annos", 10), ("cars_test_annos_withlabels", 4)):
        rows = np.zeros((1, count), dtype=[("class", object), ("fname", object)])
        for i in range(count):
            rows[0, i] = (i % 2 + 1, f"{i:05d}.jpg")
        scipy.savemat(home / f"{file}.mat", {"annotations": rows})
    dataset = load_dataset("cars", tmp_path, own_split=True)
    assert dataset.classes == ("2000 AM General Hummer SUV", "2012 Acura RL Sedan")
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (8, 2, 4)
    assert dataset.test[1].source == home / "cars_test" / "00001.jpg"
    assert dataset.test[1].label == 1


def test_flowers_are_pooled_by_their_label_file(tmp_path):
    scipy = pytest.importorskip("scipy.io")
    home = tmp_path / "oxford_flowers"
    (home / "jpg").mkdir(parents=True)
    scipy.savemat(home / "imagelabels.mat", {"labels": np.array([[1, 2] * 10])})
    (home / "cat_to_name.json").write_text(
        '{"1": "pink primrose", "2": "hard-leaved pocket orchid"}'
    )
    dataset = load_dataset("flowers102", tmp_path, own_split=True)
    assert dataset.classes == ("pink primrose", "hard-leaved pocket orchid")
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (10, 4, 6)
    numbers = {int(item.source.stem.removeprefix("image_")): item.label for item in dataset.test}
    assert all(label == (number + 1) % 2 for number, label in numbers.items())


def test_sun_reads_its_lists_and_names_places_backwards(tmp_path):
    home = tmp_path / "sun397"
    (home / "SUN397").mkdir(parents=True)
    (home / "ClassName.txt").write_text("/a/abbey\n/c/church/indoor\n")
    rows = ["/a/abbey/sun_{}.jpg", "/c/church/indoor/sun_{}.jpg"]
    (home / "Training_01.txt").write_text("\n".join(r.format(i) for i in range(5) for r in rows))
    (home / "Testing_01.txt").write_text("\n".join(r.format(i) for i in (5, 6) for r in rows))
    dataset = load_dataset("sun397", tmp_path, own_split=True)
    assert dataset.classes == ("abbey", "indoor church")
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (8, 2, 4)
    assert dataset.test[1].source == home / "SUN397" / "c" / "church" / "indoor" / "sun_5.jpg"


def test_ucf_takes_the_first_official_split_and_parts_the_words(tmp_path):
    home = tmp_path / "ucf101"
    (home / "UCF-101-midframes").mkdir(parents=True)
    (home / "ucfTrainTestlist").mkdir()
    actions = ("ApplyLipstick", "TaiChi")
    lines = [f"{y} {name}" for y, name in enumerate(actions, 1)]
    (home / "ucfTrainTestlist" / "classInd.txt").write_text("\n".join(lines))
    for part, numbers in (("trainlist", range(5)), ("testlist", range(5, 8))):
        rows = [f"{name}/v_{name}_g{n}.avi 1" for name in actions for n in numbers]
        (home / "ucfTrainTestlist" / f"{part}01.txt").write_text("\n".join(rows))
    dataset = load_dataset("ucf101", tmp_path, own_split=True)
    assert dataset.classes == ("Apply Lipstick", "Tai Chi")
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (8, 2, 6)
    assert dataset.test[0].source == (
        home / "UCF-101-midframes" / "Apply_Lipstick" / "v_ApplyLipstick_g5.jpg"
    )


@pytest.mark.parametrize("name", ["pets", "cars", "flowers102", "sun397", "ucf101"])
def test_no_own_split_without_the_lists_of_the_data_set(tmp_path, name):
    for folder in ("oxford_pets/images", "stanford_cars/cars_train", "oxford_flowers/jpg",
                   "sun397/SUN397", "ucf101/UCF-101-midframes"):  # fmt: skip
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(DataError, match=f"no own split of {name}: .* is missing") as caught:
        load_dataset(name, tmp_path, own_split=True)
    assert "\n" not in str(caught.value)


def test_failed_download_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    root = tmp_path / "data"
    with pytest.raises(DataError, match="cannot download eurosat") as caught:
        load_dataset("eurosat", root, own_split=True)
    assert "\n" not in str(caught.value)
    assert not root.exists()
