"""Prompt templates: what `--template` says, where `{}` stands for the class name.

Each word is a prompt, a file of prompts (.txt: one per line, .json: a list), or `ensemble`: the
seven of ImageNet that Tip-Adapter (2022, arXiv 2207.09519) and CoOp's zero-shot baseline average.
"""

from collections.abc import Sequence
from pathlib import Path

from tasks.fewshot.user_files import read_entries
from visionlora.errors import ConfigError

ENSEMBLE = "ensemble"
SEVEN = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
"""`itap`: "I took a picture", as people write below their photographs."""
FILES = (".txt", ".json")


def check_templates(templates: Sequence[str]) -> None:
    """Refuse templates that do not name the class exactly once."""
    if not templates:
        raise ConfigError("at least one prompt template is needed, as in 'a photo of a {}.'")
    for template in templates:
        if template.count("{}") != 1:
            raise ConfigError(
                f"a prompt template must hold '{{}}' once, for the class name; got {template!r}"
            )


def read_templates(words: Sequence[str]) -> list[str]:
    """Return the prompts that `--template` means.

    Raises:
        ConfigError: a file that cannot be read, or a prompt without a place for the name.
    """
    found: list[str] = []
    for word in words:
        if word == ENSEMBLE:
            found += SEVEN
        elif "{}" not in word and Path(word).suffix.lower() in FILES:
            found += _read(Path(word).expanduser())
        else:
            found.append(word)
    check_templates(found)
    return found


def _read(file: Path) -> list[str]:
    given = read_entries(file, "--template", ConfigError)
    if not isinstance(given, list) or not all(isinstance(line, str) for line in given):
        raise ConfigError(f"--template {file} must be a list of prompts")
    prompts = [line.strip() for line in given if line.strip()]
    if not prompts:
        raise ConfigError(f"--template {file} holds no prompts")
    return prompts
