"""Files, folders and hub data sets → records: what `documents` and `rows` are made from.

JSON lines and text are read here line by line, so that a fault is named by its line and rows may differ in their
other columns; Parquet, CSV, Arrow and the hub go through the `datasets` library. A row that cannot be used is a value
among the others, a `RowError`: whoever reads says what becomes of it (`Faults`), so every row is used or reported.
"""

import bz2
import glob
import gzip
import importlib
import io
import json
import lzma
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, TypeVar

from llmtrain.config.errors import DataError

Item = TypeVar("Item")
Split = Literal["train", "validation"]
Record = dict[str, Any]
OnError = Literal["stop", "skip"]


class RowError(DataError):
    """One row of a source cannot be used; `reason` is what such rows are counted under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type["RowError"], tuple[str, str]]:  # comes whole from another process
        return RowError, (self.reason, str(self))


Placed = tuple[str, Record | RowError]  # where it stands, for messages, and the record or what is wrong with it

LINES, WHOLE = (".jsonl", ".ndjson"), (".txt", ".text", ".md")
LOADERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".arrow": "arrow"}
READABLE = (*LINES, ".json", *WHOLE, *LOADERS)
COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}
LINE_BYTES = 256 * 1024 * 1024
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # owner/name


class Faults:
    """What becomes of rows that cannot be used: the first one stops everything, or they are counted and left out."""

    def __init__(self, on_error: OnError = "stop") -> None:
        self.on_error = on_error
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, fault: RowError) -> None:
        """Count a fault. Raises it where `on_error` is stop."""
        if self.on_error == "stop":
            raise fault
        self.counts[fault.reason] += 1
        self.first.setdefault(fault.reason, str(fault))

    def report(self) -> str:
        """One line for each reason: how many rows, and the first of them."""
        return "\n".join(
            f"{count} x {reason}; the first: {self.first[reason]}" for reason, count in self.counts.items()
        )


def read_records(path: str, *, split: str, name: str | None, cache_dir: Path) -> Iterator[Placed]:
    """The records of a file, glob, folder or hub data set, in order, each with its place.

    A row that cannot be read comes as a RowError, which names file and line. Raises DataError for what is missing or
    cannot be read at all.
    """
    if is_hub_id(path):
        yield from _hub_records(path, split, name, cache_dir)
    elif _is_saved_dataset(Path(path)):
        yield from _saved_records(Path(path), split)
    else:
        for file in find_files(path, split):
            yield from _file_records(file, cache_dir)


def is_hub_id(path: str) -> bool:
    """Whether `path` can only be the name of a data set on the hub."""
    place = Path(path)  # a missing file of a folder that is there is a missing file
    is_local = place.exists() or place.parent.is_dir() or _suffix(place) in READABLE
    return HUB_ID.fullmatch(path) is not None and not is_local


def find_files(path: str, split: str = "train") -> list[Path]:
    """The files that `path` (file, glob or folder) means, sorted; of a folder with splits those of `split`."""
    place = Path(path)
    if place.is_file():
        return [place]
    if place.is_dir():
        found = sorted(file for file in place.rglob("*") if _suffix(file) in READABLE and not _hidden(file, place))
        if not found:
            raise DataError(f"{path}: no data files in this folder; expected {', '.join(READABLE)}, also with .gz")
        return _of_split(found, place, split)
    files = sorted(Path(file) for file in glob.glob(path, recursive=True) if Path(file).is_file())
    if not files:
        what = "no file matches" if glob.has_magic(path) else "no such file or folder"
        raise DataError(f"{path}: {what} (looked from {Path.cwd()})")
    return files


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


def _of_split(files: list[Path], folder: Path, split: str) -> list[Path]:
    """The files whose name or folder says `split`; all of them where none says any split."""
    by_split: dict[str, list[Path]] = {}
    for file in files:
        words = set(re.split(r"[^a-z]+", file.relative_to(folder).as_posix().lower()))
        said = next((name for name, names in SPLIT_NAMES.items() if words & set(names)), "")
        by_split.setdefault(said, []).append(file)
    if set(by_split) == {""}:
        return files
    if split not in by_split:
        there = ", ".join(sorted(name for name in by_split if name))
        raise DataError(f"{folder}: no files for the split {split!r}; there are files for: {there}")
    return by_split[split]


def _file_records(file: Path, cache_dir: Path) -> Iterator[Placed]:
    suffix = _suffix(file)
    if suffix in LOADERS:
        yield from _table_records(file, LOADERS[suffix], cache_dir)
        return
    if suffix not in READABLE:
        raise DataError(f"{file}: cannot tell what this is by its name; expected {', '.join(READABLE)}, also with .gz")
    try:
        with open_bytes(file) as stream:
            if suffix in WHOLE:
                yield str(file), _whole(stream.read(), str(file))
            elif suffix == ".json":
                yield from _json_records(file, _decoded(stream.read(), str(file)))
            else:
                yield from _lines(file, stream)
    except _broken_compression() as error:
        # what came before is there; what would have followed is one fault
        message = f"{file}: broken or cut off compressed file: {error}"
        yield str(file), RowError("broken compressed file", message)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error}") from None


def open_bytes(file: Path) -> IO[bytes]:
    """A file, unpacked where its name says that it is compressed."""
    if file.suffix == ".zst":
        try:
            opened: IO[bytes] = importlib.import_module("zstandard").open(file, "rb")
        except ImportError:
            raise DataError(f"{file}: .zst files need another library: pip install zstandard") from None
        return opened
    return COMPRESSED.get(file.suffix, open)(file, "rb")


def _broken_compression() -> tuple[type[Exception], ...]:
    zstandard = sys.modules.get("zstandard")
    known = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
    return (*known, zstandard.ZstdError) if zstandard else known


def _whole(data: bytes, place: str) -> Record | RowError:
    try:
        return {"text": _decoded(data, place)}
    except RowError as error:
        return error


def _lines(file: Path, stream: IO[bytes]) -> Iterator[Placed]:
    for number, line in enumerate(_bounded(stream), 1):
        if line is None or line.strip():
            place = f"{file}, line {number}"
            yield place, _parsed(line, place)


def _bounded(stream: IO[bytes]) -> Iterator[bytes | None]:
    """The lines; None for one that is longer than `LINE_BYTES`, of which no more than that is ever in memory."""
    while line := stream.readline(LINE_BYTES):
        if len(line) < LINE_BYTES or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(LINE_BYTES)
        yield None


def _json_records(file: Path, text: str) -> Iterator[Placed]:
    """A .json file: an array of objects, or one object a line."""
    if not text.lstrip().startswith("["):
        yield from _lines(file, io.BytesIO(text.encode()))
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {error.lineno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not valid JSON: {error}") from None
    for number, row in enumerate(rows, 1):
        place = f"{file}, row {number}"
        yield place, _checked(row, place, may_hold_surrogates=True)


def _parsed(line: bytes | None, place: str) -> Record | RowError:
    """The record in a line, or what is wrong with it."""
    if line is None:
        return RowError("line too long", f"{place}: longer than {LINE_BYTES:,} bytes")
    try:
        text = _decoded(line, place)
        # JSON can name halves of characters outside the basic plane, which are no text when they stand alone.
        return _checked(json.loads(text), place, may_hold_surrogates=b"\\ud" in line.lower())
    except RowError as error:
        return error
    except json.JSONDecodeError as error:
        message = f"{place}: not valid JSON ({error.msg}, column {error.colno}): {_short(text)}"
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, thousands of brackets
        message = f"{place}: not valid JSON ({error}): {_short(text)}"
    return RowError("not valid JSON", message)


def _checked(row: Any, place: str, may_hold_surrogates: bool) -> Record | RowError:
    if not isinstance(row, dict):
        message = f"{place}: expected an object with named columns, found {_short(row)}"
        return RowError("not an object with columns", message)
    if may_hold_surrogates:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return RowError("half characters", f"{place}: half of a surrogate pair, which is no character, in the text")
    return row


def _decoded(data: bytes, place: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RowError("not UTF-8", f"{place}: not UTF-8 text: {error.reason} at byte {error.start}") from None


def _table_records(file: Path, loader: str, cache_dir: Path) -> Iterator[Placed]:
    options: dict[str, Any] = {"sep": "\t"} if ".tsv" in file.suffixes else {}
    options |= {"data_files": str(file), "cache_dir": str(cache_dir / "datasets")}
    try:
        rows = datasets_library().load_dataset(loader, split="train", streaming=True, **options)
        for number, row in enumerate(rows, 1):
            yield f"{file}, row {number}", dict(row)
    except DataError:
        raise
    except Exception as error:  # each format's reader has errors of its own
        raise DataError(f"{file}: cannot be read as {loader}: {_cause(error)}") from None


def _hub_records(path: str, split: str, name: str | None, cache_dir: Path) -> Iterator[Placed]:
    try:
        rows = datasets_library().load_dataset(path, name, split=split, cache_dir=str(cache_dir / "datasets"))
    except Exception as error:  # network, access, names: each has errors of its own
        said = str(error).split("\n")[0]
        raise DataError(f"{path}: no file or folder here, nor a data set that the hub gives: {said}") from None
    for number, row in enumerate(rows, 1):
        yield f"{path} ({split}), row {number}", dict(row)


def _saved_records(folder: Path, split: str) -> Iterator[Placed]:
    """A folder written by `save_to_disk`."""
    found = datasets_library().load_from_disk(str(folder))
    if isinstance(found, dict):
        if split not in found:
            raise DataError(f"{folder}: no split {split!r}; there are: {', '.join(found)}")
        found = found[split]
    for number, row in enumerate(found, 1):
        yield f"{folder}, row {number}", dict(row)


def datasets_library() -> Any:
    """The `datasets` module; imported when first needed, because that takes most of a second."""
    datasets = importlib.import_module("datasets")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets


def _is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _suffix(file: Path) -> str:
    return (file.with_suffix("") if file.suffix in (*COMPRESSED, ".zst") else file).suffix.lower()


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith((".", "_")) for part in file.relative_to(folder).parts)


def _cause(error: BaseException) -> str:
    """The innermost error, in one line: the outer ones only say that something went wrong."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return f"{type(error).__name__}: {error}".split("\n")[0]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:120] + " ..."
