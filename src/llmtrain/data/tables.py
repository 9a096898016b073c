"""Tables that libraries read: Parquet through `pyarrow`; saved data sets and the hub through `datasets`.

Both are imported when first needed: they take most of a second.
"""

import importlib
import io
import sys
from pathlib import Path
from typing import IO, Any

from llmtrain.config.errors import DataError
from llmtrain.data.files import READ_ERRORS, is_compressed

UNPACKED_BYTES = 2**30  # of a compressed table, that are in memory at a time
CSV_ROWS = 10_000  # that `datasets` reads at a time
BLOCK_BYTES = 2**20


def open_parquet(stream: IO[bytes], file: str) -> Any:
    try:
        # the whole file of a compressed stream: its end is needed first
        seekable = io.BytesIO(stream.read(UNPACKED_BYTES + 1)) if is_compressed(file) else stream
    except READ_ERRORS as error:
        raise DataError(f"{file}: broken or cut off compressed file: {error}") from None
    if isinstance(seekable, io.BytesIO) and seekable.getbuffer().nbytes > UNPACKED_BYTES:
        raise DataError(f"{file}: unpacks to more than {UNPACKED_BYTES:,} bytes, and is read whole: unpack it first")
    try:
        return importlib.import_module("pyarrow.parquet").ParquetFile(seekable)
    except Exception as error:  # the library's own
        raise DataError(f"{file}: cannot be read as parquet: {cause(error)}") from None


def check_rows(stream: IO[bytes], file: str) -> None:
    """Raises DataError where rows of CSV that are read at a time do not fit into memory: quotes that are never closed,
    lines without an end."""
    size = rows = inside = 0
    while block := stream.read(BLOCK_BYTES):
        parts = block.split(b'"')  # outside and inside quotes in turn
        rows += sum(part.count(b"\n") for part in parts[inside::2])
        inside = (inside + len(parts) - 1) % 2
        size += len(block)
        if size > UNPACKED_BYTES:
            raise DataError(
                f"{file}: unpacks to {CSV_ROWS:,} rows, or a single one, of more than {UNPACKED_BYTES:,} bytes; is a "
                "quote never closed? Such data can be read as .jsonl."
            )
        if rows >= CSV_ROWS:
            size = rows = 0


def hub_dataset(path: str, name: str | None, split: str, cache_dir: Path, streaming: bool = False) -> Any:
    """A data set of the hub: downloaded, or with `streaming` read as it is iterated over."""
    options: dict[str, Any] = {"split": split, "cache_dir": str(cache_dir / "datasets"), "streaming": streaming}
    try:
        return datasets_library().load_dataset(path, name, **options)
    except Exception as error:  # network, access, names: each has errors of its own
        said = str(error).split("\n")[0]
        raise DataError(f"{path}: no file or folder here, nor a data set that the hub gives: {said}") from None


def saved_dataset(folder: Path, split: str) -> Any:
    """A folder written by `save_to_disk`. Raises DataError for one that cannot be read."""
    try:
        found = datasets_library().load_from_disk(str(folder))
    except Exception as error:  # the library's, pyarrow's, those of JSON
        raise DataError(f"{folder}: cannot be read as a saved data set: {cause(error)}") from None
    if not isinstance(found, dict):
        return found
    if split not in found:
        raise DataError(f"{folder}: no split {split!r}; there are: {', '.join(found)}")
    return found[split]


def datasets_library() -> Any:
    """The `datasets` module; imported when first needed, because that takes most of a second."""
    datasets = importlib.import_module("datasets")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets


def is_saved_dataset(path: Path) -> bool:
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def cause(error: BaseException) -> str:
    """The innermost error, in one line: the outer ones only say that something went wrong."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    return f"{type(error).__name__}: {error}".split("\n")[0]
