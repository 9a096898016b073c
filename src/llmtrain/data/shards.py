"""Documents → tokens once → memory-mapped files, and random access to them.

A prepared source is a folder `tokens-<digest>` of `.safetensors` files (one tensor `tokens` each, 16-bit where the
vocabulary allows) with a `manifest.json`. Its name follows from everything the tokens depend on, so it is used again
when nothing changed, and a new one is made when something did. It gets its name only when it is complete.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from llmtrain.config.errors import DataError
from llmtrain.config.schema import SourceConfig
from llmtrain.data.documents import read_documents
from llmtrain.data.embedded import PREFIX, embedded_version
from llmtrain.data.records import Faults, Split, find_files, is_hub_id
from llmtrain.data.tokenizers import Tokenizer

log = logging.getLogger(__name__)

FORMAT = 1  # raise when the same documents would give other tokens than before
SHARD_TOKENS = 64 * 1024 * 1024
BATCH_CHARACTERS = 4_000_000  # text that is encoded in one call, for the tokenizer's threads to share


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says of a prepared source."""

    source: str
    """Path of the source."""
    split: str
    """train or validation."""
    documents: int
    """Number of documents."""
    bytes: int
    """UTF-8 bytes of text in them."""
    tokens: int
    """Number of tokens, an end token after each document included."""
    tokenizer: str
    """Digest of the tokenizer."""
    content: str
    """SHA-256 over the text of the documents."""
    options: dict[str, Any]
    """What else the tokens depend on."""
    shards: tuple[tuple[str, int], ...]
    """File names and their numbers of tokens."""


class TokenSource:
    """The tokens of a prepared source, document after document, read where they are needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        # Slices of memory maps: only what is asked for is read.
        files = [folder / name for name, _ in self.manifest.shards]
        self._shards = [safe_open(file, framework="np").get_slice("tokens") for file in files]
        self._starts = np.cumsum([0, *(shard.get_shape()[0] for shard in self._shards)])
        if self._starts[-1] != self.manifest.tokens:
            raise DataError(f"{folder}: its files and its manifest.json do not agree; delete the folder")

    def __len__(self) -> int:
        """Number of tokens."""
        return self.manifest.tokens

    def num_blocks(self, length: int) -> int:
        """How many blocks of `length` tokens there are; what is left at the end is not used."""
        return len(self) // length

    def block(self, index: int, length: int) -> NDArray[np.int64]:
        """Tokens [index · length, (index + 1) · length), [length]."""
        start, end = index * length, (index + 1) * length
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        pieces = []
        while start < end:
            first, behind = int(self._starts[shard]), int(self._starts[shard + 1])
            pieces.append(self._shards[shard][start - first : min(end, behind) - first])
            start, shard = behind, shard + 1
        return np.concatenate(pieces).astype(np.int64)

    def token_counts(self, vocab_size: int) -> NDArray[np.int64]:
        """How often each token occurs, [vocab_size]."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for shard in self._shards:
            counts += np.bincount(shard[:], minlength=vocab_size)
        return counts


def prepare_tokens(
    source: SourceConfig, *, tokenizer: Tokenizer, split: Split, validation_every: int, cache_dir: Path
) -> TokenSource:
    """The tokens of a source: from `cache_dir` where they are there already, else made and put there.

    Raises DataError for what `read_documents` refuses.
    """
    options = describe_source(source, split, validation_every, cache_dir)
    key = json.dumps([FORMAT, tokenizer.digest, options], sort_keys=True)
    folder = cache_dir / f"tokens-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not (folder / "manifest.json").is_file():
        log.info("%s (%s): encoding", source.path, split)
        documents = read_documents(source, validation_every, split, cache_dir, Faults())
        _write(folder, documents, tokenizer, {"source": source.path, "split": split, "options": options})
    return TokenSource(folder)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared source."""
    said = json.loads((folder / "manifest.json").read_text())
    return Manifest(**{**said, "shards": tuple((name, count) for name, count in said["shards"])})


def describe_source(source: SourceConfig, split: Split, validation_every: int, cache_dir: Path) -> dict[str, Any]:
    """Everything that decides which documents there are, beside the code: digests of the files and the options."""
    own_validation = source.validation_path is not None
    path = source.validation_path if split == "validation" and source.validation_path else source.path
    return {
        "content": _content(path, source, split if own_validation else "train", cache_dir),
        "text_column": source.text_column,
        "max_documents": source.max_documents,
        "split": "all" if own_validation else split,
        "validation_every": None if own_validation else validation_every,
    }


def _content(path: str, source: SourceConfig, split: Split, cache_dir: Path) -> Any:
    part = source.split if split == "train" else "validation"
    if path.startswith(PREFIX):
        return embedded_version(path.removeprefix(PREFIX))
    if is_hub_id(path):
        return [path, source.name, part]
    digests = FileDigests(cache_dir / "file-digests.json")
    return [[file.name, digests(file)] for file in find_files(path, part)]


class FileDigests:
    """SHA-256 of files, remembered by path, size and time of change, so that an unchanged file is not read again."""

    def __init__(self, memory: Path) -> None:
        self._memory = memory
        self._known: dict[str, list[Any]] = json.loads(memory.read_text()) if memory.is_file() else {}

    def __call__(self, file: Path) -> str:
        """The digest of a file, in hexadecimal."""
        path, status = str(file.resolve()), file.stat()
        stamp = [status.st_size, status.st_mtime_ns]
        known = self._known.get(path)
        if known is None or known[:2] != stamp:
            with file.open("rb") as stream:
                known = [*stamp, hashlib.file_digest(stream, "sha256").hexdigest()]
            self._known[path] = known
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            aside = self._memory.with_suffix(f".{os.getpid()}")
            aside.write_text(json.dumps(self._known, indent=0))
            aside.replace(self._memory)
        return str(known[2])


def _write(folder: Path, documents: Iterable[str], tokenizer: Tokenizer, said: dict[str, Any]) -> None:
    """Make the folder aside and rename it. Where another process was quicker, its folder is as good as ours."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        writer = _Writer(aside, tokenizer)
        for batch in _portions(documents):
            writer.add(batch)
        writer.close(said)
        try:
            aside.rename(folder)
        except OSError:
            if not (folder / "manifest.json").is_file():
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


class _Writer:
    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.dtype: type[np.uint16] | type[np.uint32] = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
        self.content = hashlib.sha256()
        self.documents = self.bytes = self.waiting_tokens = 0
        self.waiting: list[NDArray[Any]] = []
        self.shards: list[tuple[str, int]] = []

    def add(self, texts: list[str]) -> None:
        for text, ids in zip(texts, self.tokenizer.encode_batch(texts), strict=True):
            data = text.encode()
            self.content.update(len(data).to_bytes(8) + data)
            self.documents += 1
            self.bytes += len(data)
            self.waiting.append(np.array([*ids, self.tokenizer.eos_id], dtype=self.dtype))
            self.waiting_tokens += len(ids) + 1
        if self.waiting_tokens >= SHARD_TOKENS:
            self.flush()

    def flush(self) -> None:
        if self.waiting:
            name = f"{len(self.shards):05d}.safetensors"
            save_file({"tokens": np.concatenate(self.waiting)}, self.folder / name)
            self.shards.append((name, self.waiting_tokens))
            self.waiting, self.waiting_tokens = [], 0

    def close(self, said: dict[str, Any]) -> None:
        self.flush()
        manifest = Manifest(
            **said, documents=self.documents, bytes=self.bytes, tokens=sum(count for _, count in self.shards),
            tokenizer=self.tokenizer.digest, content=self.content.hexdigest(), shards=tuple(self.shards),
        )  # fmt: skip
        (self.folder / "manifest.json").write_text(json.dumps(dataclasses.asdict(manifest), indent=1))


def _portions(documents: Iterable[str]) -> Iterator[list[str]]:
    portion: list[str] = []
    size = 0
    for text in documents:
        portion.append(text)
        size += len(text)
        if size >= BATCH_CHARACTERS:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion
