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
from filelock import FileLock
from numpy.typing import NDArray
from safetensors.numpy import save_file

from llmtrain.config.errors import DataError
from llmtrain.config.schema import CorpusConfig, SourceConfig
from llmtrain.data.documents import Batch, Document, Portion, assign_splits, find_portions, read_portion
from llmtrain.data.embedded import PREFIX, embedded_version
from llmtrain.data.files import FileDigests, find_files, is_hub_id
from llmtrain.data.records import HINT, Faults, RowError, Split
from llmtrain.data.shards import Manifest, PreparedSource, Shard, SplitSummary, open_prepared
from llmtrain.data.tokenizers import Tokenizer
from llmtrain.data.workers import Work, advance, run_all

log = logging.getLogger(__name__)

FORMAT = 2  # raise when the same documents would give other files than before
SHARD_TOKENS = 32 * 1024 * 1024
LONG_DOCUMENT = 1_000_000  # characters; longer ones are encoded in parts, cut between words
SPLITS: tuple[Split, ...] = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class Job:
    """A source to be prepared: everything a process needs to work on one of its portions."""

    name: str
    folder: Path
    source: SourceConfig
    portions: list[Portion]
    tokenizer: Tokenizer
    options: dict[str, Any]
    validation_every: int
    on_error: str
    cache_dir: Path

    @property
    def partial(self) -> Path:
        """Where the files lie until all are there."""
        return self.folder.with_name(f"{self.folder.name}.partial")


def prepare_sources(
    data: CorpusConfig, *, tokenizer: Tokenizer, cache_dir: Path, processes: int | None = None
) -> dict[str, PreparedSource]:
    """The tokens of every source: from `cache_dir` where they are there already, else made and put there.

    `processes`: None is one for each core. Raises DataError for what is missing, cannot be read or has no text; and
    for a source that was prepared without its faulty rows, where `data.on_error` is stop.
    """
    jobs = {
        name: _plan(name, source, data, tokenizer, cache_dir) for name, source in data.sources.items()
    }  # fmt: skip
    wanted = list({job.folder: job for job in jobs.values() if not _is_complete(job)}.values())
    with _locks(wanted):
        missing = [job for job in wanted if not _is_complete(job)]  # another process may have made some meanwhile
        try:
            for job in missing:
                log.info("%s: encoding %s", job.name, job.source.path)
                job.partial.mkdir(parents=True, exist_ok=True)
            _run(encode_portion, missing, processes)
            for job in missing:
                _finish(job)
        finally:
            for job in missing:
                _remove_empty(job)
    prepared = {name: open_prepared(job.folder) for name, job in jobs.items()}
    for name, job in jobs.items():
        _report(name, prepared[name].train.manifest, job.on_error)
    return prepared


def describe_source(source: SourceConfig, validation_every: int, cache_dir: Path) -> dict[str, Any]:
    """Everything that decides which documents there are, beside the code: digests of the files and the options."""
    own_validation = source.validation_path is not None
    held_out = _content(source.validation_path, source, "validation", cache_dir) if source.validation_path else None
    return {
        "content": _content(source.path, source, source.split, cache_dir),
        "validation": held_out,
        "text_column": source.text_column,
        "max_documents": source.max_documents,
        "validation_every": None if own_validation else validation_every,
    }


def encode_portion(job: Job, number: int) -> None:
    """Make the shards of one portion, from where an interrupted one stopped.

    Raises RowError for a row that cannot be used, unless such rows are to be skipped.
    """
    portion = job.portions[number]
    progress = _read_progress(job, number) or Progress()
    faults = Faults("stop" if job.on_error == "stop" else "skip")
    writers = {split: _Writer(job, number, split) for split in SPLITS}
    for batch in read_portion(portion, job.source, job.cache_dir, first_row=progress.rows):
        for fault in batch.faults:
            faults.add(fault)
            progress.add_fault(fault)
        documents = assign_splits(portion, batch, progress.documents, job.validation_every)
        _encode(job.tokenizer, documents, portion, writers)
        progress.add(batch)
        advance(sum(len(document.text) for document in documents))
        if batch.is_last or max(writer.num_tokens for writer in writers.values()) >= SHARD_TOKENS:
            progress.shards += [shard for writer in writers.values() for shard in writer.flush(len(progress.shards))]
            progress.done = batch.is_last
            _write_json(_progress_file(job, number), dataclasses.asdict(progress))


@dataclasses.dataclass
class Progress:
    """What has been written of a portion so far."""

    rows: int = 0
    documents: int = 0
    left_out: int = 0
    faults: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    shards: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    done: bool = False

    def add(self, batch: Batch) -> None:
        """Count a batch."""
        self.rows += batch.rows
        self.documents += len(batch.documents)
        self.left_out += batch.rows - len(batch.documents) - len(batch.faults)
        self.counts = dict(Counter(self.counts) + batch.counts)

    def add_fault(self, fault: RowError) -> None:
        """Count a row that cannot be used."""
        count, first = self.faults.get(fault.reason, (0, str(fault)))
        self.faults[fault.reason] = (count + 1, first)


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
    encoded = iter(tokenizer.encode_batch([part for each in parts for part in each]))
    for document, texts in zip(documents, parts, strict=True):
        writer = writers[document.split]
        tokens = [np.array(next(encoded), dtype=writer.dtype) for _ in texts]
        end = np.array([tokenizer.eos_id], dtype=writer.dtype)
        writer.add([*tokens, end], document.text.encode(), numbers[document.place.piece], document.place.number)


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


def _plan(name: str, source: SourceConfig, data: CorpusConfig, tokenizer: Tokenizer, cache_dir: Path) -> Job:
    options = describe_source(source, data.validation_every, cache_dir)
    key = json.dumps([FORMAT, tokenizer.digest, options], sort_keys=True)
    folder = cache_dir / f"tokens-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    return Job(
        name, folder, source, find_portions(source, cache_dir), tokenizer, options, data.validation_every,
        data.on_error, cache_dir,
    )  # fmt: skip


def _content(path: str, source: SourceConfig, part: str, cache_dir: Path) -> Any:
    if path.startswith(PREFIX):
        return embedded_version(path.removeprefix(PREFIX))
    if is_hub_id(path):
        return [path, source.name, part]
    digests = FileDigests(cache_dir / "file-digests.json")
    return [[Path(file).name, digests(file)] for file in find_files(path, part)]


def _run(work: Work, jobs: list[Job], processes: int | None) -> None:
    """Do what is left of the portions of all jobs."""
    tasks = [
        (index, number)
        for index, job in enumerate(jobs) for number in range(len(job.portions))
        if not (progress := _read_progress(job, number)) or not progress.done
    ]  # fmt: skip
    sizes = [jobs[index].portions[number].size for index, number in tasks]
    run_all("encoding", work, jobs, tasks, sizes, processes)


def _is_complete(job: Job) -> bool:
    return (job.folder / "manifest.json").is_file()


def _finish(job: Job) -> None:
    """Put what is said of the portions together, and give the folder its name."""
    done = [progress for number in range(len(job.portions)) if (progress := _read_progress(job, number))]
    manifest = _manifest(job, done)
    if not manifest.train.documents + manifest.validation.documents:
        raise DataError(f"{job.source.path}: no documents in there{_left_out(manifest)}")
    used, faulty = sum(progress.documents for progress in done), sum(count for count, _ in manifest.faults.values())
    assert manifest.rows == used + faulty + manifest.left_out, "rows were lost"
    _write_json(job.partial / "manifest.json", dataclasses.asdict(manifest))
    for number in range(len(job.portions)):
        _progress_file(job, number).unlink()
    os.replace(job.partial, job.folder)


def _remove_empty(job: Job) -> None:
    """Leave nothing where nothing was finished."""
    if job.partial.is_dir() and not any(job.partial.glob("*.safetensors")):
        shutil.rmtree(job.partial)


def _manifest(job: Job, done: list[Progress]) -> Manifest:
    faults: dict[str, tuple[int, str]] = {}
    for progress in done:
        for reason, (count, first) in progress.faults.items():
            before, earliest = faults.get(reason, (0, first))
            faults[reason] = (before + count, earliest)
    return Manifest(
        source=job.source.path, tokenizer=job.tokenizer.digest, options=job.options,
        rows=sum(progress.rows for progress in done), left_out=sum(progress.left_out for progress in done),
        faults=faults,
        counts=dict(sum((Counter(progress.counts) for progress in done), Counter())),
        train=_summary(done, "train"), validation=_summary(done, "validation"),
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


def _report(name: str, manifest: Manifest, on_error: str) -> None:
    """Say what was left out. Raises DataError where that is not wanted."""
    if manifest.faults and on_error == "stop":
        raise DataError(f"data.sources.{name}: rows that cannot be used{_left_out(manifest)}\n{HINT}")
    if manifest.faults or manifest.counts:
        log.warning("data.sources.%s: of %d rows%s", name, manifest.rows, _left_out(manifest))


def _left_out(manifest: Manifest) -> str:
    faults = [f"{count:,} x {reason}; the first: {first}" for reason, (count, first) in manifest.faults.items()]
    counts = [f"{count:,} x {reason}" for reason, count in manifest.counts.items()]
    return "".join(f"\n  {line}" for line in [*faults, *counts])


def _read_progress(job: Job, number: int) -> Progress | None:
    file = _progress_file(job, number)
    return Progress(**json.loads(file.read_text())) if file.is_file() else None


def _progress_file(job: Job, number: int) -> Path:
    return job.partial / f"portion-{number:05d}.json"


def _write_json(file: Path, said: Any) -> None:
    aside = file.with_name(f".{file.name}.partial")
    aside.write_text(json.dumps(said, indent=1))
    os.replace(aside, file)


@contextmanager
def _locks(jobs: list[Job]) -> Iterator[None]:
    """Keep other processes from preparing the same sources; always in one order, so that nobody waits in a ring."""
    with ExitStack() as held:
        for folder in sorted(job.folder for job in jobs):
            folder.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(folder.with_name(f"{folder.name}.lock")))
        yield
