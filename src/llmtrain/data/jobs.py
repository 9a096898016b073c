"""What is to be prepared, and how far it is: the state that survives an interruption."""

import dataclasses
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmtrain.config.schema import CleaningConfig, SourceConfig
from llmtrain.data.documents import Batch, Cleaner, Portion
from llmtrain.data.records import Faults, OnError
from llmtrain.data.tokenizers import Tokenizer
from llmtrain.data.workers import run_all


@dataclasses.dataclass(frozen=True)
class Job:
    """A source to be prepared: everything a process needs to work on one of its portions."""

    name: str
    folder: Path
    """Where the files will lie when all are there."""
    source: SourceConfig
    portions: list[Portion]
    tokenizer: Tokenizer
    options: dict[str, Any]
    """What the files depend on beside the tokenizer."""
    validation_every: int
    on_error: OnError
    cleaning: CleaningConfig
    clean: Cleaner | None
    cache_dir: Path

    @property
    def partial(self) -> Path:
        """Where the files lie until all are there."""
        return self.folder.with_name(f"{self.folder.name}.partial")

    @property
    def is_complete(self) -> bool:
        """Whether the source is prepared."""
        return (self.folder / "manifest.json").is_file()

    @property
    def drops_duplicates(self) -> bool:
        """Whether all texts must have been seen before the first can be used."""
        return self.cleaning.exact_duplicates or self.cleaning.near_duplicates


@dataclasses.dataclass
class Progress:
    """What has been done with a portion."""

    rows: int = 0
    """Rows read: used, faulty and left out."""
    documents: int = 0
    """Rows used."""
    left_out: int = 0
    """Rows left out on purpose."""
    faults: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)
    """Rows that could not be used, by reason, and the first of them."""
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    """Why rows were left out on purpose, and what else cleaning did."""
    shards: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Files that are complete."""
    done: bool = False

    def add(self, batch: Batch, on_error: OnError) -> None:
        """Count a batch. Raises RowError for a fault where that is to stop the work."""
        faults = Faults(on_error)
        for fault in batch.faults:
            faults.add(fault)
            count, first = self.faults.get(fault.reason, (0, str(fault)))
            self.faults[fault.reason] = (count + 1, first)
        self.rows += batch.rows
        self.documents += len(batch.documents)
        self.left_out += batch.rows - len(batch.documents) - len(batch.faults)
        self.counts = dict(Counter(self.counts) + batch.counts)

    def write(self, file: Path) -> None:
        """Replace the file."""
        write_json(file, dataclasses.asdict(self))

    @classmethod
    def read(cls, file: Path) -> "Progress":
        """What the file says; without one, nothing has been done."""
        return cls(**json.loads(file.read_text())) if file.is_file() else cls()


def run_unfinished(
    what: str, work: Callable[[Job, int], None], file: Callable[[Job, int], Path], jobs: list[Job],
    processes: int | None,
) -> None:  # fmt: skip
    """Do `work` for every portion of the jobs whose progress `file` does not say that it is done."""
    tasks = [
        (index, number)
        for index, job in enumerate(jobs) for number in range(len(job.portions))
        if not Progress.read(file(job, number)).done
    ]  # fmt: skip
    sizes = [jobs[index].portions[number].size for index, number in tasks]
    run_all(what, work, jobs, tasks, sizes, processes)


def write_json(file: Path, said: Any) -> None:
    """Replace a file as a whole."""
    aside = file.with_name(f".{file.name}.partial")
    aside.write_text(json.dumps(said, indent=1))
    os.replace(aside, file)
