"""Tables that libraries read: Parquet through `pyarrow`; saved data sets and the hub through `datasets`.

Both are imported when first needed: they take most of a second.
"""

import importlib
import io
import sys
from pathlib import Path
from typing import IO, Any

from llmtrain.config.errors import DataError
from llmtrain.data.files import is_compressed


def open_parquet(stream: IO[bytes], file: str) -> Any:
    try:
        # the whole file of a compressed stream: its end is needed first
        seekable = io.BytesIO(stream.read()) if is_compressed(file) else stream
        return importlib.import_module("pyarrow.parquet").ParquetFile(seekable)
    except Exception as error:  # the library's own, and those of the stream
        raise DataError(f"{file}: cannot be read as parquet: {cause(error)}") from None


def hub_dataset(path: str, name: str | None, split: str, cache_dir: Path, streaming: bool = False) -> Any:
    """A data set of the hub: downloaded, or with `streaming` read as it is iterated over."""
    options: dict[str, Any] = {"split": split, "cache_dir": str(cache_dir / "datasets"), "streaming": streaming}
    try:
        return datasets_library().load_dataset(path, name, **options)
    except Exception as error:  # network, access, names: each has errors of its own
        said = str(error).split("\n")[0]
        raise DataError(f"{path}: no file or folder here, nor a data set that the hub gives: {said}") from None


def saved_dataset(folder: Path, split: str) -> Any:
    """A folder written by `save_to_disk`."""
    found = datasets_library().load_from_disk(str(folder))
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
