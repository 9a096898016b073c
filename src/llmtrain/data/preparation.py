"""Documents → tokens, once: in parallel, portion by portion, into the files that `shards.py` reads.

A prepared source is a folder `tokens-<digest>` whose name follows from everything its content depends on (files,
tokenizer, options), so it is used again when nothing changed, and a new one is made when something did. Until it is
complete it is `tokens-<digest>.partial`: finished shards in there are not made again after an interruption. Each shard
is a function of its portion alone: its bytes depend neither on the number of processes nor on interruptions.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from safetensors.numpy import save_file

from llmtrain.config.errors import DataError
from llmtrain.config.schema import CleaningConfig, CorpusConfig, SourceConfig
from llmtrain.config.token_paths import names_token_files
from llmtrain.data.cleaning import Cleaner, cleaning_key
from llmtrain.data.distinct import clean_portion, cleaned_file, mark_duplicates, read_distinct, remove_texts
from llmtrain.data.documents import Document, Portion, assign_splits, find_portions, read_portion
from llmtrain.data.embedded import PREFIX, embedded_version
from llmtrain.data.files import FileDigests, find_files, is_hub_id
from llmtrain.data.jobs import Job, Progress, run_unfinished, write_json
from llmtrain.data.mapped_tokens import open_token_source
from llmtrain.data.records import HINT, Split
from llmtrain.data.shards import Manifest, PreparedSource, PreparedTokens, Shard, SplitSummary, read_manifest
from llmtrain.data.tables import is_saved_dataset
from llmtrain.data.tokenizers import Tokenizer
from llmtrain.data.workers import advance

log = logging.getLogger(__name__)

DIGESTS = "file-digests.json"
FORMAT = 2  # raise when the same documents would give other files than before
SHARD_TOKENS = 32 * 1024 * 1024
ENCODED_CHARACTERS = 250_000  # in one call of the tokenizer
LONG_DOCUMENT = 1_000_000  # characters; longer ones are encoded in parts, cut between words
SPLITS: tuple[Split, ...] = ("train", "validation")


def prepare_sources(
    data: CorpusConfig, *, tokenizer: Tokenizer, cache_dir: Path, processes: int | None = None
) -> dict[str, PreparedSource]:
    """The tokens of every source: from `cache_dir` where they are there already, else made and put there.

    Of token files nothing is made: they are read where they are. `processes`: None is one for each core. Raises
    DataError for what is missing, cannot be read or has no text; and for a source that was prepared without its faulty
    rows, where `data.on_error` is stop.
    """
    cleaners: dict[str, Cleaner] = {}
    texts = {name: source for name, source in data.sources.items() if not names_token_files(source.path)}
    jobs = {name: _plan(name, source, data, tokenizer, cache_dir, cleaners) for name, source in texts.items()}
    wanted = list({job.folder: job for job in jobs.values() if not job.is_complete}.values())
    with _locks(wanted):
        _prepare([job for job in wanted if not job.is_complete], processes)  # some may have been made meanwhile
    digests = FileDigests(cache_dir / DIGESTS)
    return {
        name: _open(jobs[name]) if name in jobs else open_token_source(name, source, data, tokenizer, digests)
        for name, source in data.sources.items()
    }


def _prepare(jobs: list[Job], processes: int | None) -> None:
    try:
        for job in jobs:
            log.info("%s: encoding %s", job.name, job.source.path)
            job.partial.mkdir(parents=True, exist_ok=True)
        distinct = [job for job in jobs if job.drops_duplicates]
        if distinct:
            run_unfinished("cleaning", clean_portion, cleaned_file, distinct, processes)
            for job in distinct:
                mark_duplicates(job)
        run_unfinished("encoding", encode_portion, encoded_file, jobs, processes)
        for job in jobs:
            _finish(job)
    finally:
        for job in jobs:
            _remove_empty(job)


def describe_source(
    source: SourceConfig, validation_every: int, cleaning: CleaningConfig, cache_dir: Path
) -> dict[str, Any]:
    """Everything that decides which documents there are, beside the code: digests of the files and the options."""
    own_validation = source.validation_path is not None
    held_out = _content(source.validation_path, source, "validation", cache_dir) if source.validation_path else None
    return {
        "content": _content(source.path, source, source.split, cache_dir),
        "validation": held_out,
        "text_column": source.text_column,
        "max_documents": source.max_documents,
        "validation_every": None if own_validation else validation_every,
        "cleaning": cleaning_key(cleaning, FileDigests(cache_dir / DIGESTS)),
    }


def encode_portion(job: Job, number: int) -> None:
    """Make the shards of one portion, from where an interrupted one stopped.

    Raises RowError for a row that cannot be used, unless such rows are to be skipped.
    """
    portion, progress = job.portions[number], Progress.read(encoded_file(job, number))
    writers = {split: _Writer(job, number, split) for split in SPLITS}
    if job.drops_duplicates:
        batches = read_distinct(job, number, progress.rows)
    else:
        batches = read_portion(portion, job.source, job.cache_dir, clean=job.clean, first_row=progress.rows)
    for batch in batches:
        documents = assign_splits(portion, batch, progress.documents, job.validation_every)
        progress.add(batch, job.on_error)
        _encode(job.tokenizer, documents, portion, writers)
        advance(sum(len(document.text) for document in documents))
        if batch.is_last or max(writer.num_tokens for writer in writers.values()) >= SHARD_TOKENS:
            progress.shards += [shard for writer in writers.values() for shard in writer.flush(len(progress.shards))]
            progress.done = batch.is_last
            progress.write(encoded_file(job, number))


class _Writer:
    """Gathers the tokens of one split of a portion, and writes them as a shard."""

    def __init__(self, job: Job, portion: int, split: Split) -> None:
        self.folder, self.portion, self.split = job.partial, portion, split
        self.dtype: type[np.uint16] | type[np.uint32] = np.uint16 if job.tokenizer.vocab_size <= 2**16 else np.uint32
        self._clear()

    def add(self, tokens: list[NDArray[Any]], text: bytes, piece: int, row: int) -> None:
        self.num_tokens += sum(map(len, tokens))
        self.num_bytes += len(text)
        self.content.update(len(text).to_bytes(8) + text)
        self.tokens += tokens
        self.ends.append(self.num_tokens)
        self.pieces.append(piece)
        self.rows.append(row)

    def flush(self, number: int) -> list[dict[str, Any]]:
        """Write what there is; what to say of it, or nothing where there is none."""
        if not self.ends:
            return []
        name = f"{self.split}-{self.portion:05d}-{number:05d}.safetensors"
        aside = self.folder / f".{name}.partial"
        tensors = {
            "tokens": np.concatenate(self.tokens), "ends": np.array(self.ends, dtype=np.int64),
            "pieces": np.array(self.pieces, dtype=np.uint32), "rows": np.array(self.rows, dtype=np.uint64),
        }  # fmt: skip
        save_file(tensors, aside)
        os.replace(aside, self.folder / name)
        said = {
            "split": self.split, "file": name, "tokens": self.num_tokens, "documents": len(self.ends),
            "bytes": self.num_bytes, "content": self.content.hexdigest(),
        }  # fmt: skip
        self._clear()
        return [said]

    def _clear(self) -> None:
        self.num_tokens = self.num_bytes = 0
        self.content = hashlib.sha256()
        self.tokens: list[NDArray[Any]] = []
        self.ends: list[int] = []
        self.pieces: list[int] = []
        self.rows: list[int] = []


def _encode(
    tokenizer: Tokenizer, documents: Sequence[Document], portion: Portion, writers: Mapping[Split, _Writer]
) -> None:
    numbers = {piece: number for number, piece in enumerate(portion.pieces)}
    parts = [list(_parts(document.text)) for document in documents]
    encoded = _encoded(tokenizer, [part for each in parts for part in each])
    for document, texts in zip(documents, parts, strict=True):
        writer = writers[document.split]
        tokens = [np.array(next(encoded), dtype=writer.dtype) for _ in texts]
        end = np.array([tokenizer.eos_id], dtype=writer.dtype)
        writer.add([*tokens, end], document.text.encode(), numbers[document.place.piece], document.place.number)


def _encoded(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[list[int]]:
    """The ids of each text; a few at a time, because the library needs a hundred bytes for a token meanwhile."""
    start = size = 0
    for end, text in enumerate(texts, 1):
        size += len(text)
        if size >= ENCODED_CHARACTERS or end == len(texts):
            yield from tokenizer.encode_batch(texts[start:end])
            start, size = end, 0


def _parts(text: str) -> Iterator[str]:
    """A text in parts that the tokenizer can take at once."""
    start = 0
    while len(text) - start > LONG_DOCUMENT:
        middle, end = start + LONG_DOCUMENT // 2, start + LONG_DOCUMENT
        # before a space or a line break: there most tokenizers begin a new word anyway
        cut = max(text.rfind(" ", middle, end), text.rfind("\n", middle, end))
        end = cut if cut > 0 else end
        yield text[start:end]
        start = end
    yield text[start:]


def _plan(
    name: str, source: SourceConfig, data: CorpusConfig, tokenizer: Tokenizer, cache_dir: Path,
    cleaners: dict[str, Cleaner],
) -> Job:  # fmt: skip
    cleaning = source.cleaning or data.cleaning
    options = describe_source(source, data.validation_every, cleaning, cache_dir)
    key = json.dumps([FORMAT, tokenizer.digest, options], sort_keys=True)
    folder = cache_dir / f"tokens-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if (folder / "manifest.json").is_file():  # nothing is to be read
        return Job(name, folder, source, [], tokenizer, options, 0, data.on_error, cleaning, None, cache_dir)
    if cleaning != CleaningConfig() and repr(cleaning) not in cleaners:
        cleaners[repr(cleaning)] = Cleaner(cleaning, cache_dir)  # shared by sources: it may hold the evaluation sets
    return Job(
        name, folder, source, find_portions(source, cache_dir), tokenizer, options, data.validation_every,
        data.on_error, cleaning, cleaners.get(repr(cleaning)), cache_dir,
    )  # fmt: skip


def _content(path: str, source: SourceConfig, part: str, cache_dir: Path) -> Any:
    if path.startswith(PREFIX):
        return embedded_version(path.removeprefix(PREFIX))
    if is_hub_id(path):
        return [path, source.name, part]
    digests = FileDigests(cache_dir / DIGESTS)
    return [[Path(file).name, digests(file)] for file in find_files(path, part)]


def _finish(job: Job) -> None:
    """Put what is said of the portions together, and give the folder its name."""
    manifest = _manifest(job)
    if not manifest.train.documents and not manifest.validation.documents:
        raise DataError(f"{job.source.path}: no documents in there{_left_out(manifest)}")
    write_json(job.partial / "manifest.json", dataclasses.asdict(manifest))
    remove_texts(job)
    for number in range(len(job.portions)):
        encoded_file(job, number).unlink()
    os.replace(job.partial, job.folder)


def _remove_empty(job: Job) -> None:
    """Leave nothing where nothing was finished."""
    finished = [*job.partial.glob("*.safetensors"), *job.partial.glob("cleaned-*.json")]
    if job.partial.is_dir() and not finished:
        shutil.rmtree(job.partial)


def _manifest(job: Job) -> Manifest:
    numbers = range(len(job.portions))
    encoded = [Progress.read(encoded_file(job, number)) for number in numbers]
    # where duplicates are left out, the rows are those that were cleaned; what was encoded are their texts
    cleaned = [Progress.read(cleaned_file(job, number)) for number in numbers] if job.drops_duplicates else []
    rows, used = sum(each.rows for each in cleaned or encoded), sum(each.documents for each in encoded)
    left_out = sum(each.left_out for each in [*cleaned, *encoded])
    faults: dict[str, tuple[int, str]] = {}
    for progress in cleaned or encoded:
        for reason, (count, first) in progress.faults.items():
            before, earliest = faults.get(reason, (0, first))
            faults[reason] = (before + count, earliest)
    assert rows == used + left_out + sum(count for count, _ in faults.values()), "rows were lost"
    return Manifest(
        source=job.source.path, tokenizer=job.tokenizer.digest, options=job.options, rows=rows, left_out=left_out,
        faults=faults, counts=dict(sum((Counter(each.counts) for each in [*cleaned, *encoded]), Counter())),
        train=_summary(encoded, "train"), validation=_summary(encoded, "validation"),
        portions=tuple(portion.pieces for portion in job.portions),
    )  # fmt: skip


def _summary(done: list[Progress], split: Split) -> SplitSummary:
    shards = [(number, each) for number, progress in enumerate(done) for each in progress.shards]
    chosen = [(number, each) for number, each in shards if each["split"] == split]
    content = hashlib.sha256("".join(each["content"] for _, each in chosen).encode())
    return SplitSummary(
        documents=sum(each["documents"] for _, each in chosen), bytes=sum(each["bytes"] for _, each in chosen),
        tokens=sum(each["tokens"] for _, each in chosen), content=content.hexdigest(),
        shards=tuple(Shard(each["file"], number, each["tokens"], each["documents"]) for number, each in chosen),
    )  # fmt: skip


def _open(job: Job) -> PreparedSource:
    """What was prepared. Says what was left out; raises DataError where that is not wanted."""
    manifest = _as_named_now(read_manifest(job.folder), job.source)
    if manifest.faults and job.on_error == "stop":
        raise DataError(f"data.sources.{job.name}: rows that cannot be used{_left_out(manifest)}\n{HINT}")
    if manifest.faults or manifest.counts:
        log.warning("data.sources.%s: of %d rows%s", job.name, manifest.rows, _left_out(manifest))
    return PreparedSource(*(PreparedTokens(job.folder, manifest, split) for split in SPLITS))


def _as_named_now(manifest: Manifest, source: SourceConfig) -> Manifest:
    """The manifest with the files where they lie today: the same content may have been elsewhere when it was made."""
    manifest = dataclasses.replace(manifest, source=source.path)
    paths = [(source.path, source.split), (source.validation_path, "validation")]
    if any(path and (path.startswith(PREFIX) or is_hub_id(path) or is_saved_dataset(Path(path))) for path, _ in paths):
        return manifest
    files = dict.fromkeys(file for path, split in paths if path for file in find_files(path, split))
    before = dict.fromkeys(piece.file for pieces in manifest.portions for piece in pieces)
    now = dict(zip(before, files, strict=True)) if len(before) == len(files) else {}
    portions = tuple(
        tuple(piece._replace(file=now.get(piece.file, piece.file)) for piece in pieces) for pieces in manifest.portions
    )  # fmt: skip
    return dataclasses.replace(manifest, portions=portions)


def _left_out(manifest: Manifest) -> str:
    faults = [f"{count:,} x {reason}; the first: {first}" for reason, (count, first) in manifest.faults.items()]
    counts = [f"{count:,} x {reason}" for reason, count in manifest.counts.items()]
    return "".join(f"\n  {line}" for line in [*faults, *counts])


def encoded_file(job: Job, number: int) -> Path:
    """Where it says how far the encoding of a portion is."""
    return job.partial / f"encoded-{number:05d}.json"


@contextmanager
def _locks(jobs: list[Job]) -> Iterator[None]:
    """Keep other processes from preparing the same sources; always in one order, so that nobody waits in a ring."""
    with ExitStack() as held:
        for job in sorted(jobs, key=lambda job: job.folder):
            job.folder.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(job.folder.with_name(f"{job.folder.name}.lock"))
            try:
                lock.acquire(blocking=False)
            except Timeout:
                log.info("%s: another process is preparing it; waiting until it is done", job.name)
                lock.acquire()
            held.callback(lock.release)
        yield
