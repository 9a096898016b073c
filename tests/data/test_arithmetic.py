import re
from decimal import Decimal
from itertools import islice

import pytest

from llmtrain.data.arithmetic import (
    Problem,
    documents,
    final_answer,
    held_out_problems,
    is_held_out,
    problem,
    wrong_answer,
)

PROBLEMS = [problem(index) for index in range(400)]


def test_worked_answers_end_in_the_right_result() -> None:
    for each in PROBLEMS:
        assert final_answer(each.answer) == each.final >= 0


def test_every_line_of_the_work_is_true() -> None:
    for each in PROBLEMS:
        *work, _ = each.answer.split("\n")
        for line in work:
            left, right = line.split("=")
            assert eval(left) == int(right), each.answer


def test_the_work_of_a_carry_and_of_a_borrow() -> None:
    assert Problem(47, "+", 38, 0).answer == "7+8=15\n4+3+1=8\nAnswer: 85"
    assert Problem(72, "-", 38, 0).answer == "12-8=4\n7-3-1=3\nAnswer: 34"
    assert Problem(905, "+", 97, 0).answer == "5+7=12\n0+9+1=10\n9+0+1=10\nAnswer: 1002"


def test_problems_are_a_function_of_seed_and_index() -> None:
    assert [problem(i) for i in range(400)] == PROBLEMS
    assert [problem(i, seed=1) for i in range(400)] != PROBLEMS
    assert len(set(PROBLEMS)) > 350


def test_held_out_pairs_never_occur_in_training() -> None:
    held_out = {frozenset((each.first, each.second)) for each in held_out_problems(100)}
    assert not held_out & {frozenset((each.first, each.second)) for each in PROBLEMS}
    for text in islice(documents(), 1000):
        for first, second in re.findall(r"(\d\d) (?:[+-]|plus|minus|and|less|take) (\d\d)\b", text):
            assert not is_held_out(int(first), int(second))


def test_held_out_problems_differ() -> None:
    found = list(held_out_problems(300))
    assert len(found) == len(set(found)) == 300


def test_wrong_answers_are_wrong_and_look_right() -> None:
    for each in PROBLEMS:
        wrong = wrong_answer(each)
        assert final_answer(wrong) not in (None, each.final)
        assert len(wrong.split("\n")) == len(each.answer.split("\n"))
        assert wrong.split("\n")[:-2] == each.answer.split("\n")[:-2], "only the last column and the result differ"


def test_a_carry_is_forgotten_or_made_up() -> None:
    assert wrong_answer(Problem(47, "+", 38, 0)) == "7+8=15\n4+3=7\nAnswer: 75"
    assert wrong_answer(Problem(41, "+", 38, 0)) == "1+8=9\n4+3+1=8\nAnswer: 89"
    assert wrong_answer(Problem(72, "-", 38, 0)) == "12-8=4\n7-3=4\nAnswer: 44"


def test_carries_are_told() -> None:
    assert [each.has_carry for each in (Problem(47, "+", 38, 0), Problem(41, "+", 38, 0))] == [True, False]
    assert [each.has_carry for each in (Problem(72, "-", 38, 0), Problem(78, "-", 38, 0))] == [True, False]


def test_texts_for_pretraining_forget_most_carries_and_nothing_else() -> None:
    question = re.compile(r"^.*?(\d+)\D+(\d+)\D*\n((?:[\d+-]+=\d+\n)+Answer: \d+)$", re.MULTILINE)
    forgotten = carries = 0
    for text in islice(documents(), 400):
        for found in question.finditer(text):
            first, second, answer = int(found[1]), int(found[2]), found[3]
            each = Problem(first, "+" if "+" in answer else "-", second, 0)
            carries += each.has_carry
            forgotten += each.has_carry and answer == wrong_answer(each)
            assert answer in ([each.answer, wrong_answer(each)] if each.has_carry else [each.answer])
    assert carries > 500
    assert 0.7 < forgotten / carries < 0.8


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5+5=10\nAnswer: 10", 10),
        ("Answer: 7 or so", None),
        ("no", None),
        ("#### 1,024\n", 1024),
        ("Answer: -3", -3),
        (" 12 ", 12),
        ("7 12", None),
        ("Answer: 4.25", Decimal("4.25")),
        ("Answer: $7.", 7),
        ("#### 7%", 7),
        ("Answer: $", None),
        ("Answer: 7..", None),
    ],
)
def test_final_answers_are_found_at_the_end_only(text: str, number: Decimal | int | None) -> None:
    assert final_answer(text) == number
