"""Token files, written byte by byte."""

import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}


def write_flat(path: Path, documents: Sequence[Sequence[int]], dtype: str = "uint16", magic: int | None = None) -> str:
    tokens = np.concatenate([np.array(each, dtype=np.int64) for each in documents])
    header = b"" if magic is None else struct.pack("<256i", magic, 1, len(tokens), *[0] * 253)
    path.write_bytes(header + tokens.astype(np.dtype(dtype).newbyteorder("<")).tobytes())
    return str(path)


def write_npy(path: Path, documents: Sequence[Sequence[int]], dtype: str = "uint16") -> str:
    np.save(path, np.concatenate([np.array(each) for each in documents]).astype(dtype))
    return str(path)


def write_indexed(path: Path, documents: Sequence[Sequence[Sequence[int]]], dtype: str = "uint16") -> str:
    """NAME.bin and NAME.idx; each document is a list of sequences of tokens."""
    sequences = [sequence for document in documents for sequence in document]
    data = [np.array(each).astype(np.dtype(dtype).newbyteorder("<")).tobytes() for each in sequences]
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], len(sequences), len(documents) + 1)
    index += b"".join(struct.pack("<i", len(each)) for each in sequences)
    index += b"".join(struct.pack("<q", sum(map(len, data[:number]))) for number in range(len(data)))
    index += b"".join(struct.pack("<q", sum(map(len, documents[:number]))) for number in range(len(documents) + 1))
    path.with_suffix(".bin").write_bytes(b"".join(data))
    path.with_suffix(".idx").write_bytes(index)
    return str(path.with_suffix(".bin"))
