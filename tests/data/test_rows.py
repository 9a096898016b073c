import json
import logging
from pathlib import Path
from typing import Any

import pytest

from llmtrain.config.errors import DataError
from llmtrain.config.schema import RowSourceConfig
from llmtrain.data.arithmetic import final_answer, is_held_out
from llmtrain.data.records import Faults
from llmtrain.data.rows import CONVERSATIONS, PAIRS, PROMPTS, Conversation, Kind, Pair, Prompt, read_problems, read_rows

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
OTHER = {"role": "assistant", "content": "b"}


def source(folder: Path, *rows: Any, **options: Any) -> RowSourceConfig:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RowSourceConfig(path=str(file), **options)


def read(kind: Kind, folder: Path, *rows: Any) -> list[Any]:
    return list(read_rows(kind, source(folder, *rows), 50, "train", folder, Faults()))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT], "prompt": "ignored"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": "q", "completion": "a"},
        {"prompt": [USER], "completion": [ASSISTANT]},
        {"instruction": "q", "input": "", "output": "a"},
        {"question": "q", "answer": "a"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, ASSISTANT]},
    ],
)
def test_conversations_in_the_usual_columns(tmp_path: Path, row: dict) -> None:
    assert read(CONVERSATIONS, tmp_path, row) == [Conversation([USER, ASSISTANT])]


def test_alpaca_input_and_system_go_into_the_prompt(tmp_path: Path) -> None:
    [row] = read(CONVERSATIONS, tmp_path, {"instruction": "Add.", "input": "1 1", "output": "2", "system": "Be brief."})
    assert [m["content"] for m in row.messages] == ["Be brief.", "Add.\n\n1 1", "2"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [OTHER]},
        {"prompt": "q", "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    ],
)
def test_pairs_in_the_usual_columns(tmp_path: Path, row: dict) -> None:
    assert read(PAIRS, tmp_path, row) == [Pair([USER], "a", "b")]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "answer": 7},
        {"prompt": [USER], "answer": "7"},
        {"messages": [USER, ASSISTANT], "answer": "7"},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, OTHER], "answer": "7"},
    ],
)
def test_prompts_in_the_usual_columns(tmp_path: Path, row: dict) -> None:
    assert read(PROMPTS, tmp_path, row) == [Prompt([USER], "7")]


def test_what_was_detected_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "llmtrain"):
        read(CONVERSATIONS, tmp_path, *[{"instruction": "q", "input": "", "output": "a"}] * 3)
    assert [record.getMessage().split(": ")[1] for record in caplog.records] == [
        "read as one question (`instruction` with `input`) and answer (`output`)"
    ]


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        (
            CONVERSATIONS,
            [{"body": "x", "url": "y"}],
            r"line 1: these columns are no conversations: body, url[\s\S]*'x'",
        ),
        (PAIRS, [{"prompt": "q", "completion": "a"}], "these columns are no preference pairs: prompt, completion"),
        (PROMPTS, [{"text": "q"}], "these columns are no prompts: text"),
        (CONVERSATIONS, [], "no rows in there"),
        (CONVERSATIONS, [{"messages": [USER, ASSISTANT]}, {"messages": [USER]}], "line 2: nothing .* by the assistant"),
        (CONVERSATIONS, [{"messages": [USER, ASSISTANT]}, {"other": 1}], "line 2: this row has no 'prompt'"),
        (CONVERSATIONS, [{"messages": [{"text": "q"}]}], "line 1: a message needs `role` and `content`"),
        (CONVERSATIONS, [{"messages": [{"role": "user", "content": 3}]}], "line 1: the content .* found 3"),
        (PAIRS, [{"chosen": [USER, ASSISTANT], "rejected": [ASSISTANT, OTHER]}], "must differ in the assistant's last"),
        (PAIRS, [{"chosen": "a", "rejected": "b"}], "line 1: this row has no 'prompt'"),
    ],
)
def test_faults_are_named(tmp_path: Path, kind: Kind, rows: list[dict], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(kind, tmp_path, *rows)


def test_splits(tmp_path: Path) -> None:
    rows = [{"prompt": str(i), "completion": "a"} for i in range(20)]
    train = list(read_rows(CONVERSATIONS, source(tmp_path, *rows), 5, "train", tmp_path, Faults()))
    held_out = list(read_rows(CONVERSATIONS, source(tmp_path, *rows), 5, "validation", tmp_path, Faults()))
    assert (len(train), len(held_out)) == (16, 4)
    assert not {str(row) for row in train} & {str(row) for row in held_out}
    one = source(tmp_path, rows[0])
    assert len(list(read_rows(CONVERSATIONS, one, 5, "train", tmp_path, Faults()))) == 1
    assert (
        len(list(read_rows(CONVERSATIONS, source(tmp_path, *rows, max_rows=7), 50, "train", tmp_path, Faults()))) == 6
    )


def test_generated_rows(tmp_path: Path) -> None:
    generated = RowSourceConfig(path="embedded:arithmetic", max_rows=50)
    pairs = list(read_rows(PAIRS, generated, 50, "train", tmp_path, Faults()))
    assert len(pairs) == 50
    assert all(str(final_answer(pair.chosen)) == pair.answer != str(final_answer(pair.rejected)) for pair in pairs)
    talks = list(read_rows(CONVERSATIONS, generated, 50, "validation", tmp_path, Faults()))
    numbers = [
        [int(n) for n in "".join(c if c.isdigit() else " " for c in t.messages[0]["content"]).split()] for t in talks
    ]
    assert all(is_held_out(*pair) for pair in numbers)


def test_problems_need_answers(tmp_path: Path) -> None:
    assert len({p.messages[0]["content"] for p in read_problems("embedded:arithmetic", 100, tmp_path)}) == 100
    with pytest.raises(DataError, match="problem 1 has no `answer`"):
        read_problems(source(tmp_path, {"prompt": "q"}).path, 10, tmp_path)


def test_other_embedded_text_has_no_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="embedded:arithmetic"):
        list(read_rows(PAIRS, RowSourceConfig(path="embedded:prose"), 50, "train", tmp_path, Faults()))
