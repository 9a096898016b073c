"""Files of tokens that others have made, memory-mapped: what is in them, and where documents end.

Read are Megatron-LM's indexed data sets (NAME.bin with NAME.idx), `.npy` arrays of one dimension, and flat `.bin`
files: bare numbers (nanoGPT) or with the header of llm.c and modded-nanogpt. All but `.npy` are little-endian.
"""

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from llmtrain.config.errors import DataError
from llmtrain.config.token_paths import TOKEN_SUFFIXES, is_indexed_prefix
from llmtrain.data.files import find_files, is_compressed, suffix_of

CHUNK = 1 << 20  # tokens that are looked at, at a time
FIRST_LOOK = 4096  # tokens at the beginning of each file that are checked before anything is trained

INDEX_MAGIC, OLD_INDEX_MAGIC = b"MMIDIDX\x00\x00", b"TNTIDX\x00\x00"
INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the type, sequences, entries of the document index
INDEX_TYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
FLOATING = (6, 7)

FLAT_HEADER = 256  # int32 numbers: magic, version, tokens, and zeros
FLAT_TYPES = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # GPT-2's tokens, Llama 3's


class TokenFile:
    """A flat file: a document ends with each end token, and with the file. Positions are counted in tokens."""

    def __init__(self, path: str, tokens: NDArray[Any], end_token: int) -> None:
        self.path, self.tokens, self.end_token = path, tokens, end_token
        self._counted = [0]  # end tokens before each chunk, as far as somebody has asked

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    @property
    def parts(self) -> list[str]:
        """The files that it consists of."""
        return [self.path]

    def ends(self, start: int, end: int) -> NDArray[np.int64]:
        """Where documents end, in (start, end]."""
        chunks = [self._ends(first, min(first + CHUNK, end)) for first in range(start, end, CHUNK)]
        found = np.concatenate([np.zeros(0, dtype=np.int64), *chunks])
        is_open = end == len(self) and (not len(found) or found[-1] != end)
        return np.append(found, end) if is_open else found

    def document_at(self, token: int) -> int:
        """How many documents end up to `token`: the number of the one that holds it.

        The file is read up to there, once: the counts are kept.
        """
        chunk, rest = divmod(token, CHUNK)
        for first in range((len(self._counted) - 1) * CHUNK, chunk * CHUNK, CHUNK):
            self._counted.append(self._counted[-1] + self._count(first, first + CHUNK))
        is_open = token == len(self) and self.tokens[-1] != self.end_token
        return self._counted[chunk] + self._count(token - rest, token) + int(is_open)

    def _ends(self, start: int, end: int) -> NDArray[np.int64]:
        return np.flatnonzero(self.tokens[start:end] == self.end_token) + start + 1

    def _count(self, start: int, end: int) -> int:
        return int(np.count_nonzero(self.tokens[start:end] == self.end_token))


class IndexedTokenFile(TokenFile):
    """A file whose documents stand in an index; `document_ends` [documents] ascend, and the last is the file's end."""

    def __init__(self, path: str, tokens: NDArray[Any], end_token: int, document_ends: NDArray[np.int64]) -> None:
        super().__init__(path, tokens, end_token)
        self.document_ends = document_ends

    @property
    def parts(self) -> list[str]:
        """The files that it consists of."""
        return [self.path, _index_of(self.path)]

    def ends(self, start: int, end: int) -> NDArray[np.int64]:
        """Where documents end, in (start, end]."""
        low, high = np.searchsorted(self.document_ends, [start, end], side="right")
        return self.document_ends[low:high]

    def document_at(self, token: int) -> int:
        """How many documents end up to `token`: the number of the one that holds it."""
        return int(np.searchsorted(self.document_ends, token, side="right"))


def find_token_files(path: str, split: str) -> list[str]:
    """The token files that a path names, sorted; of NAME.bin and NAME.idx the former. Raises DataError without any."""
    found = [f"{path}.idx"] if is_indexed_prefix(path) else find_files(path, split, TOKEN_SUFFIXES)
    wanted = [file for file in found if suffix_of(file) in TOKEN_SUFFIXES]
    return list(
        dict.fromkeys(str(Path(file).with_suffix(".bin")) if file.endswith(".idx") else file for file in wanted)
    )


def open_token_file(path: str, dtype: str | None, end_token: int) -> TokenFile:
    """A token file, mapped into memory; `dtype`: the config's `token_dtype`. Raises DataError for one that is none."""
    is_array, is_indexed = suffix_of(path) == ".npy", Path(_index_of(path)).is_file()
    if is_compressed(path):
        raise DataError(f"{path}: token files are memory-mapped: unpack it")
    if dtype is not None and (is_array or is_indexed):
        raise DataError(f"{path}: token_dtype={dtype} has no effect: the file says itself what its numbers are")
    try:
        if is_indexed and not is_array:
            return _open_indexed(path, end_token)
        tokens = _read_npy(path) if is_array else _read_flat(path, dtype)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    return TokenFile(path, tokens, end_token)


def _read_npy(path: str) -> NDArray[Any]:
    try:
        array: Any = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OverflowError) as error:  # no array, one of objects, one cut short, no such size
        raise DataError(f"{path}: not a .npy file of numbers: {error}") from None
    if isinstance(array, np.ndarray) and not array.size:
        raise DataError(f"{path}: no tokens in there")
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iu":
        found = f"{array.dtype} of shape {list(array.shape)}" if isinstance(array, np.ndarray) else "several arrays"
        raise DataError(f"{path}: expected whole numbers in one dimension, found {found}")
    return array


def _read_flat(path: str, dtype: str | None) -> NDArray[Any]:
    if (said := _flat_header(path)) is not None:
        if dtype is not None and np.dtype(dtype) != np.dtype(said):
            raise DataError(
                f"{path}: token_dtype={dtype}, but its header says {np.dtype(said)}; leave token_dtype away"
            )
        return _mapped(path, said, 4 * FLAT_HEADER)
    tokens = _mapped(path, np.dtype(dtype or "uint16").newbyteorder("<"))
    first = tokens[:FIRST_LOOK]
    if dtype is None and len(first) >= 64 and first[::2].any() and not first[1::2].any():
        raise DataError(
            f"{path}: every second number is 0, as if they were of 32 bits: "
            "set token_dtype=uint32 for this source, or token_dtype=uint16 if this is right"
        )
    return tokens


def _flat_header(path: str) -> str | None:
    """The type of the numbers behind the header; None where there is none."""
    header = np.fromfile(path, dtype="<i4", count=FLAT_HEADER)
    if len(header) < FLAT_HEADER or int(header[0]) not in {magic for magic, _ in FLAT_TYPES}:
        return None
    magic, version, tokens = header[:3].tolist()
    dtype = FLAT_TYPES.get((magic, version))
    if dtype is None:
        raise DataError(f"{path}: its header says version {version} of {magic}, which is not known here")
    there = (Path(path).stat().st_size - 4 * FLAT_HEADER) / np.dtype(dtype).itemsize
    if there != tokens:
        raise DataError(f"{path}: its header says {tokens:,} tokens, but there are {there:,.0f}; was it cut short?")
    return dtype


def _open_indexed(path: str, end_token: int) -> IndexedTokenFile:
    """A data set of Megatron-LM; its format is described in megatron/core/datasets/readme.md."""
    index = _index_of(path)
    dtype, lengths, pointers, first = _read_index(index)
    tokens = _mapped(path, dtype)
    starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])
    if starts[-1] != len(tokens):
        raise DataError(
            f"{path}: {len(tokens):,} tokens, but {index} speaks of {starts[-1]:,}; do they belong together?"
        )
    if not np.array_equal(starts[:-1] * tokens.itemsize, pointers):
        raise DataError(f"{index}: its sequences do not follow one another in {path}; write the data set anew")
    if not len(first) or first[0] != 0 or first[-1] > len(lengths) or (np.diff(first) < 0).any():
        raise DataError(f"{index}: the places of its documents are not in order")
    # documents without tokens are none; sequences after the last document that was ended are one more
    ends = np.append(starts[first[1:]], len(tokens))
    return IndexedTokenFile(path, tokens, end_token, ends[np.diff(ends, prepend=0) > 0])


def _read_index(index: str) -> tuple[str, NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """Type of the tokens; tokens and first byte of each sequence; first sequence of each document, and all of them."""
    dtype, sequences, documents = _index_header(index)
    there, expected = Path(index).stat().st_size, INDEX_HEADER.size + 12 * sequences + 8 * documents
    if sequences and there == expected + sequences:
        raise DataError(f"{index}: has a mode for each sequence: only text is read, no multimodal data sets")
    if there != expected:
        raise DataError(f"{index}: {there:,} bytes where its header makes {expected:,}; was it cut short?")
    with open(index, "rb") as file:
        file.seek(INDEX_HEADER.size)
        lengths = np.fromfile(file, "<i4", sequences)
        pointers = np.fromfile(file, "<i8", sequences)
        return dtype, lengths, pointers, np.fromfile(file, "<i8", documents)


def _index_header(index: str) -> tuple[str, int, int]:
    """Type of the tokens, number of sequences, entries for documents."""
    with open(index, "rb") as file:
        head = file.read(INDEX_HEADER.size)
    if head.startswith(OLD_INDEX_MAGIC):
        raise DataError(f"{index}: Megatron-LM's older format (TNTIDX); write the data set anew as MMIDIDX (mmap)")
    if len(head) < INDEX_HEADER.size or not head.startswith(INDEX_MAGIC):
        raise DataError(f"{index}: not an index of Megatron-LM: it does not begin with MMIDIDX")
    _, version, code, sequences, documents = INDEX_HEADER.unpack(head)
    if version != 1:
        raise DataError(f"{index}: version {version} of the format; version 1 is read")
    if code not in INDEX_TYPES:
        raise DataError(f"{index}: type {code} of the tokens; {', '.join(map(str, INDEX_TYPES))} are known")
    if code in FLOATING:
        raise DataError(f"{index}: its numbers are {np.dtype(INDEX_TYPES[code])}; tokens are whole numbers")
    return INDEX_TYPES[code], sequences, documents


def _mapped(path: str, dtype: DTypeLike, offset: int = 0) -> NDArray[Any]:
    size, width = Path(path).stat().st_size - offset, np.dtype(dtype).itemsize
    if size <= 0:
        raise DataError(f"{path}: no tokens in there")
    if size % width:
        raise DataError(f"{path}: {size:,} bytes are no whole number of {np.dtype(dtype)}; token_dtype says the type")
    return np.memmap(path, dtype, "r", offset)


def _index_of(path: str) -> str:
    return str(Path(path).with_suffix(".idx"))
