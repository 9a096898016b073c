import numpy as np
import pytest

from llmtrain.data import words
from llmtrain.data.words import hash_ngrams, hash_words, scramble


def test_the_same_in_every_process_and_version() -> None:
    """Recorded: fingerprints and caches on disk rest on it."""
    assert hash_words("Hello, world").tolist() == [9022087748821825191, 1122476747036766552]
    assert hash_ngrams(hash_words("hello world"), 2).tolist() == [11981956318901255830]


def test_case_and_punctuation_do_not_count() -> None:
    assert hash_words("The cat, the HAT.").tolist() == hash_words("the  cat\nthe hat").tolist()
    assert len(hash_words("... !?")) == 0


@pytest.mark.parametrize(("text", "count"), [("統計學習", 4), ("ภาษา", 4), ("größer als", 2), ("mixed 漢字 text", 4)])
def test_characters_are_words_where_there_are_no_spaces(text: str, count: int) -> None:
    assert len(hash_words(text)) == count


def test_ngrams_are_runs_in_order() -> None:
    one, two = hash_ngrams(hash_words("a b c d e"), 3), hash_ngrams(hash_words("x b c d"), 3)
    assert len(one) == 3
    assert one[1] == two[1]
    assert len({*one.tolist(), *two.tolist()}) == 4
    assert hash_ngrams(hash_words("b a"), 2) != hash_ngrams(hash_words("a b"), 2)


def test_too_few_words_have_no_ngrams() -> None:
    assert hash_ngrams(hash_words("a b"), 3).shape == (0,)


def test_the_memory_for_words_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "_REMEMBERED_WORDS", 10)
    monkeypatch.setattr(words, "_word_hashes", words._WordHashes())
    text = " ".join(f"w{number}" for number in range(100))
    assert hash_words(text).tolist() == hash_words(text).tolist()
    assert len(words._word_hashes) <= 10


def test_scrambling_loses_nothing() -> None:
    assert len(np.unique(scramble(np.arange(10_000, dtype=np.uint64)))) == 10_000
