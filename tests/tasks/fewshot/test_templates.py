"""Prompts by word: as they are, from a file, or the ensemble of the literature."""

import json

import pytest

from tasks.fewshot.config import FewshotConfig
from tasks.fewshot.templates import SEVEN, read_templates
from visionlora.errors import ConfigError


def test_prompts_files_and_the_ensemble_can_be_mixed(tmp_path):
    (tmp_path / "a.txt").write_text("art of the {}.\n\n  a {} \n")
    (tmp_path / "b.json").write_text(json.dumps(["{} texture."]))
    words = ["a photo of {}.txt", str(tmp_path / "a.txt"), str(tmp_path / "b.json"), "ensemble"]
    expected = ["a photo of {}.txt", "art of the {}.", "a {}", "{} texture.", *SEVEN]
    assert read_templates(words) == expected
    assert len(SEVEN) == 7


def test_a_run_keeps_the_prompts_and_not_the_name_of_their_file(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("art of the {}.\na {}\n")
    config = FewshotConfig(template=[str(file)]).resolved(("{}",))
    file.unlink()
    assert config.template == ["art of the {}.", "a {}"]
    assert FewshotConfig(template=["ensemble"]).resolved(("{}",)).template == list(SEVEN)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.txt", None, "No such file"),
        ("a.txt", "\n", "holds no prompts"),
        ("a.txt", "a {}\na photo\n", "once, for the class name; got 'a photo'"),
        ("a.json", "{", "not readable"),
        ("a.json", '{"a": "a {}"}', "must be a list of prompts"),
    ],
)
def test_files_that_hold_no_prompts_are_refused_in_one_line(tmp_path, name, text, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        FewshotConfig(template=[str(tmp_path / name)])
    assert "\n" not in str(caught.value)
