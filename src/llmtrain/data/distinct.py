"""Duplicates left out: the cleaned texts of a source are kept on disk until it is known which of them stay.

So cleaning, which is slower than encoding, is done once; the kept texts are removed when the source is prepared.
"""

import gzip
import json
import os
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

import numpy as np

from llmtrain.data.deduplication import fingerprints, first_of_each
from llmtrain.data.documents import BATCH_CHARACTERS, Batch, read_portion
from llmtrain.data.jobs import Job, Progress
from llmtrain.data.pieces import Place
from llmtrain.data.workers import advance


def clean_portion(job: Job, number: int) -> None:
    """Clean the texts of a portion and take their fingerprints; both go to files beside the shards."""
    portion, progress = job.portions[number], Progress()
    aside = _texts_file(job, number).with_name(f".texts-{number}.partial")
    tables = [fingerprints([], job.cleaning)]
    pieces = {piece: index for index, piece in enumerate(portion.pieces)}
    with gzip.open(aside, "wt", compresslevel=1, encoding="utf-8") as texts:
        for batch in read_portion(portion, job.source, job.cache_dir, clean=job.clean):
            progress.add(batch, job.on_error)
            tables.append(fingerprints([text for _, text in batch.documents], job.cleaning))
            for place, text in batch.documents:
                texts.write(json.dumps([pieces[place.piece], place.number, text], ensure_ascii=False) + "\n")
            advance(sum(len(text) for _, text in batch.documents))
    os.replace(aside, _texts_file(job, number))
    np.save(_fingerprints_file(job, number), np.asfortranarray(np.concatenate(tables)))
    progress.done = True
    progress.write(cleaned_file(job, number))


def mark_duplicates(job: Job) -> None:
    """Say of every cleaned text whether it stays: of each group of duplicates the first does."""
    numbers = range(len(job.portions))
    tables = [np.load(_fingerprints_file(job, number), mmap_mode="r") for number in numbers]
    for number, stays in zip(numbers, first_of_each(tables, job.cleaning), strict=True):
        np.save(_stays_file(job, number), stays)


def read_distinct(job: Job, number: int, first_row: int) -> Iterator[Batch]:
    """As `read_portion`, of the cleaned texts: those that are no duplicates."""
    pieces = job.portions[number].pieces
    stays = np.load(_stays_file(job, number))
    batch, size = Batch(0, [], [], Counter(), False), 0
    with gzip.open(_texts_file(job, number), "rt", encoding="utf-8", newline="\n") as lines:
        for line, is_first in islice(zip(lines, stays.tolist(), strict=True), first_row, None):
            if size >= BATCH_CHARACTERS:
                yield batch
                batch, size = Batch(0, [], [], Counter(), False), 0
            piece, row, text = json.loads(line)
            size += len(text)
            batch = batch._replace(rows=batch.rows + 1)
            if is_first:
                batch.documents.append((Place(pieces[piece], row), text))
            else:
                batch.counts["duplicate"] += 1
    yield batch._replace(is_last=True)


def remove_texts(job: Job) -> None:
    """Remove what was kept."""
    kept = (_texts_file, _fingerprints_file, _stays_file, cleaned_file)
    for file in chain.from_iterable((path(job, number) for path in kept) for number in range(len(job.portions))):
        file.unlink(missing_ok=True)


def cleaned_file(job: Job, number: int) -> Path:
    """Where it says how the cleaning of a portion went."""
    return job.partial / f"cleaned-{number:05d}.json"


def _texts_file(job: Job, number: int) -> Path:
    return job.partial / f"texts-{number:05d}.jsonl.gz"


def _fingerprints_file(job: Job, number: int) -> Path:
    return job.partial / f"fingerprints-{number:05d}.npy"


def _stays_file(job: Job, number: int) -> Path:
    return job.partial / f"stays-{number:05d}.npy"
