"""What `run` has written into a folder: a line for every picture that was begun and finished.

    {"file": "a/b.png", "by": "<base> <adapter> ...", "done": true}

A picture that is there, and finished by the same network, is not restored again. One that is there
without such a line is somebody else's, and one of another adapter is another result: neither is
replaced unasked.
"""

import json
from pathlib import Path

from visionlora.errors import OutputError

NAME = "restored.jsonl"


class Finished:
    """The record of a folder.

    Args:
        folder: where the pictures are written.
        by: what says which network makes them.
    """

    def __init__(self, folder: Path, by: str) -> None:
        self.folder = folder
        self.by = by
        self._last: dict[str, tuple[str, bool]] = {}
        path = folder / NAME
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for line in lines:
            try:
                said = json.loads(line)
                self._last[said["file"]] = (said["by"], said["done"])
            except (ValueError, KeyError, TypeError):
                continue  # the last line of a run that was killed

    def has(self, file: Path) -> bool:
        """Tell whether a picture is finished.

        Raises:
            OutputError: another network made it, or nobody knows who.
        """
        if not file.exists():
            return False
        by, done = self._last.get(self._name(file), (None, True))
        if by == self.by:
            return done
        if by is None:
            raise OutputError(
                f"{file} is there already and was not written by this command: choose another "
                "folder, or --overwrite"
            )
        if not done:
            return False
        raise OutputError(
            f"{file} was restored by another network or adapter: choose another folder, or "
            "--overwrite"
        )

    def begin(self, file: Path) -> None:
        """Note that a picture is being restored; what is there may be replaced."""
        self._note(file, done=False)

    def end(self, file: Path) -> None:
        """Note that a picture is written."""
        self._note(file, done=True)

    def _note(self, file: Path, *, done: bool) -> None:
        line = json.dumps({"file": self._name(file), "by": self.by, "done": done})
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / NAME).open("a", encoding="utf-8") as stream:
                stream.write(f"{line}\n")
        except OSError as error:
            reason = error.strerror or error
            raise OutputError(f"cannot write {self.folder / NAME}: {reason}") from error

    def _name(self, file: Path) -> str:
        return file.relative_to(self.folder).as_posix()
