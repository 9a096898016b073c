import json
import logging
from pathlib import Path
from typing import Any

import pytest

from llmtrain.config.errors import DataError
from llmtrain.config.schema import ColumnsConfig, RowSourceConfig
from llmtrain.data.arithmetic import final_answer, is_held_out
from llmtrain.data.records import Faults
from llmtrain.data.rows import (
    ANSWERS,
    CONVERSATIONS,
    PAIRS,
    PROMPTS,
    RANKINGS,
    Answer,
    Conversation,
    Kind,
    Pair,
    Prompt,
    Ranking,
    read_problems,
    read_rows,
)

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
OTHER = {"role": "assistant", "content": "b"}


def source(folder: Path, *rows: Any, **options: Any) -> RowSourceConfig:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RowSourceConfig(path=str(file), **options)


def read(kind: Kind, folder: Path, *rows: Any, faults: Faults | None = None, **options: Any) -> list[Any]:
    return list(read_rows(kind, source(folder, *rows, **options), 50, "train", folder, faults or Faults()))


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
        {"messages": "\n\nHuman: q\n\nAssistant: a"},
        {"prompt": "\n\nHuman: q\n\nAssistant:", "response": "a"},
        {"prompt": "q", "completion": "a", "label": True},
        {"instruction": "q", "input": None, "output": "a", "label": 3},
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
        {"conversations": [{"from": "human", "value": "q"}], "chosen": ASSISTANT, "rejected": OTHER},
        {"prompt": "q", "answers": ["b", "a"], "scores": [1, 2.5]},
        {"prompt": "q", "responses": [[ASSISTANT], [OTHER]], "ranking": [1, 2]},
        {"instruction": "q", "completions": [{"response": "b", "score": 1}, {"response": "a", "score": 4}]},
        {"prompt": "\n\nHuman: q\n\nAssistant: ", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 2}]},
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


def test_earlier_turns_of_alpaca_rows(tmp_path: Path) -> None:
    row = {"instruction": "q", "output": "a", "history": [["p", "b"]], "system": "s"}
    [found] = read(CONVERSATIONS, tmp_path, row)
    assert [(m["role"], m["content"]) for m in found.messages] == [
        ("system", "s"), ("user", "p"), ("assistant", "b"), ("user", "q"), ("assistant", "a"),
    ]  # fmt: skip


def test_flags_of_messages(tmp_path: Path) -> None:
    flags = [{"weight": 0}, {"train": True}, {"training": None}, {}]
    row = {"messages": [USER, *({**ASSISTANT, **flag} for flag in flags)]}
    [found] = read(CONVERSATIONS, tmp_path, row)
    assert [message.get("train") for message in found.messages] == [None, False, True, None, None]
    with pytest.raises(DataError, match=r"line 1: `weight` must be true or false .*found 0\.5"):
        read(CONVERSATIONS, tmp_path, {"messages": [USER, {**ASSISTANT, "weight": 0.5}]})


# Ranked and labelled answers --------------------------------------------------------------------------------------


def test_several_ranked_answers_give_all_pairs_of_different_rank(tmp_path: Path) -> None:
    row = {"question": "q", "answers": ["a", "b", "c", "d", "a"], "ranks": [2, 1, 2, 3, 3]}
    pairs = [(pair.chosen, pair.rejected) for pair in read(PAIRS, tmp_path, row)]
    assert pairs == [("b", "a"), ("a", "d"), ("b", "c"), ("b", "d"), ("b", "a"), ("c", "d"), ("c", "a")]


def test_a_ranking_is_all_pairs_of_a_row(tmp_path: Path) -> None:
    row = {"question": "q", "answers": ["a", "b", "c", "b"], "scores": [2, 0.5, 2, 0.5]}
    [ranking] = read(RANKINGS, tmp_path, row)
    assert ranking == Ranking([USER], ("a", "b", "c"), ((0, 1), (2, 1)), (1.5, 1.5))
    assert str(ranking.place).endswith("line 1")
    [pair] = read(RANKINGS, tmp_path, {"prompt": "q", "chosen": "a", "rejected": "b"})
    assert pair == Ranking([USER], ("a", "b"), ((0, 1),), (None,))


def test_a_ranking_is_all_rows_with_the_same_prompt(tmp_path: Path) -> None:
    said = {"a": 1.0, "b": 3.0, "c": 1.0}
    rows = [{"prompt": "q", "completion": text, "score": score} for text, score in said.items()]
    [ranking] = read(RANKINGS, tmp_path, *rows)
    assert ranking == Ranking([USER], ("b", "a", "c"), ((0, 1), (0, 2)), (2.0, 2.0))
    assert [part.rpartition(", ")[2] for part in str(ranking.place).split(" and ")] == ["line 2", "line 1", "line 3"]


def test_margins_of_pairs(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    rows = [{**row, "margin": 0.5}, {**row, "margin": "large"}, row, {**row, "margin": float("nan")}, row]
    assert [pair.margin for pair in read(PAIRS, tmp_path, *rows)] == [0.5, None, None, None]  # the last is held out
    columns = ColumnsConfig(prompt="prompt", chosen="chosen", rejected="rejected", margin="by")
    assert [pair.margin for pair in read(PAIRS, tmp_path, {**row, "by": 2}, columns=columns)] == [2.0]
    ranks = {"prompt": "q", "answers": ["a", "b", "c"], "ranks": [1, 2, 4]}
    assert [pair.margin for pair in read(PAIRS, tmp_path, ranks)] == [1.0, 3.0, 2.0]


def test_pairs_of_one_row_are_held_out_together(tmp_path: Path) -> None:
    rows = [{"prompt": str(number), "answers": ["a", "b", "c"], "scores": [3, 2, 1]} for number in range(10)]
    held_out = list(read_rows(PAIRS, source(tmp_path, *rows), 5, "validation", tmp_path, Faults()))
    assert [pair.prompt[0]["content"] for pair in held_out] == ["4"] * 3 + ["9"] * 3


def test_ties_are_counted(tmp_path: Path) -> None:
    faults, tied = Faults(), {"prompt": "q", "answers": ["a", "b"], "scores": [1, 1]}
    assert read(PAIRS, tmp_path, {**tied, "scores": [1, 2]}, tied, faults=faults) == [Pair([USER], "b", "a")]
    assert faults.counts == {"no two answers of different rank": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "answers": ["a", "b"]}, "these columns are no preference pairs"),
        ({"prompt": "q", "answers": ["a", "b"], "scores": [1]}, "2 answers, but 1 scores or ranks"),
        (
            {"prompt": "q", "answers": ["a", "b"], "scores": [1, float("nan")]},
            "`scores` must be a number of at most 1e.38, found nan",
        ),
        ({"prompt": "q", "answers": "a", "scores": [1]}, "`answers` must be a list"),
        ({"prompt": "q", "answers": ["a", "b"], "ranks": 1}, "`ranks` must be a list of numbers"),
        ({"prompt": "q", "answers": [{"text": "a", "rank": 1}, "b"]}, "this answer has neither a score nor a rank"),
        ({"prompt": "q", "answers": [[USER], "b"], "ranks": [1, 2]}, "an answer must be one text or one message"),
    ],
)
def test_ranks_that_do_not_fit_are_named(tmp_path: Path, row: dict, message: str) -> None:
    with pytest.raises(DataError, match=f"line 1: {message}"):
        read(PAIRS, tmp_path, row)


def labelled(prompt: str, completion: str, label: object, column: str = "label") -> dict:
    return {"prompt": prompt, "completion": completion, column: label}


def test_labels_make_pairs_of_the_rows_with_the_same_prompt(tmp_path: Path) -> None:
    rows = [
        labelled("q", "a", True), labelled("alone", "x", True), labelled("q", "b", False), labelled("q", "c", False),
        labelled("q", "a", True),
    ]  # fmt: skip
    faults = Faults()
    pairs = read(PAIRS, tmp_path, *rows, faults=faults)
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("a", "b"), ("a", "c"), ("a", "b"), ("a", "c")]
    assert faults.counts == {"no other row answers the same prompt better or worse": 1}
    assert "line 2" in faults.report()
    assert pairs[1].place.count("line 1 and ") == pairs[1].place.count("line 4") == 1
    scored = [labelled("q", "a", 0.5, "reward"), labelled("q", "b", 0, "reward")]
    assert read(PAIRS, tmp_path, *scored) == [Pair([USER], "a", "b")]
    talks = [{"messages": [USER, ASSISTANT], "label": False}, {"messages": [USER, OTHER], "label": True}]
    assert read(PAIRS, tmp_path, *talks) == [Pair([USER], "b", "a")]


def test_labelled_answers_need_no_pairs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    talk = {"messages": [USER, OTHER], "label": False}
    with caplog.at_level(logging.INFO, "llmtrain"):
        rows = read(ANSWERS, tmp_path, labelled("q", "a", True), talk, labelled("q", "held out", True))
    assert rows == [Answer([USER], "a", True), Answer([USER], "b", False)]
    assert rows[1].place is not None
    assert "read as answers to `prompt`, good where `label` is true" in caplog.text


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "b", "completion": "c", "label": True},
        {"prompt": "q", "answers": ["b", "a"], "scores": [1, 2]},
    ],
)
def test_pairs_are_taken_apart_for_kto(tmp_path: Path, row: dict) -> None:
    assert read(ANSWERS, tmp_path, row) == [Answer([USER], "a", True), Answer([USER], "b", False)]


def test_answers_without_a_judgement_are_a_fault(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="these columns are no judged answers: prompt, completion"):
        read(ANSWERS, tmp_path, {"prompt": "q", "completion": "a"})


def test_generated_answers_are_right_and_wrong_in_turn(tmp_path: Path) -> None:
    arithmetic = RowSourceConfig(path="embedded:arithmetic", max_rows=6)
    answers = list(read_rows(ANSWERS, arithmetic, 50, "train", tmp_path, Faults()))
    pairs = list(read_rows(PAIRS, arithmetic, 50, "train", tmp_path, Faults()))
    assert [answer.desirable for answer in answers] == [True, False] * 3
    texts = [pair.chosen if number % 2 == 0 else pair.rejected for number, pair in enumerate(pairs)]
    assert [answer.text for answer in answers] == texts


def test_labels_without_any_pair_are_a_fault(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none of the 2 prompts has a better and a worse answer"):
        read(PAIRS, tmp_path, labelled("q", "a", True), labelled("p", "b", False), faults=Faults("skip"))


def test_answers_labelled_false_are_not_learned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    faults = Faults()
    with caplog.at_level(logging.INFO, "llmtrain"):
        rows = read(CONVERSATIONS, tmp_path, labelled("q", "b", False), labelled("q", "a", True), faults=faults)
    assert rows == [Conversation([USER, ASSISTANT])]
    assert faults.counts == {"`label` is false": 1}
    assert "and answer (`completion`), where `label` is true" in caplog.text
    with pytest.raises(DataError, match="none of the 1 rows can be used"):
        read(CONVERSATIONS, tmp_path, labelled("q", "b", False))


# What the config says of columns ----------------------------------------------------------------------------------


def test_columns_by_name(tmp_path: Path) -> None:
    columns = ColumnsConfig(prompt="q", completion="solution")
    row = {"q": "q", "solution": "a", "messages": [USER, OTHER], "prompt": "other", "system": "not read"}
    assert read(CONVERSATIONS, tmp_path, row, columns=columns) == [Conversation([USER, ASSISTANT])]
    assert read(PROMPTS, tmp_path, row, columns=ColumnsConfig(prompt="q")) == [Prompt([USER])]
    numbers = [{"q": "q", "a": "a", "good": 1}, {"q": "q", "a": "b", "good": 0.0}]
    columns = ColumnsConfig(prompt="q", completion="a", label="good")
    assert read(PAIRS, tmp_path, *numbers, columns=columns) == [Pair([USER], "a", "b")]
    assert read(CONVERSATIONS, tmp_path, *numbers, columns=columns) == [Conversation([USER, ASSISTANT])]


def test_messages_of_ones_own_making(tmp_path: Path) -> None:
    said = [{"who": "customer", "says": "q"}, {"who": "agent", "says": "a", "learn": 1}]
    columns = ColumnsConfig(messages="talk", role="who", content="says", train="learn")
    roles = {"customer": "user", "agent": "assistant"}
    [row] = read(CONVERSATIONS, tmp_path, {"talk": said}, columns=columns, roles=roles)
    assert row == Conversation([USER, {**ASSISTANT, "train": True}])
    with pytest.raises(DataError, match="by the assistant; who speaks: customer, agent"):
        read(CONVERSATIONS, tmp_path, {"talk": said}, columns=columns)


@pytest.mark.parametrize(
    ("columns", "rows", "message"),
    [
        ({"prompt": "question", "completion": "a"}, [{"q": "x", "a": "y"}], "line 1: no column `question`.*are: q, a"),
        ({"prompt": "q"}, [{"q": "x", "a": "y"}], "line 1: `columns` names no conversations: prompt"),
        ({"prompt": "q", "completion": "a"}, [{"q": "x", "a": "y"}, {"q": "x"}], "line 2: this row has no `a`"),
        ({"prompt": "q", "completion": "a"}, [{"q": "x", "a": None}], "line 1: this row has no `a`"),
    ],
)
def test_columns_that_are_not_there(tmp_path: Path, columns: dict, rows: list[dict], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(CONVERSATIONS, tmp_path, *rows, columns=ColumnsConfig(**columns))


def test_rows_with_other_columns_are_read_as_what_they_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "llmtrain"):
        other = {"prompt": "q", "completion": "b"}
        rows = read(CONVERSATIONS, tmp_path, {"messages": [USER, ASSISTANT]}, other, other)
    assert [row.messages[1]["content"] for row in rows] == ["a", "b"]
    assert caplog.text.count("read as") == 2


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
        (CONVERSATIONS, [{"messages": [USER, ASSISTANT]}, {"other": 1}], "line 2: this row has no `prompt`"),
        (CONVERSATIONS, [{"messages": [{"text": "q"}]}], "line 1: a message needs `role` or `from` and `c"),
        (CONVERSATIONS, [{"messages": [{"role": "user", "content": 3}]}], "line 1: the content .* found 3"),
        (PAIRS, [{"chosen": [USER, ASSISTANT], "rejected": [ASSISTANT, OTHER]}], "must differ in the assistant's last"),
        (PAIRS, [{"chosen": "a", "rejected": "b"}], "line 1: this row has no `prompt`"),
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
