"""CoOp's folders and split files, built here: every data set's rule, and every refusal."""

import json
import random
from pathlib import Path

import pytest

from tasks.fewshot.coop.splits import read_split_file
from tasks.fewshot.coop.table import ELEVEN, SHIFTED, TRANSFER
from tasks.fewshot.datasets import load_dataset
from tasks.fewshot.sampling import base_and_new, few_shot, restrict
from visionlora.errors import DataError

# Folder, images, split file and template, as the literature states them.
SPLIT_SETS = {
    "caltech101": ("caltech-101", "101_ObjectCategories", "Caltech101", "a photo of a {}."),
    "pets": ("oxford_pets", "images", "OxfordPets", "a photo of a {}, a type of pet."),
    "cars": ("stanford_cars", "", "StanfordCars", "a photo of a {}."),
    "flowers102": ("oxford_flowers", "jpg", "OxfordFlowers", "a photo of a {}, a type of flower."),
    "food101": ("food-101", "images", "Food101", "a photo of {}, a type of food."),
    "sun397": ("sun397", "SUN397", "SUN397", "a photo of a {}."),
    "dtd": ("dtd", "images", "DescribableTextures", "{} texture."),
    "eurosat": ("eurosat", "2750", "EuroSAT", "a centered satellite photo of {}."),
    "ucf101": ("ucf101", "UCF-101-midframes", "UCF101", "a photo of a person doing {}."),
}
OTHER_FOLDERS = {
    "caltech101": ("Caltech101/101_ObjectCategories", "caltech101/101_ObjectCategories"),
    "pets": ("OxfordPets/images", "oxford-iiit-pet/images"),
    "cars": ("StanfordCars",),
    "flowers102": ("Flower102/jpg", "flowers-102/jpg"),
    "food101": ("Food101/images",),
    "sun397": ("SUN397/SUN397", "SUN397"),
    "dtd": ("DTD/images", "dtd/dtd/images"),
    "eurosat": ("EuroSAT/2750",),
    "ucf101": ("UCF101/UCF-101-midframes",),
}
"""Where CLIP-LoRA and torchvision keep the same images."""
CLASSES = ("zebra crossing", "ant", "red_fox", "moth", "bee")
"""Not in alphabetical order: labels decide."""


def rows(per_class: int, start: int) -> list[list]:
    """Entries of a split file, classes interleaved."""
    return [
        [f"c{label}/{number:03d}.png", label, CLASSES[label]]
        for number in range(start, start + per_class)
        for label in (3, 0, 4, 1, 2)
    ]


def write_set(root: Path, folder: str, images: str, split: str) -> Path:
    """Write a data set with five classes in CoOp's layout; empty files stand for images."""
    content = {"train": rows(20, 0), "val": rows(6, 20), "test": rows(3, 26)}
    for label in range(5):
        place = root / folder / images / f"c{label}"
        place.mkdir(parents=True)
        for number in range(29):
            (place / f"{number:03d}.png").touch()
    file = root / folder / f"split_zhou_{split}.json"
    file.write_text(json.dumps(content))
    return file


@pytest.mark.parametrize("name", SPLIT_SETS)
def test_order_names_template_and_split_are_those_of_the_file(tmp_path, name):
    folder, images, split, template = SPLIT_SETS[name]
    write_set(tmp_path, folder, images, split)
    dataset = load_dataset(name, tmp_path)
    assert dataset.split == "zhou"
    assert dataset.classes == ("zebra crossing", "ant", "red fox", "moth", "bee")
    assert dataset.templates == (template,)
    for items, expected in ((dataset.train, rows(20, 0)), (dataset.test, rows(3, 26))):
        paths = [[str(i.source.relative_to(tmp_path / folder / images)), i.label] for i in items]
        assert paths == [row[:2] for row in expected]


@pytest.mark.parametrize("name", SPLIT_SETS)
def test_halves_and_shots_follow_the_published_procedure(tmp_path, name):
    folder, images, split, _ = SPLIT_SETS[name]
    write_set(tmp_path, folder, images, split)
    dataset = load_dataset(name, tmp_path)
    state = random.getstate()
    random.seed(2)
    expected = []
    for label in (3, 0, 4, 1, 2):  # order of first appearance
        group = [row for row in rows(20, 0) if row[1] == label]
        expected += [row[0] for row in random.sample(group, 16)]
    random.setstate(state)
    drawn, val = few_shot(dataset.train, dataset.val, 16, seed=2)
    found = [str(item.source.relative_to(tmp_path / folder / images)) for item in drawn]
    assert found == expected
    assert len(val) == 5 * 4
    base, new = base_and_new(len(dataset.classes))
    assert (list(base), list(new)) == ([0, 1, 2], [3, 4])
    half = restrict(drawn, new)
    assert {item.label for item in half} == {0, 1}
    assert [item.source for item in half] == [item.source for item in drawn if item.label >= 3]


@pytest.mark.parametrize(
    ("name", "place"), [(name, place) for name, places in OTHER_FOLDERS.items() for place in places]
)
def test_the_folders_of_other_projects_are_found(tmp_path, name, place):
    folder, images, split, _ = SPLIT_SETS[name]
    file = write_set(tmp_path / "made", folder, images, split)
    (tmp_path / "data" / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "made" / folder / images).rename(tmp_path / "data" / place)
    root = tmp_path / "data"
    if file.exists():
        (root / file.name).write_bytes(file.read_bytes())
    else:  # the images were moved with it
        (root / place / file.name).rename(root / file.name)
    dataset = load_dataset(name, root)
    assert dataset.split == "zhou"
    assert dataset.train[0].source == root / place / "c3" / "000.png"


def test_the_folder_of_coop_comes_first(tmp_path):
    write_set(tmp_path, "dtd", "images", "DescribableTextures")
    write_set(tmp_path, "DTD", "images", "DescribableTextures")
    assert load_dataset("dtd", tmp_path).train[0].source.is_relative_to(tmp_path / "dtd")


def test_pickled_shots_are_not_opened(tmp_path):
    write_set(tmp_path, "dtd", "images", "DescribableTextures")
    cache = tmp_path / "dtd" / "split_fewshot"
    cache.mkdir()
    (cache / "shot_16-seed_1.pkl").write_bytes(b"not a pickle: opening it would fail")
    drawn, _ = few_shot(load_dataset("dtd", tmp_path).train, [], 16, seed=1)
    assert len(drawn) == 5 * 16


@pytest.mark.parametrize("name", SPLIT_SETS)
def test_a_missing_split_file_is_named_with_its_folder(tmp_path, name):
    folder, images, split, _ = SPLIT_SETS[name]
    write_set(tmp_path, folder, images, split).unlink()
    with pytest.raises(DataError) as caught:
        load_dataset(name, tmp_path)
    message = str(caught.value)
    assert f"{folder}/split_zhou_{split}.json" in message
    assert "--own-split" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c.pop("test"), "not a CoOp split file"),
        (lambda c: c["train"].append(["x.png", "two"]), "not a CoOp split file"),
        (lambda c: c["train"].append(["c0/000.png", 7, "yak"]), "expected 0, 1, 2"),
        (lambda c: c["train"].append(["c0/000.png", 1, "yak"]), "class 1 both 'ant' and 'yak'"),
        (lambda c: c["test"].clear(), "no test images"),
        (lambda c: c["val"].append(["fox/000.png", 2, "red_fox"]), "names fox, which is not in"),
        (lambda c: [row.__setitem__(0, f"c{row[1]}/none.png") for row in c["test"]], "none.png"),
    ],
)
def test_split_files_that_cannot_be_used_are_refused_in_one_line(tmp_path, damage, message):
    file = write_set(tmp_path, "dtd", "images", "DescribableTextures")
    content = json.loads(file.read_text())
    damage(content)
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message) as caught:
        load_dataset("dtd", tmp_path)
    assert "\n" not in str(caught.value)


def test_text_that_is_no_json_is_no_split(tmp_path):
    (tmp_path / "split.json").write_text("<html>quota exceeded</html>")
    with pytest.raises(DataError, match="not a CoOp split file"):
        read_split_file(tmp_path / "split.json", tmp_path)


def test_a_set_that_is_nowhere_names_every_expected_folder(tmp_path):
    (tmp_path / "split_zhou_UCF101.json").write_text("{}")
    with pytest.raises(DataError, match="ucf101 cannot be downloaded") as caught:
        load_dataset("ucf101", tmp_path)
    for folder in ("ucf101", "UCF101"):
        assert str(tmp_path / folder / "UCF-101-midframes") in str(caught.value)


WNIDS = ("n01", "n02", "n05", "n07")
NAMES = ("missile", "goldfish", "great white shark", "missile")


def imagenet(root: Path, images: str = "imagenet/images") -> None:
    """Write ImageNet with four classes, two of the same name, as in the published list."""
    for part, count in (("train", 3), ("val", 2)):
        for wnid in WNIDS:
            folder = root / images / part / wnid
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{wnid}_{number}.JPEG").touch()
    lines = [f"{wnid} {name}\n" for wnid, name in zip(WNIDS, NAMES, strict=True)]
    (root / "imagenet" / "classnames.txt").write_text("".join(reversed(lines)))


@pytest.mark.parametrize("images", ["imagenet/images", "imagenet"])
def test_imagenet_is_tested_on_its_validation_images(tmp_path, images):
    imagenet(tmp_path, images)
    dataset = load_dataset("imagenet", tmp_path)
    assert dataset.classes == NAMES
    assert dataset.templates == ("a photo of a {}.",)
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (12, 0, 8)
    assert dataset.split == "official"
    assert dataset.train[3].source.name == "n02_0.JPEG"
    assert dataset.train[3].label == 1


def test_sets_with_their_own_lists_are_drawn_and_halved_by_the_same_rule(tmp_path):
    imagenet(tmp_path)
    dataset = load_dataset("imagenet", tmp_path)
    drawn, val = few_shot(dataset.train, dataset.val, 2, seed=3)
    rng = random.Random(3)
    expected = [
        name
        for wnid in WNIDS
        for name in rng.sample([f"{wnid}_{number}.JPEG" for number in range(3)], 2)
    ]
    assert [item.source.name for item in drawn] == expected
    assert val == []  # its validation images are the test images
    base, new = base_and_new(len(dataset.classes))
    assert [dataset.classes[label] for label in base] == ["missile", "goldfish"]
    half = restrict(dataset.test, new)
    assert [(item.source.name, item.label) for item in half] == [
        ("n05_0.JPEG", 0), ("n05_1.JPEG", 0), ("n07_0.JPEG", 1), ("n07_1.JPEG", 1)
    ]  # fmt: skip


def shifted(root: Path, folder: str, classes: tuple[str, ...]) -> None:
    """Write a variant of ImageNet with a stray text file."""
    for name in classes:
        (root / folder / name).mkdir(parents=True)
        (root / folder / name / "a.jpg").touch()
    (root / folder / "README.txt").write_text("read me")


@pytest.mark.parametrize(
    ("name", "folder", "classes", "spoken"),
    [
        (
            "imagenetv2",
            "imagenetv2/imagenetv2-matched-frequency-format-val",
            ("0", "1", "2", "3"),
            NAMES[::-1],  # the order of the lines
        ),
        ("imagenet-sketch", "imagenet-sketch/images", WNIDS, NAMES),
        ("imagenet-a", "imagenet-adversarial/imagenet-a", ("n02", "n05"), NAMES[1:3]),
        ("imagenet-r", "imagenet-rendition/imagenet-r", ("n05", "n07"), NAMES[2:]),
    ],
)
def test_variants_of_imagenet_count_their_own_classes(tmp_path, name, folder, classes, spoken):
    imagenet(tmp_path)
    shifted(tmp_path, folder, classes)
    for place in ("imagenet", folder.partition("/")[0]):  # ImageNet's list, then one of its own
        (tmp_path / place / "classnames.txt").write_bytes(
            (tmp_path / "imagenet" / "classnames.txt").read_bytes()
        )
        dataset = load_dataset(name, tmp_path)
        assert dataset.classes == spoken
        assert dataset.templates == ("a photo of a {}.",)
        assert [item.label for item in dataset.test] == list(range(len(classes)))
        assert dataset.train == []


def test_class_names_that_do_not_match_the_folders_are_refused(tmp_path):
    imagenet(tmp_path)
    for part in ("train", "val"):
        (tmp_path / "imagenet" / "images" / part / "n09").mkdir()
    with pytest.raises(DataError, match=r"class folder 'n09' .* has no line in classnames.txt"):
        load_dataset("imagenet", tmp_path)
    shifted(tmp_path, "imagenetv2/imagenetv2-matched-frequency-format-val", ("0", "1", "3"))
    with pytest.raises(DataError, match=r"names 4 classes, but there is no folder .*/2$"):
        load_dataset("imagenetv2", tmp_path)
    (tmp_path / "imagenet" / "classnames.txt").unlink()
    with pytest.raises(DataError, match=r"no .*classnames.txt"):
        load_dataset("imagenet", tmp_path)


@pytest.mark.parametrize("folder", ["fgvc_aircraft", "fgvc-aircraft-2013b/data"])
def test_aircraft_reads_its_text_files(tmp_path, folder):
    home = tmp_path / folder
    (home / "images").mkdir(parents=True)
    (home / "variants.txt").write_text("A300B4\nDC-3\nF-16A/B\n")
    for part, numbers in (("train", (11, 12)), ("val", (13,)), ("test", (14, 15))):
        lines = [f"00{n} {v}" for n in numbers for v in ("F-16A/B", "A300B4")]
        (home / f"images_variant_{part}.txt").write_text("\n".join(lines))
    dataset = load_dataset("aircraft", tmp_path)
    assert dataset.classes == ("A300B4", "DC-3", "F-16A/B")
    assert dataset.templates == ("a photo of a {}, a type of aircraft.",)
    assert dataset.split == "official"
    assert [item.label for item in dataset.test] == [2, 0, 2, 0]
    assert dataset.val[0].source == home / "images" / "0013.jpg"
    (home / "images_variant_val.txt").write_text("0013 F-16AB\n")
    with pytest.raises(DataError, match=r"'F-16AB', which is not in variants.txt .*F-16A/B"):
        load_dataset("aircraft", tmp_path)


def test_the_benchmark_has_eleven_sets_ten_targets_and_four_shifts():
    assert (len(ELEVEN), len(TRANSFER), len(SHIFTED)) == (11, 10, 4)
    assert set(SPLIT_SETS) | {"imagenet", "aircraft"} == set(ELEVEN)
