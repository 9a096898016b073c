import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from llmtrain.config.errors import DataError
from llmtrain.config.schema import RowsConfig, RowSourceConfig
from llmtrain.data.encoding import (
    JudgedRow,
    Loader,
    TokenRow,
    load_conversations,
    load_judged,
    load_pairs,
    load_prompts,
    load_rankings,
    with_mismatches,
)
from llmtrain.data.records import Split
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
    assert "1 of 2 rows are longer than 20 tokens: 1 left out" in caplog.text


def test_long_rows_can_be_cut(tmp_path: Path, tokenizer: Tokenizer) -> None:
    row = {"prompt": "q", "completion": "y" * 60, "chosen": "y" * 60, "rejected": "z" * 60}
    rows = config(tmp_path, row, too_long="cut")
    [talk] = load_conversations(rows, tokenizer, split="train", max_length=20, cache_dir=tmp_path)["a"]
    [pair] = load_pairs(rows, tokenizer, split="train", max_length=20, cache_dir=tmp_path)["a"]
    assert len(talk.tokens) == len(pair.chosen.tokens) == len(pair.rejected.mask) == 20


def test_a_prompt_that_is_cut_keeps_its_end(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = config(tmp_path, {"prompt": "x" * 60 + " and then?", "completion": "yes"}, too_long="cut")
    [prompt] = load_prompts(rows, tokenizer, split="train", max_length=14, cache_dir=tmp_path)["a"]
    assert len(prompt.tokens) == 14
    assert tokenizer.decode(prompt.tokens, skip_special=False).endswith("and then?<|assistant|>")


def test_a_source_of_long_rows_only_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"data\.sources\.a .*all 1 rows are longer than 20 tokens.*sequence_length"):
        load_conversations(config(tmp_path, LONG), tokenizer, split="train", max_length=20, cache_dir=tmp_path)


def test_the_limit_counts_rows_that_fit(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = config(tmp_path, LONG, LONG, SHORT, SHORT, SHORT)
    options = {"split": "train", "max_length": 20, "cache_dir": tmp_path}
    assert len(load_pairs(rows, tokenizer, **options, limit=1)["a"]) == 1


def test_long_answers_are_taken_out_of_their_ranking(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    ranked = {"prompt": "q", "answers": ["no", "x" * 60, "maybe", "yes"], "scores": [0, 9, 1, 2]}
    alone = {"prompt": "q", "answers": ["no", "x" * 60], "scores": [0, 9]}
    rows = config(tmp_path, ranked, alone, SHORT)
    with caplog.at_level(logging.WARNING, "llmtrain"):
        [row] = load_rankings(rows, tokenizer, split="train", max_length=20, cache_dir=tmp_path)["a"]
    answers = [tokenizer.decode(each.tokens[each.mask].tolist()) for each in row.answers]
    assert answers == ["no", "maybe", "yes"]
    assert row.better == ((1, 0), (2, 0), (2, 1))
    assert row.margins == (1.0, 2.0, 1.0)
    assert "2 of 2 rows are longer than 20 tokens: 1 left out, 1 without their long answers" in caplog.text
    pairs = [(each.answers, each.better, each.margins) for each in row.pairs()]
    no, maybe, yes = row.answers
    one = ((0, 1),)
    assert pairs == [((maybe, no), one, (1.0,)), ((yes, no), one, (2.0,)), ((yes, maybe), one, (1.0,))]


def test_a_pair_is_the_same_row_as_a_ranking_of_two(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows, options = config(tmp_path, SHORT), {"split": "train", "max_length": 20, "cache_dir": tmp_path}
    [pair], [ranking] = load_pairs(rows, tokenizer, **options)["a"], load_rankings(rows, tokenizer, **options)["a"]
    for one, other in zip(pair.sides, ranking.sides, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.mask.tolist() == other.mask.tolist()


# Which turns are learned ------------------------------------------------------------------------------------------


def turns(*said: str, **flags: bool) -> list[dict]:
    """User and assistant in turn; `flags` by what is said."""
    roles = ("user", "assistant")
    return [
        {"role": roles[number % 2], "content": text} | ({"train": flags[text]} if text in flags else {})
        for number, text in enumerate(said)
    ]


def load(tmp_path: Path, tokenizer: Tokenizer, row: dict, max_length: int = 100, **options: str) -> list:
    rows = config(tmp_path, row, **options)
    return load_conversations(rows, tokenizer, split="train", max_length=max_length, cache_dir=tmp_path)["a"]


def learned(tokenizer: Tokenizer, row: TokenRow) -> str:
    return tokenizer.decode(row.tokens[row.mask].tolist(), skip_special=False)


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [("all", "b<|end|>d<|end|>f<|end|>"), ("last", "f<|end|>"), ("flagged", "b<|end|>f<|end|>")],
)
def test_turns_that_are_learned(tmp_path: Path, tokenizer: Tokenizer, loss_on: str, expected: str) -> None:
    [row] = load(tmp_path, tokenizer, {"messages": turns(*"abcdef", d=False, f=True)}, loss_on=loss_on)
    assert learned(tokenizer, row) == expected


def test_flags_that_nobody_uses_are_told_of(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    load(tmp_path, tokenizer, {"messages": turns(*"ab", b=True)})
    assert "messages of 1 rows say whether to learn them, which data.loss_on=all does not use" in caplog.text
    load(tmp_path, tokenizer, {"messages": turns(*"ab")}, loss_on="flagged")
    assert "no message has a flag for data.loss_on=flagged" in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"a": True}, "line 1: only the assistant's turns can be learned"),
        ({"b": False}, "line 1: nothing in this conv"),
    ],
)
def test_flags_that_cannot_be_followed(tmp_path: Path, tokenizer: Tokenizer, flags: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(tmp_path, tokenizer, {"messages": turns(*"ab", **flags)}, loss_on="flagged")


# Rows that are too long -------------------------------------------------------------------------------------------


def test_long_conversations_are_divided_between_turns(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    long = "x" * 40
    row = {"messages": [{"role": "system", "content": "s"}, *turns("a", "b", "c", "d", "e", long, "g", "h", "i", "j")]}
    found = load(tmp_path, tokenizer, row, max_length=12, too_long="split")
    # a turn takes its role, one letter and, where the assistant says it, its end
    assert [tokenizer.decode(each.tokens.tolist(), skip_special=False) for each in found] == [
        f"<|system|>s<|user|>{a}<|assistant|>{b}<|end|><|user|>{c}<|assistant|>{d}<|end|>"
        for a, b, c, d in ("abcd", "ghij")
    ]
    assert [learned(tokenizer, each) for each in found] == ["b<|end|>d<|end|>", "h<|end|>j<|end|>"]
    assert "1 of 1 rows are longer than 12 tokens: 1 divided into 2 (1 more parts left out)" in caplog.text


def test_what_cannot_be_divided_is_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="all 1 rows are longer than 20 tokens"):
        load(tmp_path, tokenizer, LONG, max_length=20, too_long="split")


def test_the_last_turn_of_a_divided_conversation_is_that_of_the_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    [row] = load(tmp_path, tokenizer, {"messages": turns(*"abcdef")}, 10, too_long="split", loss_on="last")
    assert learned(tokenizer, row) == "f<|end|>"


# Rows that the chat template refuses ------------------------------------------------------------------------------

STRICT = """{% for m in messages %}{{ raise_exception('no ' + m.role) if m.role not in ('user', 'assistant') }}
{{- '<|' + m.role + '|>' + m.content + (eos_token if m.role == 'assistant' else '') }}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""


@pytest.mark.parametrize("load_rows", [load_conversations, load_pairs, load_prompts])
def test_rows_that_the_template_refuses_are_counted(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, load_rows: Loader
) -> None:
    strict = tokenizer.with_chat_template(STRICT)
    options = {"split": "train", "max_length": 50, "cache_dir": tmp_path}
    refused = {**SHORT, "system": "s"}
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: the chat template refuses these messages: no system"):
        load_rows(config(tmp_path, SHORT, refused, SHORT), strict, **options)
    assert len(load_rows(config(tmp_path, SHORT, refused, SHORT, on_error="skip"), strict, **options)["a"]) == 1
    assert "1 rows left out:\n1 x refused by the chat template; the first: " in caplog.text
    with pytest.raises(DataError, match=r"none of the 1 rows can be used\n1 x refused by the chat template"):
        load_rows(config(tmp_path, refused, SHORT, on_error="skip"), strict, **options)


@pytest.mark.parametrize("load_rows", [load_conversations, load_prompts])
def test_a_speaker_that_the_template_does_not_know(tmp_path: Path, tokenizer: Tokenizer, load_rows: Loader) -> None:
    """Unless the source says who that is."""
    says = [{"role": "customer", "content": "a"}, {"role": "assistant", "content": "b"}]
    options = {"split": "train", "max_length": 50, "cache_dir": tmp_path}
    with pytest.raises(DataError, match=r"'customer' speaks, .* the source's `roles`, such as \{customer: user\}"):
        load_rows(config(tmp_path, {"messages": says}), tokenizer, **options)
    source = RowSourceConfig(path=str(tmp_path / "a.jsonl"), weight=2.0, roles={"customer": "user"})
    assert len(load_rows(RowsConfig(sources={"a": source}), tokenizer, **options)["a"]) == 1


# Judged answers ---------------------------------------------------------------------------------------------------


def test_a_mismatched_answer_is_another_prompts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    written = [{"prompt": f"q{n}", "completion": f"a{n}", "label": n < 2} for n in range(3)]
    options = {"split": "train", "max_length": 64, "cache_dir": tmp_path}
    data = config(tmp_path, *written)
    rows = with_mismatches(load_judged(data, tokenizer, **options), 64, "train")["a"]
    said = [[tokenizer.decode(side.tokens.tolist(), skip_special=False) for side in row.sides] for row in rows]
    assert said == [
        [f"<|user|>q{n}<|assistant|>a{m}<|end|>" for m in (n, 1 - n)] for n in range(2)
    ]  # fmt: skip
    learned = [tokenizer.decode(row.mismatched.tokens[row.mismatched.mask].tolist()) for row in rows]
    assert learned == ["a1", "a0"]
    assert all(len(row.mismatched.tokens) == len(row.mismatched.mask) for row in rows)


def test_a_mismatched_answer_that_is_too_long_is_cut_and_never_empty(tmp_path: Path, tokenizer: Tokenizer) -> None:
    long, wordy = {"prompt": "q" * 40, "completion": "a"}, {"prompt": "q", "completion": "b" * 40}
    rows = config(tmp_path, *({**row, "label": True} for row in (long, wordy, wordy)))
    judged = load_judged(rows, tokenizer, split="train", max_length=44, cache_dir=tmp_path)
    first, _ = with_mismatches(judged, 44, "train")["a"]
    assert len(first.mismatched.tokens) == 44
    assert 0 < first.mismatched.mask.sum() < judged["a"][1].answer.mask.sum()


def judged_row(prompt: int, answer: int) -> JudgedRow:
    tokens = np.array([1, prompt, 2, answer], dtype=np.int32)
    return JudgedRow(TokenRow(tokens, np.array([False, False, False, True])), desirable=answer % 2 == 0)


def mismatches(prompts: Sequence[int], split: Split = "train") -> list[tuple[int, int]]:
    """For each row the prompt, which is that of its own answer, and the number of the row whose answer is beside it."""
    rows = [judged_row(100 + prompt, 1000 + number) for number, prompt in enumerate(prompts)]
    found = with_mismatches({"a": rows}, 64, split)["a"]
    assert [row.answer.tokens.tolist() for row in found] == [row.answer.tokens.tolist() for row in rows]
    return [(int(row.mismatched.tokens[1]) - 100, int(row.mismatched.tokens[3]) - 1000) for row in found]


@pytest.mark.parametrize(
    "prompts",
    [
        [0, 1, 2, 3, 0, 1, 2, 3],  # all good answers, then all bad ones
        [0, 0, 1, 1, 2, 2],
        [0, 1, 0, 2, 0, 3],  # one has half of the rows
        [0, 1, 1, 2, 0],
        [4, 0, 0, 1, 2, 0, 1, 3, 3, 3, 3, 3],
    ],
)
def test_a_mismatched_answer_is_never_to_the_same_prompt(prompts: list[int]) -> None:
    found = mismatches(prompts)
    assert [prompt for prompt, _ in found] == prompts
    assert all(prompts[row] != prompt for prompt, row in found)
    assert sorted(row for _, row in found) == list(range(len(prompts)))


def test_a_mismatched_answer_to_a_prompt_of_its_own_is_half_the_source_away() -> None:
    assert [row for _, row in mismatches(range(7))] == [3, 4, 5, 6, 0, 1, 2]


def test_a_prompt_with_most_of_the_rows_meets_itself_as_seldom_as_can_be(caplog: pytest.LogCaptureFixture) -> None:
    prompts = [0, 1, 0, 0, 2, 0, 0]
    with caplog.at_level(logging.WARNING, "llmtrain"):
        found = mismatches(prompts)
    assert sum(prompts[row] == prompt for prompt, row in found) == 3  # 5 answers, and 2 to other prompts
    assert sorted(row for _, row in found) == list(range(7))
    message = "data.sources.a (train): 5 of 7 rows have the same prompt, so 3 of them are set against an answer to it"
    assert message in caplog.text


@pytest.mark.parametrize("count", [1, 3])
def test_answers_to_one_prompt_alone_are_refused(count: int, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(
        DataError, match=r"data.sources.a: its rows have one prompt only, .*add rows with other prompts"
    ):
        mismatches([0] * count)
    assert len(mismatches([0] * count, "validation")) == count
    assert f"data.sources.a (validation): {count} of {count} rows have the same prompt" in caplog.text
    assert mismatches([]) == []
