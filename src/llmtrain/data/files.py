"""Paths, globs, folders and URLs → files, and files → bytes.

A file is named by a string: a local path, or a URL that `fsspec` knows (s3://, gs://, hf://, https://, memory://, ...).
"""

import bz2
import glob
import gzip
import hashlib
import importlib
import io
import json
import lzma
import math
import os
import re
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any

from llmtrain.config.errors import DataError

LINES, WHOLE = (".jsonl", ".ndjson"), (".txt", ".text", ".md")
LOADERS = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".arrow": "arrow"}
READABLE = (*LINES, ".json", *WHOLE, *LOADERS)
COMPRESSED: dict[str, Callable[..., Any]] = {
    ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": lambda file, mode: _open_zstandard(file),
}  # fmt: skip
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)  # of files that are broken, cut off, or not readable
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval"),
}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # owner/name


def is_url(path: str) -> bool:
    """Whether `path` is a URL and no local path."""
    return "://" in path


def is_hub_id(path: str) -> bool:
    """Whether `path` can only be the name of a data set on the hub."""
    place = Path(path)  # a missing file of a folder that is there is a missing file
    is_local = place.exists() or place.parent.is_dir() or suffix_of(path) in READABLE
    return HUB_ID.fullmatch(path) is not None and not is_local


def suffix_of(file: str) -> str:
    """What kind of file this is, by its name; how it is compressed is left aside."""
    name = PurePosixPath(file)
    return (name.with_suffix("") if is_compressed(file) else name).suffix.lower()


def is_compressed(file: str) -> bool:
    """Whether the name says that the file is compressed."""
    return PurePosixPath(file).suffix in COMPRESSED


def find_files(path: str, split: str = "train", suffixes: tuple[str, ...] = READABLE) -> list[str]:
    """The files that `path` (file, glob, folder or URL) means, sorted; of a folder with splits those of `split`.

    Raises DataError where there are none.
    """
    if is_url(path):
        return _find_remote(path, split, suffixes)
    place = Path(path)
    if place.is_file():
        return [path]
    if place.is_dir():
        inside = {file.relative_to(place).as_posix(): str(file) for file in place.rglob("*") if file.is_file()}
        return _in_folder(inside, path, split, suffixes)
    files = sorted(file for file in glob.glob(path, recursive=True) if Path(file).is_file())
    if not files:
        what = "no file matches" if glob.has_magic(path) else "no such file or folder"
        raise DataError(f"{path}: {what} (looked from {Path.cwd()})")
    return files


def open_bytes(file: str) -> IO[bytes]:
    """A file, unpacked where its name says that it is compressed."""
    raw: Any = _remote(file)[0].open(_remote(file)[1], "rb") if is_url(file) else file
    suffix = PurePosixPath(file).suffix
    if suffix in COMPRESSED:
        stream: IO[bytes] = COMPRESSED[suffix](raw, "rb")
        return stream
    return raw if is_url(file) else open(file, "rb")


def _open_zstandard(file: Any) -> IO[bytes]:
    arrow = importlib.import_module("pyarrow")
    raw = arrow.OSFile(file) if isinstance(file, str) else arrow.PythonFile(file, mode="r")
    # not the zstandard library: it takes a file that was cut off for a whole one
    stream: Any = arrow.CompressedInputStream(raw, "zstd")
    return io.BufferedReader(stream)


def file_size(file: str) -> int:
    """Bytes of a file as it lies there."""
    if is_url(file):
        system, path = _remote(file)
        return int(system.size(path) or 0)
    return os.path.getsize(file)


class FileDigests:
    """SHA-256 of files, remembered by path, size and time of change, so that an unchanged file is not read again.

    The memory is written when the first file was read and then once a second: there may be many thousand small files.
    For a URL it is what the file system tells files apart by: an ETag, or size and time of change.
    """

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._known: dict[str, list[Any]] = json.loads(memory.read_text()) if memory.is_file() else {}
        self._written = -math.inf

    def __call__(self, file: str) -> str:
        """The digest of a file, in hexadecimal."""
        if is_url(file):
            system, inside = _remote(file)
            return str(system.ukey(inside))
        path, status = str(Path(file).resolve()), os.stat(file)
        stamp = [status.st_size, status.st_mtime_ns]
        known = self._known.get(path)
        if known is None or known[:2] != stamp:
            with open(file, "rb") as stream:
                known = [*stamp, hashlib.file_digest(stream, "sha256").hexdigest()]
            self._known[path] = known
            if time.monotonic() - self._written > 1:
                self._write()
        return str(known[2])

    def _write(self) -> None:
        self._memory.parent.mkdir(parents=True, exist_ok=True)
        aside = self._memory.with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(self._known, indent=0))
        aside.replace(self._memory)
        self._written = time.monotonic()


def _find_remote(path: str, split: str, suffixes: tuple[str, ...]) -> list[str]:
    system, inside = _remote(path)
    try:
        if glob.has_magic(inside):
            files = [str(system.unstrip_protocol(file)) for file in sorted(system.glob(inside))]
        elif system.isdir(inside):
            found = {
                file.removeprefix(inside.rstrip("/")).lstrip("/"): str(system.unstrip_protocol(file))
                for file in system.find(inside)
            }
            return _in_folder(found, path, split, suffixes)
        else:
            files = [path] if system.exists(inside) else []
    except Exception as error:  # network and access: each file system has errors of its own
        raise DataError(f"{path}: cannot be reached: {type(error).__name__}: {error}") from None
    if not files:
        raise DataError(f"{path}: no such file")
    return files


def _remote(path: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    try:
        system, inside = importlib.import_module("fsspec").core.url_to_fs(path)
    except (ImportError, ValueError) as error:  # "Install s3fs to access S3", an unknown protocol
        raise DataError(f"{path}: {error}") from None
    return system, inside


def _in_folder(files: Mapping[str, str], folder: str, split: str, suffixes: tuple[str, ...]) -> list[str]:
    """The data files of a folder, given as path inside it → file; of a folder with splits those of `split`.

    A file's own name or that of a folder on its way says the split; where none does, all files are taken.
    """
    by_split: dict[str, list[str]] = {}
    for inside, file in sorted(files.items()):
        if suffix_of(file) in suffixes and not any(part.startswith((".", "_")) for part in inside.split("/")):
            words = set(re.split(r"[^a-z]+", inside.lower()))
            said = next((name for name, names in SPLIT_NAMES.items() if words & set(names)), "")
            by_split.setdefault(said, []).append(file)
    if not by_split:
        raise DataError(f"{folder}: no data files in this folder; expected {', '.join(suffixes)}, also with .gz")
    if set(by_split) == {""}:
        return by_split[""]
    if split not in by_split:
        there = ", ".join(sorted(name for name in by_split if name))
        raise DataError(f"{folder}: no files for the split {split!r}; there are files for: {there}")
    return by_split[split]
