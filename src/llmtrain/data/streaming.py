"""Text that is encoded while training goes on, for corpora too large to prepare: rows in the order of the stream.

The mixture is as exact as ever, and a run that is resumed draws the same rows: where each source stands is kept in the
checkpoint. But a row can only be had after all before it. The order is random as far as a stream allows: portions in a
new order in every epoch, and documents shuffled within some million characters. Every process reads and encodes all
text, and takes its share of the rows.
"""

import dataclasses
import hashlib
import json
import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.errors import DataError
from llmtrain.config.json_files import read_object
from llmtrain.config.schema import CorpusConfig, SourceConfig
from llmtrain.config.seeds import derive_seed
from llmtrain.data.batches import collate_text, share
from llmtrain.data.cleaning import Cleaner
from llmtrain.data.documents import Batch, Portion, assign_splits, find_portions, read_portion
from llmtrain.data.mixture import PhasedMixture, permute
from llmtrain.data.records import Faults, Split
from llmtrain.data.sequences import TextRow, row_of_documents
from llmtrain.data.tokenizers import Tokenizer
from llmtrain.objectives.next_token import TokenBatch

log = logging.getLogger(__name__)

FILE = "streams.json"


@dataclasses.dataclass
class Position:
    """Where a stream stands."""

    epoch: int = 0
    portion: int = 0
    """Place in the epoch's order of portions."""
    row: int = 0
    """First row of the batch of documents that is being used."""
    documents: int = 0
    """Documents of the portion before that batch."""
    used: int = 0
    """Documents of that batch, in their shuffled order, that rows have begun with."""
    left: list[int] = dataclasses.field(default_factory=list)
    """What the last row has left of the last of them."""


class Stream:
    """One source, row after row, for ever."""

    def __init__(
        self, source: SourceConfig, data: CorpusConfig, tokenizer: Tokenizer, cache_dir: Path, *, length: int, key: int
    ) -> None:
        self.source, self.data, self.tokenizer, self.cache_dir = source, data, tokenizer, cache_dir
        self.length, self.key = length, key
        self.portions = find_portions(source, cache_dir, streaming=True)
        cleaning = source.cleaning or data.cleaning
        self.clean = Cleaner(cleaning, cache_dir)
        self.faults, self.counts = Faults(data.on_error), Counter[str]()
        self.begin(Position())

    def begin(self, position: Position) -> None:
        """Go on from a position."""
        self.position = position
        self._left = np.array(position.left, dtype=np.int64)
        self._documents = self._from(position)

    def where(self) -> Position:
        """Where the next row begins."""
        return dataclasses.replace(self.position, left=self._left.tolist())

    def row(self) -> TextRow:
        """The next row [length]."""
        pieces: list[NDArray[np.int64]] = []
        missing = self.length
        while missing:
            if not len(self._left):
                self._left = next(self._documents)
            pieces.append(self._left[:missing])
            self._left = self._left[missing:]
            missing -= len(pieces[-1])
        return row_of_documents(pieces, self.data.attend_across_documents)

    def said(self) -> dict[str, Any]:
        """What the lineage says of it: what is read, not what is in it."""
        pieces = json.dumps([[piece.file, piece.size, piece.start] for each in self.portions for piece in each.pieces])
        return {"path": self.source.path, "content": hashlib.sha256(pieces.encode()).hexdigest(), "streamed": True}

    def epochs(self) -> float:
        """How often the source has been gone through, to a portion."""
        return self.position.epoch + self.position.portion / len(self._training)

    def left_out(self) -> str:
        """Rows that could not be used, and what cleaning did, since this process began: a line for each reason."""
        counts = [f"{number} x {reason}" for reason, number in self.counts.items()]
        return "\n  ".join([*self.faults.report().splitlines(), *counts])

    def texts(self, split: Split, portions: list[Portion]) -> Iterator[list[str]]:
        """The texts of a split in these portions, batch by batch, in the order of the files.

        Their faults are told when training comes to them; those of held-out files, to which it never comes, here.
        """
        for portion in portions:
            before = 0
            for batch in read_portion(portion, self.source, self.cache_dir, clean=self.clean):
                documents = assign_splits(portion, batch, before, self.data.validation_every)
                before += len(batch.documents)
                if portion.split == "validation":
                    self._count(batch)
                yield [document.text for document in documents if document.split == split]

    def _count(self, batch: Batch) -> None:
        for fault in batch.faults:
            self.faults.add(fault)
        self.counts += batch.counts

    @property
    def _training(self) -> list[Portion]:
        return [portion for portion in self.portions if portion.split != "validation"]

    def _from(self, start: Position) -> Iterator[NDArray[np.int64]]:
        """The documents as tokens, from a position on; `position` is kept up to date."""
        portions = self._training
        for epoch in count(start.epoch):
            order = permute(np.arange(len(portions)), len(portions), derive_seed(self.key, "portions", epoch))
            found = start.epoch == epoch and (start.portion, start.row, start.used) != (0, 0, 0)
            for place in range(start.portion if epoch == start.epoch else 0, len(portions)):
                resumed = start if (epoch, place) == (start.epoch, start.portion) else Position()
                for here, tokens in self._portion(portions[int(order[place])], epoch, place, resumed):
                    self.position, found = here, True
                    yield tokens
            if not found:
                raise DataError(f"{self.source.path}: no documents in there\n  {self.left_out()}")

    def _portion(
        self, portion: Portion, epoch: int, place: int, start: Position
    ) -> Iterator[tuple[Position, NDArray[np.int64]]]:
        row, before, used = start.row, start.documents, start.used
        for batch in read_portion(portion, self.source, self.cache_dir, clean=self.clean, first_row=row):
            self._count(batch)
            documents = assign_splits(portion, batch, before, self.data.validation_every)
            texts = [document.text for document in documents if document.split == "train"]
            key = derive_seed(self.key, "documents", epoch, portion.number, row)
            order = permute(np.arange(len(texts)), len(texts), key).tolist() if texts else []
            encoded = deque(self.tokenizer.encode_batch([texts[number] for number in order[used:]]))
            while encoded:
                used += 1
                tokens = np.array([*encoded.popleft(), self.tokenizer.eos_id], dtype=np.int64)
                yield Position(epoch, place, row, before, used), tokens
            row, before, used = row + batch.rows, before + len(batch.documents), 0


class StreamedBatches:
    """Pretraining rows from streams, by the weights of a mixture; to be asked step after step."""

    def __init__(
        self, streams: Mapping[str, Stream], mixture: PhasedMixture, *, batch_rows: int, first_step: int = 0,
        rank: int = 0, world: int = 1,
    ) -> None:  # fmt: skip
        self.streams, self.mixture, self.batch_rows = streams, mixture, batch_rows
        self.share, self.next_step = share(batch_rows, rank, world), first_step
        self._told: dict[str, str] = {}

    def __call__(self, step: int) -> TokenBatch:
        """This process's rows of the step, which must be the one after the last."""
        assert step == self.next_step, "a stream cannot be asked for any step"
        self.next_step += 1
        source, _ = self.mixture(np.arange(step * self.batch_rows, (step + 1) * self.batch_rows))
        rows = [self.streams[self.mixture.names[number]].row() for number in source.tolist()]
        return collate_text(rows[self.share], source[self.share].tolist())

    def counts(self, steps: int) -> dict[str, float]:
        """Tokens that `steps` steps have used of each source, and how often the streams have begun anew by now."""
        counts: dict[str, float] = {}
        for name, rows in self.mixture.counts(steps * self.batch_rows).items():
            if name in self.streams:
                counts[f"data/{name}/tokens"] = rows * self.streams[name].length
                counts[f"data/{name}/epochs"] = self.streams[name].epochs()
        return counts

    def positions(self) -> Callable[[Path], None]:
        """What puts where the streams stand now into a checkpoint's folder; the log says what they have left out."""
        where = json.dumps({name: dataclasses.asdict(stream.where()) for name, stream in self.streams.items()})
        left_out = {name: stream.left_out() for name, stream in self.streams.items()}
        for name, said in left_out.items():
            if said != self._told.get(name, ""):
                log.warning("data.sources.%s: of the rows read so far\n  %s", name, said)
        self._told = left_out

        def write(folder: Path) -> None:
            (folder / FILE).write_text(where)

        return write


def read_positions(folder: Path) -> dict[str, Position]:
    """Where the streams stood at a checkpoint. Raises DataError for a file that does not say it."""
    said = read_object(folder / FILE, DataError)
    try:
        return {name: Position(**position) for name, position in said.items()}
    except TypeError as error:
        raise DataError(f"{folder / FILE} does not say where streams stood: {error}") from None


class HeldOutTokens:
    """The held-out text of a stream, as far as it is needed, in memory; with the training text that was read for it."""

    def __init__(self, stream: Stream, tokens: int, vocab_size: int) -> None:
        own = [portion for portion in stream.portions if portion.split == "validation"]
        found: list[NDArray[np.int64]] = []
        for texts in stream.texts("validation", own or stream.portions):
            found += [_with_end(ids, stream.tokenizer) for ids in stream.tokenizer.encode_batch(texts)]
            if sum(map(len, found)) >= tokens:
                break
        self._tokens = np.concatenate(found) if found else np.zeros(0, dtype=np.int64)
        self._ends = np.cumsum([len(each) for each in found], dtype=np.int64)
        first = next(stream.texts("train", stream.portions), [])
        counted = [np.bincount(ids, minlength=vocab_size) for ids in stream.tokenizer.encode_batch(first) if ids]
        self.training_counts = np.sum(counted, axis=0) if counted else np.zeros(vocab_size, dtype=np.int64)

    def __len__(self) -> int:
        """Number of tokens."""
        return len(self._tokens)

    def num_blocks(self, length: int) -> int:
        """How many blocks of `length` tokens there are."""
        return len(self) // length

    def tokens(self, start: int, end: int) -> NDArray[np.int64]:
        """Tokens [start, end)."""
        return self._tokens[start:end]

    def ends_within(self, start: int, end: int) -> NDArray[np.int64]:
        """The ends of documents in (start, end)."""
        return self._ends[(self._ends > start) & (self._ends < end)]


def _with_end(ids: list[int], tokenizer: Tokenizer) -> NDArray[np.int64]:
    return np.array([*ids, tokenizer.eos_id], dtype=np.int64)
