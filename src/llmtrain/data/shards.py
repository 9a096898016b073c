"""Sources of tokens, and prepared text as one: memory-mapped files of tokens, and random access to them.

A prepared source is a folder of `.safetensors` files with a `manifest.json` (`preparation.py` makes it). Each file
holds `tokens` (16-bit where the vocabulary allows), and for each document where it ends (`ends`) and where it comes
from (`pieces`, `rows`).
"""

import dataclasses
import json
from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from llmtrain.config.errors import DataError
from llmtrain.data.pieces import Piece, Place, lines_before
from llmtrain.data.records import Split


class Shard(NamedTuple):
    """One file of tokens."""

    file: str
    portion: int
    tokens: int
    documents: int


@dataclasses.dataclass(frozen=True)
class SplitSummary:
    """The training or the held-out part of a source."""

    documents: int | None
    """Number of documents. None: nobody has counted them."""
    bytes: int | None
    """UTF-8 bytes of text in them. None: it was never seen as text."""
    tokens: int
    """Number of tokens, an end token after each document included."""
    content: str
    """SHA-256 over the text of the documents, or over the files of tokens."""
    shards: tuple[Shard, ...] = ()
    """Files of prepared text, in order."""


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says of a prepared source."""

    source: str
    """Path of the source."""
    tokenizer: str
    """Digest of the tokenizer."""
    options: dict[str, Any]
    """What else the tokens depend on: digests of the files, and options."""
    rows: int
    """Rows that were read: used ones, faulty ones, and those left out."""
    left_out: int
    """Rows left out on purpose: empty, or by cleaning."""
    faults: dict[str, tuple[int, str]]
    """Rows that could not be used: how many by reason, and the first of them."""
    counts: dict[str, int]
    """Why rows were left out on purpose, and what else cleaning did."""
    train: SplitSummary
    validation: SplitSummary
    portions: tuple[tuple[Piece, ...], ...]
    """What was read, in order."""


class TokenSource(Protocol):
    """The tokens of one split of a source, document after document, read where they are needed."""

    path: str
    """What the config names."""
    tokenizer: str
    """Digest of the tokenizer."""
    summary: SplitSummary

    def __len__(self) -> int:
        """Number of tokens."""
        return self.summary.tokens

    def num_blocks(self, length: int) -> int:
        """How many blocks of `length` tokens there are; what is left at the end is not used."""
        return len(self) // length

    def block(self, index: int, length: int) -> NDArray[np.int64]:
        """Tokens [index · length, (index + 1) · length), [length]."""
        return self.tokens(index * length, (index + 1) * length)

    def tokens(self, start: int, end: int) -> NDArray[np.int64]:
        """Tokens [start, end)."""
        ...

    def ends(self) -> NDArray[np.int64]:
        """Where each document ends: the number of tokens up to there, its end token included, [documents]."""
        ...

    def ends_within(self, start: int, end: int) -> NDArray[np.int64]:
        """The ends of documents in (start, end)."""
        ...

    def documents(self, start: int, end: int) -> list[tuple[int, Place]]:
        """The documents of which tokens [start, end) hold a part: number of each, and where it comes from."""
        ...

    def find(self, file: str, number: int) -> list[int]:
        """The documents that come from line, row, part or document `number` of a file."""
        ...

    def token_counts(self, vocab_size: int) -> NDArray[np.int64]:
        """How often each token occurs, [vocab_size]."""
        ...


class PreparedTokens(TokenSource):
    """One split of a source that was prepared here."""

    def __init__(self, folder: Path, manifest: Manifest, split: Split) -> None:
        self.folder, self.manifest = folder, manifest
        self.path, self.tokenizer = manifest.source, manifest.tokenizer
        self.summary: SplitSummary = getattr(manifest, split)
        # slices of memory maps: only what is asked for is read
        self._files: dict[int, Any] = {}
        self._starts = np.cumsum([0, *(shard.tokens for shard in self.summary.shards)])
        self._documents_before = np.cumsum([0, *(shard.documents for shard in self.summary.shards)])

    def tokens(self, start: int, end: int) -> NDArray[np.int64]:
        """Tokens [start, end)."""
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        pieces = []
        while start < end:
            first, behind = int(self._starts[number]), int(self._starts[number + 1])
            pieces.append(self._tensor(number, "tokens")[start - first : min(end, behind) - first])
            start, number = behind, number + 1
        return np.concatenate(pieces).astype(np.int64) if pieces else np.zeros(0, dtype=np.int64)

    def ends(self) -> NDArray[np.int64]:
        """Where each document ends: the number of tokens up to there, its end token included, [documents]."""
        shards = range(len(self.summary.shards))
        found = [self._tensor(number, "ends")[:] + self._starts[number] for number in shards]
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)

    def ends_within(self, start: int, end: int) -> NDArray[np.int64]:
        """The ends of documents in (start, end)."""
        found = [np.zeros(0, dtype=np.int64)]
        for number in self._shards_of(start, end):
            first, ends = int(self._starts[number]), self._tensor(number, "ends")
            low = self._documents_until(number, start - first)
            high = min(low + end - start, self.summary.shards[number].documents)  # each has one token at least
            near = ends[low:high] + first
            found.append(near[: np.searchsorted(near, end)])
        return np.concatenate(found)

    def documents(self, start: int, end: int) -> list[tuple[int, Place]]:
        """The documents of which tokens [start, end) hold a part: number of each, and where it comes from."""
        found = []
        for number in self._shards_of(start, end):
            first, before = int(self._starts[number]), int(self._documents_before[number])
            low = self._documents_until(number, max(start - first, 0))
            high = min(self._documents_until(number, end - 1 - first) + 1, self.summary.shards[number].documents)
            found += [(before + document, self._place(number, document)) for document in range(low, high)]
        return found

    def find(self, file: str, number: int) -> list[int]:
        """The documents that come from line, row or part `number` of a file; its name may be given by its end."""
        found = []
        for shard, (_, portion, _, _) in enumerate(self.summary.shards):
            wanted = {
                index: number - (lines_before(piece.file, piece.start) if piece.kind == "lines" else 0)
                for index, piece in enumerate(self.manifest.portions[portion])
                if piece.file == file or piece.file.endswith(f"/{file}")
            }  # fmt: skip
            if wanted:
                pieces, rows = self._tensor(shard, "pieces")[:], self._tensor(shard, "rows")[:]
                for index, row in wanted.items():
                    here = np.flatnonzero((pieces == index) & (rows == np.uint64(max(row, 0))))
                    found += (here + self._documents_before[shard]).tolist()
        return found

    def token_counts(self, vocab_size: int) -> NDArray[np.int64]:
        """How often each token occurs, [vocab_size]."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for number in range(len(self.summary.shards)):
            counts += np.bincount(self._tensor(number, "tokens")[:], minlength=vocab_size)
        return counts

    def _shards_of(self, start: int, end: int) -> range:
        """The shards that hold a part of tokens [start, end)."""
        low, high = np.searchsorted(self._starts, [start, end - 1], side="right")
        return range(int(low) - 1, min(int(high), len(self.summary.shards)))

    def _documents_until(self, number: int, place: int) -> int:
        """How many documents of a shard end at `place` or before; a shard may have millions, so only some are read."""
        ends = self._tensor(number, "ends")
        documents = range(self.summary.shards[number].documents)
        return bisect_right(documents, place, key=lambda document: int(ends[document : document + 1][0]))

    def _place(self, number: int, document: int) -> Place:
        pieces = self.manifest.portions[self.summary.shards[number].portion]
        piece, row = (int(self._tensor(number, name)[document : document + 1][0]) for name in ("pieces", "rows"))
        return Place(pieces[piece], row)

    def _tensor(self, number: int, name: str) -> Any:
        if number not in self._files:
            shard = self.summary.shards[number]
            file = safe_open(self.folder / shard.file, framework="np")
            if file.get_slice("tokens").get_shape()[0] != shard.tokens:
                raise DataError(f"{self.folder}: {shard.file} and manifest.json do not agree; delete the folder")
            self._files[number] = file
        return self._files[number].get_slice(name)


class PreparedSource(NamedTuple):
    """Both parts of a source."""

    train: TokenSource
    validation: TokenSource


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared source. Raises DataError where it cannot be read."""
    try:
        said = json.loads((folder / "manifest.json").read_text())
        faults = {reason: (count, first) for reason, (count, first) in said.pop("faults").items()}
        portions = tuple(tuple(Piece(*piece) for piece in pieces) for pieces in said.pop("portions"))
        train, validation = _summary(said.pop("train")), _summary(said.pop("validation"))
        return Manifest(**said, train=train, validation=validation, faults=faults, portions=portions)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder}: its manifest.json cannot be read ({error}); delete the folder") from None


def _summary(said: dict[str, Any]) -> SplitSummary:
    shards: Sequence[Sequence[Any]] = said.pop("shards")
    return SplitSummary(**said, shards=tuple(Shard(*shard) for shard in shards))
