"""The functions behind the page: pictures, division, adaptation, tabs, words."""

import io
import stat
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tasks.fewshot import adapter_zip
from tasks.fewshot import predict as command
from tasks.fewshot.adapter_files import TENSORS
from tasks.fewshot.adapter_zip import pack, unpacked
from tasks.fewshot.app import pictures as given
from tasks.fewshot.app import wording
from tasks.fewshot.app.engine import Cancelled, Engine, Settings
from tasks.fewshot.app.holdout import MAX_ROUNDS, plan
from tasks.fewshot.app.pictures import Pictures, from_rows, from_zip, readable
from tasks.fewshot.app.serve import AppConfig
from tasks.fewshot.app.session import Session, Sessions
from tasks.fewshot.datasets import DIGIT_NAMES, digits
from tasks.fewshot.predictions import Prediction
from visionlora.errors import AdapterFileError, ConfigError, DataError

NAMES = DIGIT_NAMES[:3]


def write_digits(folder: Path, count: int, names=NAMES, first: int = 0) -> dict[str, list[Path]]:
    """Write `count` real digits per class as files, and return them by class."""
    tree: dict[str, list[Path]] = {}
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        items = [item for item in digits().train if item.label == label][first : first + count]
        for index, item in enumerate(items):
            file = folder / name / f"{name}_{index}.png"
            Image.fromarray(item.source).save(file)
            tree.setdefault(name, []).append(file)
    return tree


def zipped(file: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file


def silent(done: float, text: str) -> None:
    """Nobody listens."""


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(device="cpu")


@pytest.fixture(scope="module")
def adapted(engine, tmp_path_factory):
    """An adapter after a few steps on eight digits of three classes."""
    folder = tmp_path_factory.mktemp("adapted")
    tree = write_digits(folder / "pictures", 12)
    settings = Settings(shots=8, steps=40, template="a photo of {}.")
    return engine.adapt(readable(tree), settings, folder / "work", silent, threading.Event())


def test_adapting_beats_zero_shot_on_pictures_it_has_not_seen(adapted):
    assert adapted.scores is not None
    assert len(adapted.scores.labels) == 3 * (12 - 8)
    assert adapted.scores.accuracy() >= adapted.zero_shot.accuracy()
    assert adapted.scores.accuracy() > 80
    assert "not trained on" in adapted.sentence


def test_the_download_predicts_on_the_command_line_what_the_page_predicts(
    engine, adapted, tmp_path
):
    tree = write_digits(tmp_path / "new", 5, first=50)
    files = [file for group in tree.values() for file in group]
    (tmp_path / "new" / "bad.png").write_bytes(b"no picture")
    on_page = engine.predict(adapted.folder, [*files, tmp_path / "new" / "bad.png"])
    assert [bool(item.error) for item in on_page] == [False] * 15 + [True]
    file = pack(adapted.folder, tmp_path / "adapter.zip")
    config = {"adapter": str(file), "images": str(tmp_path / "new"), "output": str(tmp_path / "o")}
    command.run(command.PredictConfig(**config))
    lines = (tmp_path / "o" / "predictions.csv").read_text().splitlines()[1:]
    rows = {Path(line.split(",")[0]).name: line.split(",") for line in lines}
    for item in on_page[:-1]:
        assert rows[item.file.name][1] == item.names[0]
        assert float(rows[item.file.name][2]) == pytest.approx(item.probabilities[0], abs=1e-4)


def test_probabilities_are_sorted_and_add_up(engine, adapted, tmp_path):
    files = write_digits(tmp_path, 4)["two"]
    for item in engine.predict(adapted.folder, files):
        assert sorted(item.probabilities, reverse=True) == list(item.probabilities)
        assert sum(item.probabilities) == pytest.approx(1, abs=1e-5)
        assert len(item.names) == 3


def test_nothing_stays_in_the_backbone(engine, adapted, tmp_path):
    clip = engine.backbone.clip
    before = {name: value.clone() for name, value in clip.state_dict().items()}
    settings = Settings(steps=2, measure="none")
    tree = write_digits(tmp_path / "pictures", 2)
    engine.adapt(readable(tree), settings, tmp_path / "work", silent, threading.Event())
    engine.predict(adapted.folder, tree["one"])
    after = clip.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_progress_comes_with_an_estimate_and_ends_at_one(engine, tmp_path):
    told: list[tuple[float, str]] = []
    tree = write_digits(tmp_path / "pictures", 3)
    settings = Settings(steps=2, measure="cross-validation")
    engine.adapt(
        readable(tree),
        settings,
        tmp_path / "work",
        lambda done, text: told.append((done, text)),
        threading.Event(),
    )
    shares = [done for done, _ in told]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0, 1)
    assert told[0][1] == "training 1 of 4, step 0 of 2"
    assert "about" in told[1][1]
    assert len(told) == 4 * (1 + 2)


def test_a_cancelled_run_ends_within_a_step_and_leaves_the_backbone_clean(engine, tmp_path):
    cancel = threading.Event()
    seen: list[str] = []

    def tell(done: float, text: str) -> None:
        seen.append(text)
        if "step 2 of" in text:
            cancel.set()

    before = {name: value.clone() for name, value in engine.backbone.clip.state_dict().items()}
    with pytest.raises(Cancelled):
        engine.adapt(
            readable(write_digits(tmp_path / "pictures", 4)),
            Settings(steps=50),
            tmp_path / "work",
            tell,
            cancel,
        )
    assert len(seen) == 3
    assert not list((tmp_path / "work").rglob(TENSORS))
    after = engine.backbone.clip.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not engine.backbone.clip.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(method="block-lore"), "did you mean 'block-lora'"),
        (Settings(template="a photo"), "must hold '{}'"),
        (Settings(template="/etc/a.txt"), "must hold '{}' once, for the class name; got '/etc/a"),
        (Settings(lr=-1.0), "must be positive"),
        (Settings(steps=-3), "must be at least 1"),
        (Settings(shots=0), "must be at least 1"),
    ],
)
def test_unusable_settings_are_refused_in_one_line(engine, tmp_path, settings, message):
    tree = readable(write_digits(tmp_path / "pictures", 2))
    with pytest.raises(ConfigError) as caught:
        engine.adapt(tree, settings, tmp_path / "work", silent, threading.Event())
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_backbone_without_a_text_tower_is_refused():
    with pytest.raises(ConfigError, match="no text tower"):
        Engine("timm:resnet18")


def division(counts: list[int], shots: int, measure: str):
    tree = {f"c{i}": [Path(f"{i}/{n}") for n in range(count)] for i, count in enumerate(counts)}
    return plan(tree, shots, measure)


@pytest.mark.parametrize("counts", [[6, 9], [30, 7, 100]])
def test_held_out_pictures_never_train(counts):
    found = division(counts, 16, "automatic")
    train, test = ({item.source for item in part} for part in (found.final.train, found.final.test))
    assert found.rounds == []
    assert not train & test
    assert len(train | test) == sum(counts)
    for label, count in enumerate(counts):
        trained = sum(item.label == label for item in found.final.train)
        assert trained == min(16, count - count // 3)
    assert f"{len(test)} pictures" in found.sentence


@pytest.mark.parametrize("counts", [[2, 3], [5, 4], [2, 12]])
def test_cross_validation_tests_every_picture_once_unseen(counts):
    found = division(counts, 16, "automatic")
    rounds = min(max(counts), MAX_ROUNDS)
    assert len(found.rounds) == rounds
    tested = [item.source for part in found.rounds for item in part.test]
    assert len(tested) == len(set(tested)) == sum(counts)
    for part in found.rounds:
        assert not {item.source for item in part.train} & {item.source for item in part.test}
        assert {item.label for item in part.train} == set(range(len(counts)))
    assert len(found.final.train) == sum(counts)
    assert found.sentence.startswith("Leave-one-out" if max(counts) <= MAX_ROUNDS else "5-fold")


def test_one_picture_of_a_class_is_said_to_be_too_few_for_a_figure():
    found = division([1, 9], 16, "automatic")
    assert (found.rounds, found.final.test) == ([], [])
    assert "'c0' has one picture" in found.sentence
    with pytest.raises(ConfigError, match="'c0' has one picture"):
        division([1, 9], 16, "held-out")


def test_rows_need_names_and_pictures():
    files = [Path("a.png")]
    assert list(from_rows([("cat", files), ("", []), ("  red \n fox ", files)])) == [
        "cat",
        "red fox",
    ]
    for rows, message in (
        ([("", files)], "class 1 has 1 pictures but no name"),
        ([("cat", [])], "class 'cat' has no pictures"),
        ([("cat", files), ("Cat", files)], "both called 'Cat'"),
    ):
        with pytest.raises(DataError, match=message):
            from_rows(rows)


def png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(stream, "png")
    return stream.getvalue()


def test_a_zip_of_class_folders_is_read_with_or_without_a_folder_around(tmp_path):
    for prefix in ("", "photos/", "a/b/"):
        members = {
            f"{prefix}cat/1.png": png(1),
            f"{prefix}dog/deep/2.PNG": png(2),
            f"{prefix}dog/notes.txt": b"no picture",
            f"{prefix}__MACOSX/cat/._1.png": b"no picture",
            f"{prefix}.hidden/3.png": png(3),
        }
        tree = from_zip(zipped(tmp_path / "a.zip", members), tmp_path / f"out{len(prefix)}")
        assert {name: len(files) for name, files in tree.items()} == {"cat": 1, "dog": 1}
        assert tree["dog"][0].read_bytes() == png(2)


@pytest.mark.parametrize(
    "name", ["../../evil.png", "/etc/evil.png", "cat/../../../evil.png", "C:/evil.png", "..\\e.png"]
)
def test_names_that_lead_outside_are_refused(tmp_path, name):
    file = zipped(tmp_path / "a.zip", {"cat/1.png": png(1), name: png(2), "dog/2.png": png(3)})
    with pytest.raises(DataError, match="outside"):
        from_zip(file, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.zip"]


def test_links_in_a_zip_are_refused(tmp_path):
    link = zipfile.ZipInfo("cat/link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match="outside"):
        from_zip(tmp_path / "a.zip", tmp_path / "out")


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("MAX_PICTURE_BYTES", "1.png in the zip file is larger"),
        ("MAX_TOTAL_BYTES", "unpacks to more"),
        ("MAX_MEMBERS", "3 entries"),
    ],
)
def test_sizes_are_limited_before_anything_is_written(tmp_path, monkeypatch, limit, message):
    members = {"cat/1.png": bytes(5000), "dog/2.png": bytes(5000), "dog/3.png": bytes(5000)}
    file = zipped(tmp_path / "a.zip", members)
    assert file.stat().st_size < 1000
    monkeypatch.setattr(given, limit, 2 if limit == "MAX_MEMBERS" else 4000)
    with pytest.raises(DataError, match=message):
        from_zip(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "two folders"),
        ({"1.png": b"x", "2.png": b"x"}, "two folders"),
        ({"cat/1.png": b"x", "cat/2.png": b"x"}, "two folders"),
        ({"train/cat/1.png": b"x", "test/cat/2.png": b"x"}, "test and train folders"),
    ],
)
def test_zip_files_without_class_folders_are_refused(tmp_path, members, message):
    with pytest.raises(DataError, match=message):
        from_zip(zipped(tmp_path / "a.zip", members), tmp_path / "out")
    (tmp_path / "b.zip").write_bytes(b"no zip file")
    with pytest.raises(DataError, match="cannot be read"):
        from_zip(tmp_path / "b.zip", tmp_path / "out")


def test_unreadable_pictures_and_second_copies_are_left_out_and_counted(tmp_path):
    tree = write_digits(tmp_path, 3)
    tree["one"].append(tmp_path / "bad.png")
    tree["one"][-1].write_bytes(b"no picture")
    tree["two"].append(tmp_path / "again.png")
    tree["two"][-1].write_bytes(tree["two"][0].read_bytes())
    found = readable(tree)
    assert (found.count, found.doubles) == (9, 1)
    assert found.unreadable == ["bad.png: cannot identify image file"]
    (tmp_path / "same.png").write_bytes(tree["two"][0].read_bytes())
    with pytest.raises(DataError, match=r"same\.png is both in 'two' and in 'four'"):
        readable({**tree, "four": [tmp_path / "same.png"]})
    with pytest.raises(DataError, match="'bad' has no readable picture"):
        readable({"one": tree["one"], "bad": [tmp_path / "bad.png"]})
    with pytest.raises(DataError, match="at least two classes"):
        readable({"one": tree["one"]})


@pytest.mark.parametrize("damage", ["cut", "foreign", "huge"])
def test_damaged_archives_of_an_adapter_are_refused(adapted, tmp_path, damage, monkeypatch):
    file = pack(adapted.folder, tmp_path / "adapter.zip")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-50])
    elif damage == "foreign":
        zipped(file, {"../adapter.json": b"{}"})
    else:
        monkeypatch.setitem(adapter_zip.MAX_BYTES, TENSORS, 10)
    with pytest.raises(AdapterFileError), unpacked(file):
        pass


def test_an_archive_holds_exactly_the_adapter(adapted, tmp_path):
    file = pack(adapted.folder, tmp_path / "adapter.zip")
    with unpacked(file) as folder:
        here, there = load_file(folder / TENSORS), load_file(adapted.folder / TENSORS)
        assert here.keys() == there.keys()
        assert all(torch.equal(here[name], there[name]) for name in here)
        names = sorted(path.name for path in folder.iterdir())
    assert names == ["adapter.json", "adapter.safetensors"]
    assert not folder.exists()


def finished(session: Session, name: str):
    """Let a session do one piece of work, and return its folder."""
    with session.work() as place:
        (place / "file").write_text(name)
        session.adapted = name
    return place


def test_tabs_have_their_own_folder_and_adapter(tmp_path):
    sessions = Sessions(tmp_path)
    one, two = sessions.of("a"), sessions.of("b")
    first, second = finished(one, "first"), finished(two, "second")
    assert sessions.of("a") is one
    assert (one.adapted, two.adapted) == ("first", "second")
    assert (first / "file").read_text() == "first"
    one.cancel.set()
    assert not two.cancel.is_set()
    sessions.close("a")
    assert not first.exists()
    assert second.exists()
    assert sessions.of("a") is not one
    sessions.close("never opened")


def test_a_failed_run_keeps_the_adapter_before_it_and_a_finished_one_replaces_it(tmp_path):
    session = Session(tmp_path)
    first = finished(session, "first")
    with pytest.raises(ZeroDivisionError), session.work() as place:
        (place / "half").write_text(str(1 / 0))
    assert sorted(tmp_path.iterdir()) == [first]
    second = finished(session, "second")
    assert sorted(tmp_path.iterdir()) == [second]


def test_closing_a_tab_ends_its_run_first(tmp_path):
    session = Session(tmp_path / "tab")
    started = threading.Event()

    def run() -> None:
        with session.work() as place:
            started.set()
            session.cancel.wait(10)
            (place / "late").write_text("written after closing began")

    thread = threading.Thread(target=run)
    thread.start()
    started.wait(10)
    session.close()
    thread.join(10)
    assert not (tmp_path / "tab").exists()
    with pytest.raises(Cancelled), session.work():
        pass


@pytest.mark.parametrize(("right", "count"), [(0, 5), (5, 5), (7, 10), (1, 1)])
def test_the_interval_solves_the_equation_it_is_named_after(right, count):
    share = right / count
    for bound in wording.wilson(right, count):
        p = bound / 100
        assert (share - p) ** 2 == pytest.approx(wording.Z95**2 * p * (1 - p) / count, abs=1e-9)


def test_words_of_users_are_only_words():
    text = wording.safe("<img src=x onerror=alert(1)> *b* [a](http://b) `c`")
    assert "<" not in text
    assert "\\*b\\*" in text
    assert "\\[a\\]\\(" in text


def test_a_result_says_how_it_was_measured_and_what_was_left_out(adapted):
    text = wording.summary(adapted)
    assert f"{adapted.scores.accuracy():.1f} % right" in text
    assert "before adapting" in text
    assert "12 pictures that the adapter was not trained on" in text
    said = wording.predicted(
        [
            Prediction(Path("a/b.png"), error="truncated"),
            *[Prediction(Path("c.png"), ("x", "y"), (0.9, 0.1))],
        ]
    )
    assert "1 picture classified" in said
    assert "b.png: truncated" in said


def test_a_pictures_count_is_that_of_its_classes():
    assert Pictures({"a": [Path("1"), Path("2")], "b": [Path("3")]}).count == 3


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_impossible_ports_are_refused(port):
    with pytest.raises(ConfigError, match="between 1 and 65535"):
        AppConfig(port=port)
