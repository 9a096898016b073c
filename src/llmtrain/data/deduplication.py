"""Documents → fingerprints, and fingerprints → which documents stay: the first of each group of duplicates.

Exact duplicates have the same text but for spaces. Near-duplicates share most of their shingles (runs of five words):
the share of MinHash values on which two documents agree estimates the Jaccard similarity s of their shingle sets
(Broder 1997, "On the resemblance and containment of documents"). The values are cut into b bands of r rows each, and
two documents are taken for duplicates when they agree on a whole band, which happens with the probability

    p(s) = 1 - (1 - s^r)^b        (Leskovec, Rajaraman and Ullman, Mining of Massive Datasets, section 3.4.2)

For a wanted similarity, r is as large as p(s) >= 0.9 allows with b * r <= 128 values, because more rows mean fewer
false hits. For 0.8 that is 16 bands of 8 rows: p is 0.06 at s = 0.5, 0.24 at 0.6, 0.61 at 0.7, 0.95 at 0.8, 1.00 at
0.9. Being duplicates is transitive: what is linked by way of a third document is one group.
"""

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.schema import CleaningConfig
from llmtrain.data.words import Hashes, hash_ngrams, hash_words, scramble

Mask = NDArray[np.bool_]
Indices = NDArray[np.int64]

SHINGLE_WORDS = 5
MINHASH_VALUES = 128
FOUND = 0.9  # of the pairs at the wanted similarity
EXACT_COLUMNS = 2  # 128 bits: at 10^10 documents, one false hit has a chance of 10^-19
BLOCK_SHINGLES = 256  # times 128 values of 8 bytes fit into the cache of a core
PARTITION_ROWS = 1 << 24  # rows that are sorted at once: about 0.6 GB
CHUNK_ROWS = 1 << 20

_odd = scramble(np.arange(1, MINHASH_VALUES + 1, dtype=np.uint64)) | np.uint64(1)
_shift = scramble(np.arange(MINHASH_VALUES + 1, 2 * MINHASH_VALUES + 1, dtype=np.uint64))


def bands(similarity: float) -> tuple[int, int]:
    """Number of bands and rows in each, chosen as the module says."""
    shapes = ((MINHASH_VALUES // rows, rows) for rows in range(MINHASH_VALUES, 0, -1))
    return next((count, rows) for count, rows in shapes if chance_of_a_hit(similarity, count, rows) >= FOUND)


def chance_of_a_hit(similarity: float, count: int, rows: int) -> float:
    """The probability p(s) that two documents of this similarity agree on at least one of `count` bands."""
    return 1 - (1 - similarity**rows) ** count


def fingerprints(texts: Sequence[str], config: CleaningConfig) -> Hashes:
    """What `first_of_each` compares, [texts, columns]: a 128-bit digest of the text, then a hash for each band.

    Columns are contiguous (Fortran order, which `numpy.save` keeps), because they are read one after another.
    """
    parts = [np.empty((len(texts), 0), np.uint64)]
    if config.exact_duplicates:
        parts.append(np.array([_digest(text) for text in texts], np.uint64).reshape(-1, EXACT_COLUMNS))
    if config.near_duplicates:
        parts.append(_band_hashes(texts, *bands(config.near_similarity)))
    return np.asfortranarray(np.concatenate(parts, axis=1))


def _digest(text: str) -> Hashes:
    same = " ".join(unicodedata.normalize("NFC", text).split())
    return np.frombuffer(hashlib.blake2b(same.encode(), digest_size=16).digest(), "<u8")


def _band_hashes(texts: Sequence[str], count: int, rows: int) -> Hashes:
    signatures = np.array([_minhash(_shingles(text), count * rows) for text in texts], np.uint64)
    signatures = signatures.reshape(len(texts), count, rows)
    hashes = np.zeros((len(texts), count), np.uint64)
    for row in range(rows):
        hashes = scramble(hashes + signatures[:, :, row])
    return hashes


def _shingles(text: str) -> Hashes:
    """Hashes of the runs of five words, [shingles]; of all words where there are fewer, of the text without any."""
    words = hash_words(text)
    return hash_ngrams(words, min(len(words), SHINGLE_WORDS)) if len(words) else _digest(text)[:1]


def _minhash(shingles: Hashes, values: int) -> Hashes:
    """The least of the shingles under each of `values` permutations x → a x + b mod 2^64 with odd a, [values]."""
    least = np.full(values, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(shingles), BLOCK_SHINGLES):
        permuted = shingles[start : start + BLOCK_SHINGLES, None] * _odd[:values] + _shift[:values]
        np.minimum(least, permuted.min(axis=0), out=least)
    return least


def first_of_each(
    tables: Sequence[Hashes], config: CleaningConfig, *, partition_rows: int = PARTITION_ROWS
) -> list[Mask]:
    """Which documents stay, [documents] for each table of fingerprints: the first of every group of duplicates.

    The tables stand in the order of the documents, may be memory maps, and may cut the documents anywhere. Needs 8
    bytes a document, and about 40 a row for `partition_rows` rows at a time; reads each column once a partition.
    """
    total = sum(map(len, tables))
    firsts = np.arange(total, dtype=np.int64)  # union-find: each document points at itself or at an earlier one
    partitions = max(1, -(-total // partition_rows))
    for columns in _keys(config):
        for partition in range(partitions):
            _join(firsts, *_pairs(*_rows(tables, columns, partition, partitions)))
    starts = np.cumsum([0, *map(len, tables)])
    return [firsts[start:end] == np.arange(start, end) for start, end in pairwise(starts)]


def _keys(config: CleaningConfig) -> list[slice]:
    """The columns that must agree together for two documents to be duplicates."""
    exact = EXACT_COLUMNS if config.exact_duplicates else 0
    near = bands(config.near_similarity)[0] if config.near_duplicates else 0
    return [slice(0, exact)] * bool(exact) + [slice(column, column + 1) for column in range(exact, exact + near)]


def _rows(tables: Sequence[Hashes], columns: slice, partition: int, partitions: int) -> tuple[Hashes, Indices]:
    """The hashes [rows, columns] that fall into a partition, and the documents' numbers [rows], ascending."""
    hashes, numbers = [], []
    for first, chunk in _chunks(tables, columns):
        chosen = np.flatnonzero(chunk[:, 0] % np.uint64(partitions) == partition)
        hashes.append(chunk[chosen])
        numbers.append(chosen + first)
    if not hashes:
        return np.empty((0, 1), np.uint64), np.empty(0, np.int64)
    return np.concatenate(hashes), np.concatenate(numbers)


def _chunks(tables: Sequence[Hashes], columns: slice) -> Iterator[tuple[int, Hashes]]:
    """Pieces of the tables, each with the number of its first document."""
    first = 0
    for table in tables:
        for start in range(0, len(table), CHUNK_ROWS):
            yield first + start, table[start : start + CHUNK_ROWS, columns]
        first += len(table)


def _pairs(hashes: Hashes, numbers: Indices) -> tuple[Indices, Indices]:
    """Every document whose hashes an earlier one has too, as (the first with these hashes, the document)."""
    order = np.lexsort(hashes.T)  # stable, so documents with the same hashes stay in order
    hashes, numbers = hashes[order], numbers[order]
    repeated = np.zeros(len(numbers), np.bool_)
    repeated[1:] = (hashes[1:] == hashes[:-1]).all(axis=1)
    heads = np.maximum.accumulate(np.where(repeated, 0, np.arange(len(numbers))))
    return numbers[heads[repeated]], numbers[repeated]


def _join(firsts: Indices, one: Indices, other: Indices) -> None:
    """Make one group of the groups of each pair, in place: the later group's first points at the earlier one's."""
    while len(one):
        one, other = _find(firsts, one), _find(firsts, other)
        apart = one != other
        earlier, later = np.minimum(one, other)[apart], np.maximum(one, other)[apart]
        np.minimum.at(firsts, later, earlier)  # of several, the earliest; the others are joined in the next round
        one, other = earlier, later


def _find(firsts: Indices, documents: Indices) -> Indices:
    """The first document of each one's group; the way there is shortened."""
    found = firsts[documents]
    while not np.array_equal(above := firsts[found], found):
        found = above
    firsts[documents] = found
    return found
