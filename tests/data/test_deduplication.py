import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config.schema import CleaningConfig
from llmtrain.data import deduplication
from llmtrain.data.deduplication import bands, chance_of_a_hit, fingerprints, first_of_each

EXACT = CleaningConfig(exact_duplicates=True)
NEAR = CleaningConfig(near_duplicates=True)
BOTH = CleaningConfig(exact_duplicates=True, near_duplicates=True)


def kept(texts: list[str], config: CleaningConfig) -> list[bool]:
    return first_of_each([fingerprints(texts, config)], config)[0].tolist()


def pair(similarity: float, shingles: int, seed: int) -> tuple[str, str]:
    """Two texts whose sets of shingles have this Jaccard similarity: they share a beginning."""
    drawn = random.Random(seed)
    shared = round(2 * shingles * similarity / (1 + similarity))
    words = [str(drawn.getrandbits(60)) for _ in range(2 * (shingles + 4))]
    beginning = words[: shared + 4]
    rest = shingles - shared
    ends = words[shared + 4 :][:rest], words[shared + 4 + rest :][:rest]
    return " ".join(beginning + ends[0]), " ".join(beginning + ends[1])


@pytest.mark.parametrize("similarity", [0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.99])
def test_bands_find_nine_of_ten_with_as_many_rows_as_possible(similarity: float) -> None:
    count, rows = bands(similarity)
    assert count * rows <= 128
    assert chance_of_a_hit(similarity, count, rows) >= 0.9
    assert chance_of_a_hit(similarity, 128 // (rows + 1), rows + 1) < 0.9


def test_the_curve_is_as_documented() -> None:
    assert bands(0.8) == (16, 8)
    curve = {0.5: 0.06, 0.6: 0.24, 0.7: 0.61, 0.8: 0.95, 0.9: 1.0}
    assert {s: round(chance_of_a_hit(s, 16, 8), 2) for s in curve} == curve


def test_exact_duplicates_are_the_same_but_for_spaces() -> None:
    texts = ["a b\n", "A b", " a  b", "a b.", "caf\u00e9", "cafe\u0301", ""]
    assert kept(texts, EXACT) == [True, True, False, True, True, False, True]


def test_minhash_estimates_the_jaccard_similarity() -> None:
    for similarity in (0.2, 0.5, 0.8):
        agree = []
        for seed in range(40):
            one, other = (
                deduplication._minhash(deduplication._shingles(text), 128) for text in pair(similarity, 600, seed)
            )
            agree.append((one == other).mean())
        error = (similarity * (1 - similarity) / 128 / 40) ** 0.5
        assert np.mean(agree) == pytest.approx(similarity, abs=4 * error)
        assert np.std(agree) == pytest.approx(error * 40**0.5, rel=0.5)


@pytest.mark.parametrize("similarity", [0.6, 0.7, 0.8])
def test_near_duplicates_are_found_as_often_as_the_curve_says(similarity: float) -> None:
    found = [kept(list(pair(similarity, 200, seed)), NEAR) == [True, False] for seed in range(300)]
    expected = chance_of_a_hit(similarity, *bands(0.8))
    assert np.mean(found) == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 300) ** 0.5)


def test_near_copies_in_a_crowd() -> None:
    """200 texts over a common vocabulary, each with a copy in which a word of a hundred is another."""
    drawn = random.Random(0)
    vocabulary = [f"w{number}" for number in range(500)]
    originals = [[drawn.choice(vocabulary) for _ in range(300)] for _ in range(200)]
    copies = [
        [drawn.choice(vocabulary) if place % 100 == 50 else word for place, word in enumerate(text)]
        for text in originals
    ]
    stay = kept([" ".join(text) for text in originals + copies], NEAR)
    assert all(stay[:200])
    assert not any(stay[200:])


def test_short_texts_are_compared_whole() -> None:
    texts = ["good morning", "Good morning!", "good", "good evening", "???", "!!!", "???", ""]
    assert kept(texts, NEAR) == [True, False, True, True, True, True, False, True]


def test_groups_are_transitive() -> None:
    table = np.array([[1, 10], [2, 20], [1, 20], [3, 30]], np.uint64)
    near = CleaningConfig(near_duplicates=True, near_similarity=0.995)
    assert bands(near.near_similarity)[0] == 2
    assert first_of_each([table], near)[0].tolist() == [True, False, False, True]
    # The second band links 0 and 1 with the same group, that of 2 and 3, in one step.
    table = np.array([[1, 10], [2, 20], [3, 10], [3, 20]], np.uint64)
    assert first_of_each([table], near)[0].tolist() == [True, False, False, False]


def test_a_fingerprint_is_a_function_of_the_text_alone() -> None:
    texts = [*pair(0.7, 50, 0), "one", ""]
    whole = fingerprints(texts, BOTH)
    assert whole.shape == (4, 18)
    assert whole.flags.f_contiguous
    for number, text in enumerate(texts):
        assert (fingerprints([text], BOTH) == whole[number]).all()
    assert fingerprints([], BOTH).shape == (0, 18)
    assert fingerprints(["a b c d e f"], NEAR)[0, :2].tolist() == [6590129726547860866, 2430117948614726364]


def test_nothing_asked_for_nothing_dropped() -> None:
    assert kept(["a", "a"], CleaningConfig()) == [True, True]


def test_exact_columns_stand_before_the_bands() -> None:
    texts = list(pair(0.95, 200, 1))
    assert (fingerprints(texts, BOTH)[:, 2:] == fingerprints(texts, NEAR)).all()
    assert kept([*texts, texts[1]], BOTH) == [True, False, False]
    assert kept([*texts, texts[1]], EXACT) == [True, True, False]


def test_memory_maps(tmp_path: Path) -> None:
    texts = [f"text {number % 7}" for number in range(20)]
    for number in range(2):
        np.save(tmp_path / f"{number}.npy", fingerprints(texts[10 * number : 10 * number + 10], EXACT))
    tables = [np.load(tmp_path / f"{number}.npy", mmap_mode="r") for number in range(2)]
    assert tables[0].flags.f_contiguous
    stay = first_of_each(tables, EXACT)
    assert [len(mask) for mask in stay] == [10, 10]
    assert np.concatenate(stay).tolist() == kept(texts, EXACT) == [True] * 7 + [False] * 13


def groups_by_hand(rows: list[list[int]], keys: list[slice]) -> list[bool]:
    """The same by comparing everything with everything until nothing changes."""
    label = list(range(len(rows)))
    changed = True
    while changed:
        changed = False
        for one in range(len(rows)):
            for other in range(one):
                if label[one] != label[other] and any(rows[one][key] == rows[other][key] for key in keys):
                    label[one] = label[other] = min(label[one], label[other])
                    changed = True
    return [label[number] == number for number in range(len(rows))]


@settings(deadline=None, derandomize=True)  # a busy machine is no fault
@given(
    rows=st.lists(st.lists(st.integers(0, 6), min_size=5, max_size=5), max_size=24),
    cuts=st.lists(st.integers(0, 24), max_size=4),
    partition_rows=st.integers(1, 30),
)
def test_first_of_each_whatever_the_tables_and_partitions(
    rows: list[list[int]], cuts: list[int], partition_rows: int
) -> None:
    config = CleaningConfig(exact_duplicates=True, near_duplicates=True, near_similarity=0.99)  # 2 + 3 columns
    table = np.array(rows, np.uint64).reshape(-1, 5)
    tables = np.split(table, sorted(min(cut, len(rows)) for cut in cuts))
    stay = first_of_each(tables, config, partition_rows=partition_rows)
    assert [len(mask) for mask in stay] == [len(part) for part in tables]
    expected = groups_by_hand(rows, [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 5)])
    assert np.concatenate(stay).tolist() == expected


def test_chunks_of_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    table = np.random.default_rng(0).integers(0, 300, (500, 2), dtype=np.uint64)
    expected = first_of_each([table], EXACT)[0]
    monkeypatch.setattr(deduplication, "CHUNK_ROWS", 7)
    assert (first_of_each([table], EXACT)[0] == expected).all()
