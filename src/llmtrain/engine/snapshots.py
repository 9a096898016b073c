"""The state of a run at a step, held still: what each process writes of it, and the file it becomes.

Every process writes one safetensors file. What several hold alike (replicas) is written by one of them, so that all
have about as much to write. The header says where in the whole tensor each piece lies, as torch's own distributed
safetensors do: `torch.distributed.checkpoint` reads the files into any other layout.
"""

import dataclasses
import hashlib
import json
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from llmtrain.engine.distributed import Layout, local, of_every

# As safetensors names them.
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
# Bytes that are digested and written in turn, so that they are still in the processor's cache when they are written.
PORTION = 1 << 20


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a tensor that one process holds."""

    name: str
    offsets: tuple[int, ...]
    """Where it begins in the whole tensor, in each dimension."""
    values: Tensor


class Snapshots:
    """Takes the pieces that this process is to write; in memory of their own if `aside`, which is used again."""

    def __init__(self, layout: Layout, *, aside: bool) -> None:
        self.layout, self.aside = layout, aside
        self._memory: dict[str, Tensor] = {}
        self._assigned_for: list[tuple[str, torch.Size]] = []
        self._own: set[str] = set()

    def take(self, state: dict[str, Tensor]) -> list[Piece]:
        """The pieces as they are now; all processes call this together.

        Aside, they stay as they are until the next call; else they are the live ones.
        """
        signature = [(name, value.shape) for name, value in state.items()]
        if signature != self._assigned_for:
            self._own, self._assigned_for, self._memory = self._assign(state), signature, {}
        pieces = [Piece(name, _offsets(state[name]), local(state[name])) for name in state if name in self._own]
        return self._copied(pieces) if self.aside else pieces

    def _assign(self, state: dict[str, Tensor]) -> set[str]:
        """The names that this process writes: of those who hold a piece, the one with the least to write so far."""
        mine = [(name, _offsets(value), local(value).nbytes) for name, value in state.items() if local(value).numel()]
        if self.layout.world == 1:
            return {name for name, _, _ in mine}
        of_all = of_every(mine, self.layout)
        holders: dict[tuple[int, str, tuple[int, ...]], list[int]] = {}
        for rank, pieces in enumerate(of_all):
            for name, offsets, size in pieces:
                holders.setdefault((-size, name, offsets), []).append(rank)
        load, own = [0] * len(of_all), set()
        for (size, name, _), ranks in sorted(holders.items()):
            writer = min(ranks, key=lambda rank: load[rank])
            load[writer] -= size
            if writer == self.layout.rank:
                own.add(name)
        return own

    def _copied(self, pieces: list[Piece]) -> list[Piece]:
        on_gpu = self.layout.device.type == "cuda"
        for piece in pieces:
            memory = self._memory.get(piece.name)
            if memory is None or memory.dtype != piece.values.dtype:
                shape, dtype = piece.values.shape, piece.values.dtype
                memory = self._memory[piece.name] = torch.empty(shape, dtype=dtype, pin_memory=on_gpu)
            memory.copy_(piece.values, non_blocking=on_gpu)
        if on_gpu:
            torch.cuda.current_stream(self.layout.device).synchronize()
        return [dataclasses.replace(piece, values=self._memory[piece.name]) for piece in pieces]


def all_finite(values: list[Tensor]) -> bool:
    """Whether no value is NaN or infinite. A sum tells at once, unless finite values add up to an infinite one."""
    floating = [local(value) for value in values if value.is_floating_point()]
    if not floating:
        return True
    sums = torch.stack([value.sum(dtype=torch.float32) for value in floating])
    return bool(sums.isfinite().all()) or all(bool(value.isfinite().all()) for value in floating)


def write(path: Path, pieces: list[Piece]) -> str:
    """Write the pieces as a safetensors file, and onto the disk; the file's sha256. Raises OSError."""
    # large elements first, as safetensors orders them, so that each tensor is aligned in the file
    pieces = sorted(pieces, key=lambda piece: (-piece.values.element_size(), piece.name))
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        for portion in _content(pieces):
            digest.update(portion)
            left = memoryview(portion)
            while left:  # a disk that is nearly full takes a part, and then fails
                left = left[file.write(left) :]
        os.fsync(file.fileno())
    return digest.hexdigest()


def _content(pieces: list[Piece]) -> Iterator[bytes | memoryview]:
    header = _header(pieces)
    yield struct.pack("<Q", len(header)) + header
    for piece in pieces:
        whole = piece.values.detach().cpu().contiguous().view(torch.uint8).flatten().numpy().data
        for start in range(0, len(whole), PORTION):
            yield whole[start : start + PORTION]


def _header(pieces: list[Piece]) -> bytes:
    places = {piece.name: {"saved_offsets": piece.offsets} for piece in pieces}
    header: dict[str, object] = {"__metadata__": {"format": "pt", "DCP_SHARDING_INFO": json.dumps(places)}}
    end = 0
    for piece in pieces:
        begin, end = end, end + piece.values.nbytes
        header[piece.name] = {
            "dtype": DTYPES[piece.values.dtype], "shape": list(piece.values.shape), "data_offsets": [begin, end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


def _offsets(value: Tensor) -> tuple[int, ...]:
    """Where this process's part begins in the whole tensor."""
    if hasattr(value, "__create_chunk_list__"):  # a DTensor
        return tuple(value.__create_chunk_list__()[0].offsets)
    return (0,) * value.dim()
