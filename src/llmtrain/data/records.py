"""Files, folders and hub data sets → records: what `documents` and `rows` are made from.

JSON lines and text are read here line by line, so that a fault is named by its line and rows may differ in their
other columns; tables go through libraries. A row that cannot be used is a value among the others, a `RowError`: whoever
reads says what becomes of it (`Faults`), so every row is used or reported.
"""

import codecs
import importlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

from llmtrain.config.errors import DataError
from llmtrain.data.files import LOADERS, READ_ERRORS, is_compressed, open_bytes, suffix_of
from llmtrain.data.json_arrays import array_items, check_brackets
from llmtrain.data.pieces import Piece, Place, find_pieces
from llmtrain.data.tables import cause, check_rows, datasets_library, hub_dataset, open_parquet, saved_dataset

Item = TypeVar("Item")
Split = Literal["train", "validation"]
OnError = Literal["stop", "skip"]
Record = dict[str, Any]

LINE_BYTES = 64 * 1024 * 1024  # no line may be longer: parsed, a line of brackets takes 20 times its bytes
TEXT_BYTES = 1024 * 1024  # a longer text file is read as several texts, each of whole lines

HINT = "data.on_error=skip leaves such rows out, and says how many and why"


class RowError(DataError):
    """One row of a source cannot be used; `reason` is what such rows are counted under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["RowError"], tuple[str, str]]:  # comes whole from another process
        return RowError, (self.reason, str(self))


Placed = tuple[Place, Record | RowError]  # where it stands, and the record or what is wrong with it


class Faults:
    """What becomes of rows that cannot be used: the first one stops everything, or they are counted and left out."""

    def __init__(self, on_error: OnError = "stop") -> None:
        self.on_error = on_error
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, fault: RowError) -> None:
        """Count a fault. Raises it where `on_error` is stop."""
        if self.on_error == "stop":
            raise RowError(fault.reason, f"{fault}\n{HINT}")
        self.counts[fault.reason] += 1
        self.first.setdefault(fault.reason, str(fault))

    def report(self) -> str:
        """One line for each reason: how many rows, and the first of them."""
        return "\n".join(
            f"{count} x {reason}; the first: {self.first[reason]}" for reason, count in self.counts.items()
        )


def read_records(path: str, *, split: str, name: str | None, cache_dir: Path) -> Iterator[Placed]:
    """The records of a file, glob, folder, URL or hub data set, in order, each with its place.

    A row that cannot be read comes as a RowError, which names file and line. Raises DataError for what is missing or
    cannot be read at all.
    """
    for piece in find_pieces(path, split=split, name=name, cache_dir=cache_dir):
        yield from read_piece(piece, cache_dir)


def read_piece(piece: Piece, cache_dir: Path) -> Iterator[Placed]:
    """The records of a piece, in order. Raises DataError for a file that cannot be read at all."""
    reader = READERS[piece.kind]
    try:
        yield from reader(piece, cache_dir)
    except READ_ERRORS as error:
        if not is_compressed(piece.file):
            raise DataError(f"{piece.file}: cannot be read: {error}") from None
        # what came before is there; what would have followed is one fault
        message = f"{piece.file}: broken or cut off compressed file: {error}"
        yield Place(piece, 0), RowError("broken compressed file", message)


def hold_out(
    items: Iterable[Item], every: int, split: Split, divide: Callable[[Item, int], tuple[Item | None, Item | None]]
) -> Iterator[Item]:
    """Every `every`-th item for validation, the others for training.

    Where there are fewer, `divide(last item, number of items)` says what of the last one goes to either side.
    """
    for number, item, is_last in _numbered(items):
        train: Item | None = item
        held: Item | None = None
        if number % every == 0:
            train, held = None, item
        elif is_last and number < every:
            train, held = divide(item, number)
        chosen = train if split == "train" else held
        if chosen is not None:
            yield chosen


def _numbered(items: Iterable[Item]) -> Iterator[tuple[int, Item, bool]]:
    rest = iter(items)
    try:
        item = next(rest)
    except StopIteration:
        return
    number = 1
    for following in rest:
        yield number, item, False
        number, item = number + 1, following
    yield number, item, True


# Lines and text ---------------------------------------------------------------------------------------------------


def _read_lines(piece: Piece, cache_dir: Path) -> Iterator[Placed]:
    with open_bytes(piece.file) as stream:
        number, is_rest = 0, False
        for part in _parts_of_lines(stream, piece, LINE_BYTES):
            was_rest, is_rest = is_rest, not part.endswith(b"\n") and len(part) == LINE_BYTES
            number += not was_rest
            if not was_rest and (is_rest or part.strip()):
                place = Place(piece, number)
                yield place, _parsed(None if is_rest else part, place)


def _read_text(piece: Piece, cache_dir: Path) -> Iterator[Placed]:
    """Texts of some `TEXT_BYTES`, of whole lines as far as lines are not longer than that."""
    decoder = codecs.getincrementaldecoder("utf-8")()  # not "utf-8-sig", which drops the beginning of a mark at the end
    parts: list[bytes] = []
    number = size = 0
    with open_bytes(piece.file) as stream:
        for part in _parts_of_lines(stream, piece, TEXT_BYTES):
            parts.append(part)
            size += len(part)
            if size >= TEXT_BYTES:
                number += 1
                yield _text(decoder, b"".join(parts), Place(piece, number), is_last=False)
                parts, size = [], 0
    if parts or decoder.getstate()[0]:  # the beginning of a character may be left over
        yield _text(decoder, b"".join(parts), Place(piece, number + 1), is_last=True)


def _parts_of_lines(stream: IO[bytes], piece: Piece, limit: int) -> Iterator[bytes]:
    """The lines that begin in the piece, longer ones in parts of `limit` bytes."""
    place, line_ended = piece.start, True
    if place:  # the line that the piece before has begun is its own
        stream.seek(place - 1)
        place -= 1
        while (part := stream.readline(limit)) and not part.endswith(b"\n"):
            place += len(part)
        place += len(part)
    while piece.end is None or place < piece.end or not line_ended:
        part = stream.readline(limit)
        if not part:
            return
        yield part
        place, line_ended = place + len(part), part.endswith(b"\n")


def _text(decoder: codecs.IncrementalDecoder, data: bytes, place: Place, is_last: bool) -> Placed:
    try:
        text = decoder.decode(data, is_last)
        is_first = place.number == 1 and place.piece.start == 0
        return place, {"text": text.removeprefix("\ufeff") if is_first else text}
    except UnicodeDecodeError as error:
        decoder.reset()
        return place, _not_utf8(place, error)


def _not_utf8(place: Place, error: UnicodeDecodeError) -> RowError:
    return RowError("not UTF-8", f"{place}: not UTF-8 text: {error.reason} at byte {error.start}")


# JSON -------------------------------------------------------------------------------------------------------------


def _read_json(piece: Piece, cache_dir: Path) -> Iterator[Placed]:
    """A .json file that is an array of objects; one with an object a line is read as lines."""
    with open_bytes(piece.file) as stream:
        for number, row in enumerate(array_items(stream, piece.file, LINE_BYTES), 1):
            place = Place(piece, number)
            yield place, _checked(row, place, may_hold_surrogates=True)


def _parsed(line: bytes | None, place: Place) -> Record | RowError:
    """The record in a line, or what is wrong with it; None stands for a line longer than `LINE_BYTES`."""
    if line is None:
        return RowError("line too long", f"{place}: longer than {LINE_BYTES:,} bytes")
    try:
        text = line.decode("utf-8-sig")
        check_brackets(text)
        # JSON can name halves of characters outside the basic plane, which are no text when they stand alone.
        return _checked(json.loads(text), place, may_hold_surrogates=b"\\ud" in line or b"\\uD" in line)
    except UnicodeDecodeError as error:
        return _not_utf8(place, error)
    except json.JSONDecodeError as error:
        message = f"{place}: not valid JSON ({error.msg}, column {error.colno}): {_short(text)}"
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        message = f"{place}: not valid JSON ({error}): {_short(text)}"
    return RowError("not valid JSON", message)


def _checked(row: Any, place: Place, may_hold_surrogates: bool) -> Record | RowError:
    if not isinstance(row, dict):
        message = f"{place}: expected an object with named columns, found {_short(row)}"
        return RowError("not an object with columns", message)
    if may_hold_surrogates:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return RowError("half characters", f"{place}: half of a surrogate pair, which is no character, in the text")
    return row


# Tables -----------------------------------------------------------------------------------------------------------


def _read_parquet(piece: Piece, cache_dir: Path) -> Iterator[Placed]:
    with open_bytes(piece.file) as stream:
        table = open_parquet(stream, piece.file)
        groups = range(piece.start, table.metadata.num_row_groups if piece.end is None else piece.end)
        before = sum(table.metadata.row_group(number).num_rows for number in range(piece.start))
        try:
            rows = (row for batch in table.iter_batches(256, row_groups=list(groups)) for row in batch.to_pylist())
            for number, row in enumerate(rows, before + 1):
                yield Place(piece, number), row
        except importlib.import_module("pyarrow").ArrowException as error:
            raise DataError(f"{piece.file}: cannot be read as parquet: {cause(error)}") from None


def _read_table(piece: Piece, cache_dir: Path) -> Iterator[Placed]:
    """A file that the `datasets` library reads: CSV, TSV, Arrow."""
    loader = LOADERS[suffix_of(piece.file)]
    if is_compressed(piece.file) and loader == "csv":
        with open_bytes(piece.file) as stream:
            check_rows(stream, piece.file)
    options: dict[str, Any] = {"sep": "\t"} if suffix_of(piece.file) == ".tsv" else {}
    options |= {"data_files": piece.file, "cache_dir": str(cache_dir / "datasets")}
    try:
        rows = datasets_library().load_dataset(loader, split="train", streaming=True, **options)
        for number, row in enumerate(rows, 1):
            yield Place(piece, number), dict(row)
    except DataError:
        raise
    except Exception as error:  # each format's reader has errors of its own
        raise DataError(f"{piece.file}: cannot be read as {loader}: {cause(error)}") from None


def _read_hub(piece: Piece, cache_dir: Path) -> Iterator[Placed]:
    return _rows_of(piece, hub_dataset(piece.file, piece.name, piece.split, cache_dir))


def _read_stream(piece: Piece, cache_dir: Path) -> Iterator[Placed]:
    for number, row in enumerate(hub_dataset(piece.file, piece.name, piece.split, cache_dir, streaming=True), 1):
        yield Place(piece, number), dict(row)


def _read_saved(piece: Piece, cache_dir: Path) -> Iterator[Placed]:
    return _rows_of(piece, saved_dataset(Path(piece.file), piece.split))


def _rows_of(piece: Piece, dataset: Any) -> Iterator[Placed]:
    for number in range(piece.start, len(dataset) if piece.end is None else piece.end):
        yield Place(piece, number + 1), dict(dataset[number])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:120] + " ..."


READERS: dict[str, Callable[[Piece, Path], Iterator[Placed]]] = {
    "lines": _read_lines, "text": _read_text, "json": _read_json, "parquet": _read_parquet, "csv": _read_table,
    "tsv": _read_table, "arrow": _read_table, "hub": _read_hub, "stream": _read_stream, "saved": _read_saved,
}  # fmt: skip
