import json
import logging
from pathlib import Path

import pytest

from llmtrain.config.errors import DataError
from llmtrain.config.schema import RowsConfig, RowSourceConfig
from llmtrain.data.encoding import load_conversations, load_pairs, load_prompts
from llmtrain.data.tokenizers import Tokenizer, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["What is 1 + 1?"] * 5, 300)


def config(tmp_path: Path, *rows: dict, **options: str) -> RowsConfig:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {"a": RowSourceConfig(path=str(tmp_path / "a.jsonl"), weight=2.0)}
    return RowsConfig(sources=sources, **options)  # type: ignore[arg-type]


SHORT, LONG = ({"prompt": "x" * n, "completion": "yes", "chosen": "yes", "rejected": "no"} for n in (3, 60))


def test_long_rows_are_left_out_and_counted(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    rows = config(tmp_path, SHORT, LONG, SHORT)
    with caplog.at_level(logging.WARNING, "llmtrain"):
        options = {"split": "train", "max_length": 20, "cache_dir": tmp_path}
        [first] = load_conversations(rows, tokenizer, **options)["a"]  # the third is held out
        assert len(load_pairs(rows, tokenizer, **options)["a"]) == 1
        assert len(load_prompts(rows, tokenizer, **options)["a"]) == 1
    assert tokenizer.decode(first.tokens.tolist(), skip_special=False) == "<|user|>xxx<|assistant|>yes<|end|>"
    assert tokenizer.decode(first.tokens[first.mask].tolist(), skip_special=False) == "yes<|end|>"
    assert "1 of 2 rows left out: longer than 20 tokens" in caplog.text


def test_long_rows_can_be_cut(tmp_path: Path, tokenizer: Tokenizer) -> None:
    row = {"prompt": "q", "completion": "y" * 60, "chosen": "y" * 60, "rejected": "z" * 60}
    rows = config(tmp_path, row, too_long="cut")
    [talk] = load_conversations(rows, tokenizer, split="train", max_length=20, cache_dir=tmp_path)["a"]
    [pair] = load_pairs(rows, tokenizer, split="train", max_length=20, cache_dir=tmp_path)["a"]
    assert len(talk.tokens) == len(pair.chosen.tokens) == len(pair.rejected.mask) == 20


def test_a_source_of_long_rows_only_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"data\.sources\.a .*all 1 rows are longer than 20 tokens.*sequence_length"):
        load_conversations(config(tmp_path, LONG), tokenizer, split="train", max_length=20, cache_dir=tmp_path)
