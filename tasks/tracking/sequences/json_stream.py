"""Arrays of a large JSON file, one element at a time.

The annotations of COCO are 450 MB of text, and ten times that as Python objects. Here only a piece
of the text is in memory, and the element that was asked for.
"""

import json
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, TextIO

from visionlora.errors import DataError

PIECE = 1 << 20
"""Characters that are read at a time."""


def elements(path: Path, keys: Container[str]) -> Iterator[tuple[str, Any]]:
    """Yield `(key, element)` for the arrays `keys` of the object that a JSON file consists of.

    Raises:
        DataError: the file is missing, is no JSON object, or ends too early.
    """
    try:
        with path.open(encoding="utf-8") as stream:
            yield from _object(_Reader(stream), keys)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not complete JSON: {error}") from error


class _Reader:
    """Text of which the part before `at` is done with."""

    def __init__(self, stream: TextIO) -> None:
        self.stream, self.text, self.at, self.ended = stream, "", 0, False
        self.decoder = json.JSONDecoder()

    def more(self) -> None:
        piece = self.stream.read(max(PIECE, len(self.text)))
        self.text, self.at, self.ended = self.text[self.at :] + piece, 0, not piece

    def peek(self) -> str:
        """Return the next character that is not white space, without taking it."""
        while True:
            while self.at < len(self.text) and self.text[self.at].isspace():
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            self.more()
            if self.ended:
                raise json.JSONDecodeError("unexpected end", self.text, self.at)

    def take(self, allowed: str) -> str:
        character = self.peek()
        if character not in allowed:
            raise json.JSONDecodeError(f"expected one of {allowed}", self.text, self.at)
        self.at += 1
        return character

    def value(self) -> Any:
        """Take one whole value."""
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError:
                if self.ended:
                    raise
            else:
                # A number at the end of the piece may go on in the next one.
                if end < len(self.text) or self.ended:
                    self.at = end
                    return value
            self.more()


def _object(reader: _Reader, keys: Container[str]) -> Iterator[tuple[str, Any]]:
    reader.take("{")
    while reader.peek() != "}":
        key = reader.value()
        reader.take(":")
        if key in keys and reader.peek() == "[":
            reader.take("[")
            while reader.peek() != "]":
                yield key, reader.value()
                if reader.peek() != "]":
                    reader.take(",")
            reader.take("]")
        else:
            reader.value()
        if reader.peek() != "}":
            reader.take(",")
