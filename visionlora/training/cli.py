"""Command lines from dataclasses: flat typed flags, one YAML file, one-line errors.

A thin layer over jsonargparse. It adds what people type at a shell: dashes or underscores in names,
`--seed 1 2 3` for lists, `--resume` for booleans, `--adapter.rank 2` for free-form dicts, and
unknown names answered with the nearest known one.

    @dataclass(frozen=True, kw_only=True)
    class Config:
        seed: list[int] = field(default_factory=lambda: [1])
        '''Seeds.'''

    if __name__ == "__main__":
        run_cli(lambda: main(parse(Config)))
"""

import contextlib
import dataclasses
import io
import json
import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import jsonargparse
import yaml

from visionlora.errors import ConfigError, VisionLoraError, nearest

__all__ = ["parse", "run_cli"]

Config = TypeVar("Config")
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
"""What the types of options are called in errors."""
PLURAL = {"a whole number": "whole numbers", "a number": "numbers"}


def run_cli(run: Callable[[], int | None]) -> NoReturn:
    """Run a script's body and exit: 0 for done, 2 for a user error, 130 for Ctrl-C.

    A user error is one line on stderr; anything else keeps its traceback, since it is a defect.
    """
    try:
        code = run() or 0
    except VisionLoraError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)


def parse(config: type[Config], argv: Sequence[str] | None = None) -> Config:
    """Build a config dataclass from flags, over a `--config` file, over its defaults.

    Args:
        config: a dataclass; nested dataclasses give dotted flags, `dict[str, Any]` fields take
            any dotted flag below their name.
        argv: the arguments, those of the process by default.

    Raises:
        ConfigError: an unknown name, a wrong value or an unreadable file.
        SystemExit: after `--help` or `--print_config`.
    """
    options = dict(_options(config))
    arguments = _normalise(sys.argv[1:] if argv is None else argv, options)
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file; flags override it.")
    parser.add_class_arguments(config, None)
    if "--help" in arguments:
        print(_help(parser.format_help()))
        raise SystemExit(0)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            namespace = parser.parse_args(arguments)
        values = parser.instantiate(namespace)
    except jsonargparse.ArgumentError as error:
        raise _explained(str(error), options) from None
    names = [field.name for field in dataclasses.fields(config)]  # type: ignore[arg-type]
    return config(**{name: values[name] for name in names})


def _help(text: str) -> str:
    """Show names with dashes, and lists as they are typed here."""
    text = re.sub(r", --[\w.]+\+ \S+", "", text).replace("[ITEM,...]", "ITEM ...")
    return re.sub(r"--[a-z_.]+", lambda match: match[0].replace("_", "-"), text)


def _options(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and type of every field, nested ones included."""
    hints = get_type_hints(config)
    for field in dataclasses.fields(config):
        name, kind = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from _options(kind, f"{name}.")
        else:
            yield name, kind


def _normalise(argv: Sequence[str], options: dict[str, Any]) -> list[str]:
    """Rewrite arguments as `--known_name=value`, and check names before values."""
    result: list[str] = []
    queue = list(argv)
    while queue:
        word = queue.pop(0)
        if word in ("-h", "--help"):
            return ["--help"]
        if not word.startswith("--"):
            raise ConfigError(f"unexpected argument {word!r}; options start with --")
        flag, given, text = word[2:].partition("=")
        name = flag.replace("-", "_")
        if name == "print_config":
            result.append(f"--{name}={text}" if given else f"--{name}")
            continue
        values = [text] if given else _take(queue)
        if name == "config":
            result.append(f"--config={_checked_file(_single(flag, values), options)}")
            continue
        kind = _known(name, flag, options)
        result.append(f"--{name}={_joined(flag, kind, values)}")
    return result


def _take(queue: list[str]) -> list[str]:
    """Take the words up to the next option."""
    values: list[str] = []
    while queue and (not queue[0].startswith("--") or queue[0] == "--"):
        values.append(queue.pop(0))
    return values


def _known(name: str, flag: str, options: dict[str, Any]) -> Any:
    """Return the type of an option, `Any` below a free-form dict."""
    if name in options:
        return options[name]
    if name in _parents(options):
        return str  # a YAML file for a nested dataclass
    for known, kind in options.items():
        if name.rpartition(".")[0] == known and _holds(kind, dict):
            return Any
    near = nearest(f"--{flag}", [f"--{known.replace('_', '-')}" for known in options], count=1)
    raise ConfigError(f"unknown option '--{flag}'{near}")


def _joined(flag: str, kind: Any, values: list[str]) -> str:
    """Return the words after an option as the one value jsonargparse expects."""
    if not values and _holds(kind, bool):
        return "true"
    if kind is Any:
        parsed = [_scalar(value) for value in _some(flag, values)]
        if len(parsed) > 1:
            return json.dumps(parsed)
        # jsonargparse would keep the quotes of a JSON text here.
        return parsed[0] if isinstance(parsed[0], str) else json.dumps(parsed[0])
    if _holds(kind, list) or _holds(kind, tuple):
        _some(flag, values)
        if len(values) == 1 and (values[0].startswith("[") or values[0] in ("null", "None")):
            return values[0]
        return json.dumps(values if _of_text(kind) else [_scalar(value) for value in values])
    return _single(flag, values)


def _scalar(text: str) -> Any:
    """Parse a word as YAML; unlike YAML 1.1, take `1e-3` for a number."""
    try:
        if re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", text):
            return float(text)
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return value if isinstance(value, bool | int | float | list | dict | None) else text


def _some(flag: str, values: list[Any]) -> list[Any]:
    if not values:
        raise ConfigError(f"option '--{flag}' needs a value")
    return values


def _single(flag: str, values: list[str]) -> str:
    if len(_some(flag, values)) > 1:
        raise ConfigError(f"option '--{flag}' takes one value, got {' '.join(values)}")
    return values[0]


def _checked_file(name: str, options: dict[str, Any]) -> str:
    """Refuse a YAML file that cannot be read or has unknown keys."""
    try:
        content = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {name}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{name} must hold 'option: value' lines, got {type(content).__name__}")
    _check_keys(content, "", name, options)
    return name


def _check_keys(content: dict[str, Any], prefix: str, file: str, options: dict[str, Any]) -> None:
    parents = _parents(options)
    for key, value in content.items():
        name = f"{prefix}{key}"
        if name in parents and isinstance(value, dict):
            _check_keys(value, f"{name}.", file, options)
        elif name not in options:
            near = nearest(name, [*options, *parents], count=1)
            raise ConfigError(f"unknown option {name!r} in {file}{near}")


def _parents(options: dict[str, Any]) -> set[str]:
    """Return the names of the nested dataclasses."""
    return {name[:i] for name in options for i, letter in enumerate(name) if letter == "."}


def _explained(message: str, options: dict[str, Any]) -> ConfigError:
    """Turn an error of jsonargparse into one line in terms of the options."""
    if missing := re.search(r"arguments are required: (.+)", message):
        names = [f"--{name.strip().replace('_', '-')}" for name in missing[1].split(",")]
        return ConfigError(f"missing option {' and '.join(names)}")
    found = re.search(r'[Kk]ey "([^"]+)".*(?:Got|Given) value: (.*?)\s*$', message, flags=re.DOTALL)
    if found is None or found[1] not in options:
        return ConfigError(" ".join(message.split()))
    kind, value = options[found[1]], found[2].splitlines()[0].strip("'\"")
    name = found[1].replace("_", "-")
    words, choices = _spoken(kind)
    if value.startswith("["):  # the whole list, in which one word is wrong
        given = [word.strip("'\" ") for word in value.strip("[]").split(",")]
        wrong = [word for word in given if word not in choices] if choices else []
        value = wrong[0] if wrong and not words else " ".join(given)
    if choices and not words:
        hint = nearest(value, choices, count=1)
        return ConfigError(f"--{name} {value!r} is none of {', '.join(choices)}{hint}")
    return ConfigError(f"--{name} must be {' or '.join([*words, *choices])}, got {value!r}")


def _spoken(kind: Any) -> tuple[list[str], list[str]]:
    """Return in words what a type takes, and the words among which it lets choose."""
    words: list[str] = []
    choices: list[str] = []
    for arm in _arms(kind):
        if _origin(arm) is Literal:
            choices += map(str, get_args(arm))
        elif _origin(arm) in (list, tuple):
            for item in get_args(arm):
                several, these = _spoken(item)
                words += [PLURAL.get(word, word) for word in several]
                choices += these
        elif arm not in (type(None), Ellipsis):
            words.append(WORDS.get(arm, getattr(arm, "__name__", str(arm))))
    return list(dict.fromkeys(words)), choices


def _origin(kind: Any) -> Any:
    return get_origin(kind) or kind


def _arms(kind: Any) -> list[Any]:
    """Return the members of a union, or the type itself."""
    return list(get_args(kind)) if _origin(kind) in (Union, types.UnionType) else [kind]


def _holds(kind: Any, what: type) -> bool:
    return any(_origin(arm) is what for arm in _arms(kind))


def _of_text(kind: Any) -> bool:
    """Tell whether a list type has text items, which must not be read as numbers."""
    lists = [arm for arm in _arms(kind) if _origin(arm) in (list, tuple)]
    return any(str in _arms(item) for arm in lists for item in get_args(arm))
