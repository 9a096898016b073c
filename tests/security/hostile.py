"""Files that somebody who means harm could hand in, and what is expected of whoever reads them."""

import json
import os
import pickle
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from llmtrain.config.errors import UserError

JsonObject = dict[str, Any]


class Canary:
    """Pickled, it makes a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.path}'",)

    @property
    def pickled(self) -> bytes:
        return pickle.dumps(self)


def bomb(path: Path, head: bytes, unit: bytes, size: int, tail: bytes = b"") -> Path:
    """A file (.gz, .zst) that unpacks to `head`, then `unit` over and over to `size` bytes, then `tail`."""
    import pyarrow

    block = unit * (2**20 // len(unit))
    compression = {".gz": "gzip", ".zst": "zstd"}[path.suffix]
    with pyarrow.output_stream(str(path), compression=compression) as file:
        file.write(head)
        for _ in range(size // len(block)):
            file.write(block)
        file.write(tail)
    return path


def safetensors(path: Path, header: JsonObject | bytes, body: bytes = b"", length: int | None = None) -> None:
    """A file with this header, whatever its length is said to be."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)


def change(path: Path, **keys: Any) -> None:
    """Other values in a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@contextmanager
def refused(*words: str) -> Iterator[None]:
    """What happens within is refused: one error of the user's kind, with these words, of a few lines."""
    with pytest.raises(UserError) as caught:
        yield
    message = str(caught.value)
    for each in words:
        assert each in message
    assert len(message) < 4000
    assert len(message.splitlines()) <= 12
