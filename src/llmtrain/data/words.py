"""Text → hashes of its words and of their n-grams: what decontamination and near-duplicate detection compare.

The hashes are the same in every process, on every machine and for every Python, so they may be kept on disk.
"""

import hashlib
import re

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]

# Scripts written without spaces (Thai, Lao, Burmese, Khmer, Chinese, Japanese): each character is a word.
_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(f"[{_SPACELESS}]|[^\\W{_SPACELESS}]+")
_REMEMBERED_WORDS = 1_000_000  # about 150 MB
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, odd


class _WordHashes(dict[str, int]):
    """64-bit hash of a word, remembered: text repeats its words."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _REMEMBERED_WORDS:
            self.clear()
        digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
        return self.setdefault(word, int.from_bytes(digest, "little"))


_word_hashes = _WordHashes()


def hash_words(text: str) -> Hashes:
    """Hashes of the words of a text, [words]: lower case, without punctuation."""
    words = _WORD.findall(text.lower())
    return np.fromiter(map(_word_hashes.__getitem__, words), np.uint64, len(words))


def hash_ngrams(words: Hashes, length: int) -> Hashes:
    """Hashes of all runs of `length` words, [words - length + 1]; empty where there are fewer words."""
    count = max(len(words) - length + 1, 0)
    hashes = np.zeros(count, np.uint64)
    for offset in range(length):
        hashes = hashes * _FACTOR + words[offset : offset + count]
    return scramble(hashes)


def scramble(values: Hashes) -> Hashes:
    """A bijection of 64-bit integers after which near ones are far apart (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
