"""Files of class names."""

import json

import pytest

from tasks.fewshot import train
from tasks.fewshot.class_names import read_class_names
from tasks.fewshot.config import FewshotConfig
from visionlora.errors import DataError

CLASSES = ("red_fox", "cat", "dog")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("a.json", '{"cat": "house cat"}', ("red_fox", "house cat", "dog")),
        ("a.json", '{"red fox": " vixen ", "dog": "hound"}', ("vixen", "cat", "hound")),
        ("a.json", '["a", "b", "c"]', ("a", "b", "c")),
        ("a.txt", "a\nb \n\nc\n", ("a", "b", "c")),
    ],
)
def test_names_are_read(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    assert read_class_names(tmp_path / name, CLASSES) == expected


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "a\nb\n", "2 names, but there are 3 classes: 'red_fox' to 'dog'"),
        ("a.json", '{"cta": "cat"}', "did you mean 'cat'"),
        ("a.json", '{"cat": 3}', "no name for 'cat'"),
        ("a.json", "3", "must be"),
        ("a.json", "{", "not readable"),
        ("b.txt", None, "No such file"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        read_class_names(tmp_path / name, CLASSES)
    assert "\n" not in str(caught.value)


def test_a_run_says_the_names_in_its_prompts_and_files(tmp_path):
    (tmp_path / "names.json").write_text('{"zero": "nought", "one": "two"}')
    config = FewshotConfig(
        class_names=str(tmp_path / "names.json"),
        output=str(tmp_path / "run"),
        limit_steps=1,
        limit_test=20,
    )
    with pytest.raises(DataError, match="both called 'two'"):
        train.run(config)
    (tmp_path / "names.json").write_text('{"zero": "nought"}')
    result = train.run(config)
    assert list(result["per_class"])[:2] == ["nought", "one"]
    description = json.loads((tmp_path / "run" / "seed_1" / "adapter.json").read_text())
    assert description["classes"][0] == "nought"
