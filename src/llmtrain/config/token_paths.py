"""Which paths name token files: text that somebody has encoded already (`data/token_files.py` reads them)."""

import glob
import os
from collections.abc import Iterable

TOKEN_SUFFIXES = (".npy", ".bin", ".idx")
TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet", ".arrow", ".csv", ".tsv", ".txt", ".text", ".md")
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")


def names_token_files(path: str) -> bool:
    """Whether a path (file, glob, folder, or NAME of NAME.bin and NAME.idx) names token files and no text."""
    return file_kinds(path) == {"tokens"}


def file_kinds(path: str) -> set[str]:
    """Which of "tokens" and "text" there is at a path; what is not there, and a URL, goes by its name."""
    if is_indexed_prefix(path):
        return {"tokens"}
    kinds = set()
    for name in _names(path):
        plain = os.path.splitext(name)[0] if name.endswith(PACKED_SUFFIXES) else name
        suffix = os.path.splitext(plain)[1].lower()
        kinds |= {"tokens"} if suffix in TOKEN_SUFFIXES else {"text"} if suffix in TEXT_SUFFIXES else set()
    return kinds


def is_indexed_prefix(path: str) -> bool:
    """Whether a path is the common part of NAME.bin and NAME.idx, as Megatron-LM names its data sets."""
    return not path.endswith(TOKEN_SUFFIXES) and os.path.isfile(f"{path}.idx")


def _names(path: str) -> Iterable[str]:
    if "://" in path:
        return [path]
    if os.path.isdir(path):
        return (name for _, _, names in os.walk(path) for name in names if not name.startswith((".", "_")))
    return glob.glob(path, recursive=True) if glob.has_magic(path) else [path]
