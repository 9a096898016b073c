import gzip
import json
from pathlib import Path

import pytest

from llmtrain.config.errors import DataError
from llmtrain.data.decontamination import EvaluationNgrams

QUESTION = "How many apples does Anna have left if she gives seven of her twelve apples to Ben today?"


def write(file: Path, *rows: object) -> str:
    file.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in rows).encode()))
    return str(file)


def test_a_shared_run_of_words_is_found_whatever_its_spelling(tmp_path: Path) -> None:
    path = write(tmp_path / "test.jsonl.gz", {"id": "1", "query": QUESTION})
    evaluation = EvaluationNgrams([path], 13, tmp_path)
    words = QUESTION.split()
    assert len(evaluation) == len(words) - 12
    assert evaluation.share_with(f"First this: {QUESTION.upper()} Then that.")
    assert evaluation.share_with("so,\n" + "\n".join(words[3:16]))
    assert not evaluation.share_with(" ".join(words[3:15]))
    assert not evaluation.share_with(" ".join([*words[:9], "green", *words[9:]]))
    assert not evaluation.share_with("")


def test_all_strings_of_a_row_are_looked_for(tmp_path: Path) -> None:
    row = {
        "n": 3,
        "choices": ["short", "one two three four"],
        "turns": [{"content": "five six seven eight"}],
        "no": None,
    }
    evaluation = EvaluationNgrams([write(tmp_path / "a.jsonl.gz", row)], 4, tmp_path)
    assert len(evaluation) == 2
    assert evaluation.share_with("zero one two three four five")
    assert evaluation.share_with("five six seven eight")
    assert not evaluation.share_with("three four five six")


def test_several_sets(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.jsonl.gz", {"text": f"{name} b c d"}) for name in ("x", "y")]
    evaluation = EvaluationNgrams(paths, 3, tmp_path)
    assert len(evaluation) == 3
    assert evaluation.share_with("y b c")


def test_a_set_that_could_never_be_found_is_a_fault(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl.gz", {"query": "two words"}, {"query": "three more words"})
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: none of its 2 texts has 13 words.*decontaminate_ngram"):
        EvaluationNgrams([path], 13, tmp_path)


def test_an_unreadable_row_is_a_fault(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("{")
    with pytest.raises(DataError, match=r"a\.jsonl, line 1: not valid JSON"):
        EvaluationNgrams([str(file)], 13, tmp_path)
