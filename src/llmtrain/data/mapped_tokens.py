"""Token files as a source of a mixture: files one behind the other, of which a split is a range of tokens.

Only what is asked for is read, and checked when it is: an id that the tokenizer does not have is told by its file and
position. Nothing is written.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.errors import DataError
from llmtrain.config.schema import CleaningConfig, CorpusConfig, SourceConfig
from llmtrain.data.files import FileDigests
from llmtrain.data.pieces import Piece, Place
from llmtrain.data.shards import PreparedSource, SplitSummary, TokenSource
from llmtrain.data.token_files import CHUNK, FIRST_LOOK, IndexedTokenFile, TokenFile, find_token_files, open_token_file
from llmtrain.data.tokenizers import Tokenizer

log = logging.getLogger(__name__)

COUNTED_CHUNKS = 64  # of a large source, that stand for all of it when tokens are counted


class MappedTokens(TokenSource):
    """Tokens [begin, end) of files one behind the other, as one split of a source."""

    def __init__(
        self, path: str, files: Sequence[TokenFile], begin: int, end: int, tokenizer: Tokenizer, content: str
    ) -> None:
        self.path, self.tokenizer, self.vocab_size = path, tokenizer.digest, tokenizer.vocab_size
        self.files, self.begin, self.end = files, begin, end
        self._starts = np.cumsum([0, *map(len, files)])
        self.summary = SplitSummary(documents=self._num_documents(), bytes=None, tokens=end - begin, content=content)

    def tokens(self, start: int, end: int) -> NDArray[np.int64]:
        """Tokens [start, end). Raises DataError for one that the tokenizer does not have."""
        ranges = self._ranges(start, end)
        parts = [read_tokens(self.files[file], low, high, self.vocab_size) for file, low, high in ranges]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def ends(self) -> NDArray[np.int64]:
        """Where each document ends, [documents]: in flat files after each end token, for which all of them is read."""
        found = self.ends_within(0, len(self))
        return np.append(found, len(self)) if len(self) else found

    def ends_within(self, start: int, end: int) -> NDArray[np.int64]:
        """The ends of documents in (start, end)."""
        found = [
            self.files[file].ends(low, high) + (self._starts[file] - self.begin)
            for file, low, high in self._ranges(start, end)
        ]  # fmt: skip
        ends = np.concatenate([np.zeros(0, dtype=np.int64), *found])
        return ends[ends < end]

    def documents(self, start: int, end: int) -> list[tuple[int, Place]]:
        """The documents of which tokens [start, end) hold a part: number of each, and where it comes from.

        Flat files do not say the number of a document: what lies before `start` is read for it, once.
        """
        [(first, token, _)] = self._ranges(0, 1) if len(self) else [(0, 0, 0)]
        before_split = self._document_at(first, token)
        found = []
        for number, low, high in self._ranges(start, end):
            file = self.files[number]
            piece = Piece(file.path, "tokens", file.tokens.nbytes)
            ends = file.ends(low, high)
            for token in [low, *ends[ends < high].tolist()]:
                place = Place(piece, file.document_at(token) + 1)
                found.append((self._document_at(number, token) - before_split, place))
        return found

    def find(self, file: str, number: int) -> list[int]:
        """The documents that are number `number` (from 1) of a file; flat files are read for it."""
        [(first, token, _)] = self._ranges(0, 1) if len(self) else [(0, 0, 0)]
        before_split = self._document_at(first, token)
        found = []
        for index, each in enumerate(self.files):
            if each.path == file or each.path.endswith(f"/{file}"):
                starts = [0, *each.ends(0, len(each)).tolist()]
                place = int(self._starts[index]) + starts[number - 1] if 0 < number <= len(starts) else -1
                if self.begin <= place < self.end:
                    found.append(self._document_at(index, starts[number - 1]) - before_split)
        return found

    def token_counts(self, vocab_size: int) -> NDArray[np.int64]:
        """How often each token occurs, [vocab_size]; of a large source in chunks that are spread over it."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        step = max(1, -(-len(self) // (CHUNK * COUNTED_CHUNKS))) * CHUNK
        for start in range(0, len(self), step):
            counts += np.bincount(self.tokens(start, min(start + CHUNK, len(self))), minlength=vocab_size)
        return counts

    def _num_documents(self) -> int | None:
        """Documents of which the split has a part; None where one would have to read everything to know."""
        is_known = all(isinstance(file, IndexedTokenFile) for file in self.files)
        return len(self.ends_within(0, self.end - self.begin)) + 1 if is_known else None

    def _document_at(self, number: int, token: int) -> int:
        """Number, over all files, of the document that holds a token of a file."""
        before = sum(file.document_at(len(file)) for file in self.files[:number])
        return before + self.files[number].document_at(token)

    def _ranges(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """Which tokens of which files [start, end) are: number of the file, and from where to where in it."""
        start, end = self.begin + start, min(self.begin + end, self.end)
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < end:
            first, behind = int(self._starts[number]), int(self._starts[number + 1])
            yield number, start - first, min(end, behind) - first
            start, number = behind, number + 1


def read_tokens(file: TokenFile, start: int, end: int, vocab_size: int) -> NDArray[np.int64]:
    """Tokens [start, end) of a file. Raises DataError for one that a tokenizer of `vocab_size` tokens does not have."""
    tokens = file.tokens[start:end].astype(np.int64)
    wrong = np.flatnonzero((tokens < 0) | (tokens >= vocab_size))
    if len(wrong):
        place = int(wrong[0])
        raise DataError(
            f"{file.path}: token {start + place:,} (the first is 0) is {tokens[place]}, but the tokenizer has only "
            f"0 to {vocab_size - 1}. Name the tokenizer that the file was made with (tokenizer.path); "
            "of a flat .bin file, token_dtype says what its numbers are."
        )
    return tokens


def open_token_source(
    name: str, source: SourceConfig, data: CorpusConfig, tokenizer: Tokenizer, digests: FileDigests
) -> PreparedSource:
    """A source of token files: held out is what `validation_path` names, or the end of it.

    Raises DataError for files that are none, are too short or were made with another tokenizer.
    """
    if (source.cleaning or data.cleaning) != CleaningConfig():
        log.warning("data.sources.%s: data.cleaning leaves token files as they are", name)
    files = _open(source.path, source, source.split, tokenizer)
    if data.sequences == "documents" or not data.attend_across_documents:
        _look_for_ends(files, tokenizer)
    total = sum(map(len, files))
    log.info("data.sources.%s: %s tokens, read as they are (files: %d)", name, f"{total:,}", len(files))
    if source.validation_path is None:
        border = _border(source.path, files, data.validation_every)
        spans = [(files, 0, border), (files, border, total)]
    else:
        held_out = _open(source.validation_path, source, "validation", tokenizer)
        spans = [(files, 0, total), (held_out, 0, sum(map(len, held_out)))]
    train, validation = (
        MappedTokens(source.path, part, begin, end, tokenizer, _content(part, begin, end, digests))
        for part, begin, end in spans
    )
    return PreparedSource(train, validation)


def _open(path: str, source: SourceConfig, split: str, tokenizer: Tokenizer) -> list[TokenFile]:
    found = find_token_files(path, split)
    files = [open_token_file(each, source.token_dtype, tokenizer.eos_id) for each in found]
    for file in files:
        read_tokens(file, 0, FIRST_LOOK, tokenizer.vocab_size)
    return files


def _border(path: str, files: Sequence[TokenFile], every: int) -> int:
    """Where the held-out end begins: it has the last 1/`every` of the documents where an index counts them.

    Else of the tokens; then it begins with the next document that does so soon after, if one does.
    """
    starts = np.cumsum([0, *map(len, files)])
    indexed = [file for file in files if isinstance(file, IndexedTokenFile)]
    if len(indexed) == len(files):
        ends = np.concatenate([file.document_ends + starts[number] for number, file in enumerate(indexed)])
        if len(ends) >= every:
            return int(ends[-(len(ends) // every) - 1])
    total = int(starts[-1])
    held_out = max(2, total // every)
    border = total - held_out
    if border < 2:
        raise DataError(f"{path}: {total} tokens are too few to train on and to hold out some")
    number = int(np.searchsorted(starts, border, side="right")) - 1
    file, local = files[number], border - int(starts[number])
    ends = file.ends(max(local - 1, 0), min(local + min(held_out // 2, CHUNK), len(file)))
    return int(starts[number] + ends[0]) if len(ends) else border


def _look_for_ends(files: Sequence[TokenFile], tokenizer: Tokenizer) -> None:
    """Say where documents cannot be told apart: the file has none, or other end tokens."""
    for file in files:
        first = file.tokens[:CHUNK]
        if not isinstance(file, IndexedTokenFile) and not (first == tokenizer.eos_id).any():
            message = "%s: no end token (%d) in its first %d tokens: they count as one document"
            log.warning(message, file.path, tokenizer.eos_id, len(first))


def _content(files: Sequence[TokenFile], begin: int, end: int, digests: FileDigests) -> str:
    """SHA-256 over what decides the tokens: the files, their types and the range."""
    said = [[[digests(part) for part in file.parts], str(file.tokens.dtype)] for file in files]
    return hashlib.sha256(json.dumps([said, begin, end]).encode()).hexdigest()
