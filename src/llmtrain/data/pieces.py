"""What is to be read, as a list of pieces: whole files, or parts of large ones.

So several processes can share a large file, each needs only its piece in memory, and what was read can be named.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from llmtrain.config.errors import DataError
from llmtrain.data.files import (
    LINES,
    READ_ERRORS,
    READABLE,
    WHOLE,
    file_size,
    find_files,
    is_compressed,
    is_hub_id,
    open_bytes,
    suffix_of,
)  # fmt: skip
from llmtrain.data.tables import hub_dataset, is_saved_dataset, open_parquet, saved_dataset

PIECE_BYTES = 8 * 1024 * 1024  # larger files of lines, and larger Parquet files, are divided


class Piece(NamedTuple):
    """Something to read from first to last: a file, or a part of one.

    `start` and `end` are bytes of files of lines or text, row groups of Parquet files, rows of saved data sets; without
    an `end` it is all from there on.
    """

    file: str
    kind: str
    size: int
    """About how many bytes."""
    start: int = 0
    end: int | None = None
    name: str | None = None
    """Configuration name of a hub data set."""
    split: str = "train"


class Place(NamedTuple):
    """Where a record stands: the line, row, part or document of a piece, from 1 (of a table: of all). 0: the piece."""

    piece: Piece
    number: int

    def __str__(self) -> str:
        file, number = self.piece.file, self.number
        if number == 0:
            return file
        if self.piece.kind == "lines":
            return f"{file}, line {number + lines_before(file, self.piece.start)}"
        if self.piece.kind == "text":
            return (
                file if number == 1 and self.piece.start == 0 else f"{file}, part {number} from byte {self.piece.start}"
            )
        if self.piece.kind == "tokens":
            return f"{file}, document {number}"
        return f"{file}, row {number}"


def find_pieces(path: str, *, split: str, name: str | None, cache_dir: Path) -> list[Piece]:
    """What there is to read, in order, large files divided. Raises DataError for what is missing."""
    if is_hub_id(path):
        return _divided_rows(Piece(path, "hub", 0, name=name, split=split), hub_dataset(path, name, split, cache_dir))
    if is_saved_dataset(Path(path)):
        return _divided_rows(Piece(path, "saved", 0, split=split), saved_dataset(Path(path), split))
    return [piece for file in find_files(path, split) for piece in _divided(file)]


def _divided(file: str) -> list[Piece]:
    suffix = suffix_of(file)
    if suffix not in READABLE:
        raise DataError(f"{file}: cannot tell what this is by its name; expected {', '.join(READABLE)}, also with .gz")
    size = file_size(file)
    if suffix == ".parquet" and size > PIECE_BYTES and not is_compressed(file):
        return _divided_groups(file)
    is_lines = suffix in LINES or (suffix == ".json" and not _begins_with_bracket(file))
    kind = "lines" if is_lines else "text" if suffix in WHOLE else suffix.removeprefix(".")
    if kind not in ("lines", "text") or is_compressed(file):
        return [Piece(file, kind, size)]
    borders = [*range(0, max(size, 1), PIECE_BYTES), size]
    return [Piece(file, kind, end - start, start, end) for start, end in pairwise(borders)]


def _begins_with_bracket(file: str) -> bool:
    """Whether a .json file is an array; many that go by this name hold one object a line."""
    try:
        with open_bytes(file) as stream:
            return stream.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    except READ_ERRORS:
        return True  # told when it is read


def _divided_groups(file: str) -> list[Piece]:
    with open_bytes(file) as stream:
        metadata = open_parquet(stream, file).metadata
    sizes = [metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups)]
    return [Piece(file, "parquet", size, number, number + 1) for number, size in enumerate(sizes)]


def _divided_rows(whole: Piece, dataset: Any) -> list[Piece]:
    rows, size = len(dataset), int(dataset.data.nbytes)
    step = max(1, rows * PIECE_BYTES // max(size, 1))
    borders = [*range(0, rows, step), rows]
    return [
        whole._replace(size=size * (end - start) // rows, start=start, end=end) for start, end in pairwise(borders)
    ]  # fmt: skip


def lines_before(file: str, end: int) -> int:
    """How many lines begin before byte `end`, that of the byte before it included."""
    with open_bytes(file) as stream:
        count = left = 0
        left = end
        while left and (block := stream.read(min(left, 1 << 20))):
            count, left = count + block.count(b"\n"), left - len(block)
        if end:
            stream.seek(end - 1)
            count += stream.read(1) != b"\n"
    return count
