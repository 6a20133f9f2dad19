"""What a prompt calls the classes: a file of names in the place of the data set's own.

JSON maps classes to names and may leave some out. A list, or a text file with one name per line,
has a name for every class, in the order of the data set.
"""

from collections.abc import Sequence
from pathlib import Path

from tasks.fewshot.user_files import read_entries
from visionlora.errors import DataError, nearest


def read_class_names(path: str | Path, classes: Sequence[str]) -> tuple[str, ...]:
    """Return the names of `classes`.

    Args:
        path: `{"class": "name"}` or a list as JSON, or lines of text.
        classes: The data set's own names; a key may have `_` where they have spaces.

    Raises:
        DataError: a file that cannot be read, an unknown class, or another number of names.
    """
    file = Path(path).expanduser()
    given = read_entries(file, "--class-names", DataError)
    if isinstance(given, dict):
        return _replaced(file, given, classes)
    if not isinstance(given, list) or not all(isinstance(name, str) for name in given):
        raise DataError(f'--class-names {file} must be {{"class": "name"}} or a list of names')
    names = [name.strip() for name in given if name.strip()]
    if len(names) != len(classes):
        raise DataError(
            f"--class-names {file} has {len(names)} names, but there are {len(classes)} classes: "
            f"{classes[0]!r} to {classes[-1]!r}"
        )
    return tuple(names)


def _replaced(file: Path, given: dict[str, object], classes: Sequence[str]) -> tuple[str, ...]:
    known = {name.replace("_", " "): name for name in classes}
    names = dict(zip(classes, classes, strict=True))
    for key, name in given.items():
        own = known.get(key.replace("_", " "))
        if own is None:
            raise DataError(
                f"--class-names {file} names {key!r}, which is no class{nearest(key, classes)}"
            )
        if not isinstance(name, str) or not name.strip():
            raise DataError(f"--class-names {file} has no name for {key!r}")
        names[own] = name.strip()
    return tuple(names[name] for name in classes)
