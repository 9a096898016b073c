"""Evaluation sets → the n-grams that training text may not share with them.

Brown et al. 2020, "Language models are few-shot learners", arXiv:2005.14165, appendix C: runs of 13 words, lower case,
without punctuation. Documents are dropped whole, where the paper cuts out the passage.
"""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.config.errors import DataError
from llmtrain.data.records import RowError, read_records
from llmtrain.data.words import Hashes, hash_ngrams, hash_words

log = logging.getLogger(__name__)

EVALUATION_SPLIT = "test"


class EvaluationNgrams:
    """Hashes of all n-grams of evaluation sets: 8 bytes each."""

    def __init__(self, paths: Sequence[str], length: int, cache_dir: Path) -> None:
        self.length = length
        self._hashes = np.unique(np.concatenate([_ngrams(path, length, cache_dir) for path in paths]))

    def __len__(self) -> int:
        """Number of different n-grams."""
        return len(self._hashes)

    def share_with(self, text: str) -> bool:
        """Whether the text has one of the n-grams."""
        own = np.sort(hash_ngrams(hash_words(text), self.length))  # sorted, they are found several times faster
        places = np.searchsorted(self._hashes, own)
        return bool((self._hashes[np.minimum(places, len(self) - 1)] == own).any())


def _ngrams(path: str, length: int, cache_dir: Path) -> Hashes:
    """The n-grams in all texts of an evaluation set. Raises DataError when there is none."""
    found, texts = [], 0
    for _, record in read_records(path, split=EVALUATION_SPLIT, name=None, cache_dir=cache_dir):
        if isinstance(record, RowError):
            raise record
        for text in _strings(record):
            texts += 1
            words = hash_words(text)
            if len(words) >= length:
                found.append(hash_ngrams(words, length))
    if not found:
        cure = "choose a smaller decontaminate_ngram or leave the set away"
        raise DataError(f"{path}: none of its {texts} texts has {length} words, so nothing could be found; {cure}")
    log.info("%s: looking for %d of %d texts, the others have less than %d words", path, len(found), texts, length)
    return np.concatenate(found)


def _strings(value: Any) -> Iterator[str]:
    """All strings in a record, also in lists and objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
