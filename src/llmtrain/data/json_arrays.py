"""A JSON array, item by item: no more of it in memory than the item that is being read."""

import codecs
import json
from collections.abc import Iterator
from typing import IO, Any

from llmtrain.config.errors import DataError

READ_BYTES = 64 * 1024  # at a time, or as much again as there is of an item that is longer
SPACE = " \t\r\n"
# An object or a list takes some 60 to 300 bytes of memory, and two characters of a file.
MOST_BRACKETS = 1 << 22


def check_brackets(text: str, start: int = 0) -> None:
    """Raises ValueError for JSON from `start` on that would take many times its own length of memory."""
    if len(text) - start > MOST_BRACKETS and text.count("[", start) + text.count("{", start) > MOST_BRACKETS:
        raise ValueError(f"more than {MOST_BRACKETS:,} objects and lists in one row")


def array_items(stream: IO[bytes], file: str, limit: int) -> Iterator[Any]:
    """The items of the array that `file` consists of, none of them longer than about `limit` characters.

    Raises DataError, with the line, for what is no such array; what comes before has been yielded.
    """
    text = _Text(stream, file, limit)
    text.expect("[")
    if text.next() != "]":
        while True:
            yield text.item()
            if text.next() == "]":
                break
            text.expect(",")
    text.expect("]")
    if text.next():
        raise text.fault("something follows the array")


class _Text:
    """The part of the file that is looked at: `here` is the next character's place in it."""

    def __init__(self, stream: IO[bytes], file: str, limit: int) -> None:
        self.stream, self.file, self.limit = stream, file, limit
        self.decoder, self.decode_item = codecs.getincrementaldecoder("utf-8-sig")(), json.JSONDecoder().raw_decode
        self.text, self.here, self.line, self.is_end = "", 0, 1, False

    def next(self) -> str:
        """The next character that is no white space; none at the end of the file."""
        while True:
            while self.here < len(self.text) and self.text[self.here] in SPACE:
                self.here += 1
            if self.here < len(self.text) or self.is_end:
                return self.text[self.here : self.here + 1]
            self.read()

    def expect(self, character: str) -> None:
        """Pass over `character`, which has to come next."""
        if self.next() != character:
            raise self.fault(f"expected {character!r}")
        self.here += 1

    def item(self) -> Any:
        """The next item."""
        self.next()
        while True:
            try:
                check_brackets(self.text, self.here)
                value, end = self.decode_item(self.text, self.here)
            except json.JSONDecodeError as error:
                fault = self.fault(error.msg, error.pos)  # or the rest of it has not been read
            except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
                raise self.fault(str(error)) from None
            else:
                if end < len(self.text) or self.is_end:  # a number may go on
                    self.here = end
                    return value
            if self.is_end:
                raise fault from None
            if len(self.text) - self.here > self.limit:
                raise self.fault(f"an item is longer than {self.limit:,} characters")
            self.read()

    def read(self) -> None:
        """Read on, and let go of what has been passed over."""
        self.line += self.text.count("\n", 0, self.here)
        self.text, self.here = self.text[self.here :], 0
        data = self.stream.read(max(READ_BYTES, len(self.text)))
        self.is_end = not data
        try:
            self.text += self.decoder.decode(data, self.is_end)
        except UnicodeDecodeError as error:
            raise DataError(f"{self.file}: not UTF-8 text: {error.reason}, after line {self.line}") from None

    def fault(self, problem: str, place: int | None = None) -> DataError:
        """What is wrong, with the line."""
        line = self.line + self.text.count("\n", 0, self.here if place is None else place)
        return DataError(f"{self.file}, line {line}: not valid JSON: {problem}")
