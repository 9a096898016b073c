"""Rewards by rule."""

import pickle

import pytest

from llmtrain.config.compose import load_config
from llmtrain.data import arithmetic
from llmtrain.rewards.answers import Answer
from llmtrain.rewards.functions import build_functions
from llmtrain.rewards.rules import ExactAnswer, Format, Length, Regex, is_right


def answer(text: str = "", expected: str | None = None, length: int = 3) -> Answer:
    return Answer(
        prompt_tokens=[1, 2], tokens=[5] * length, prompt="What is it?", text=text, expected=expected, finished=True
    )


@pytest.mark.parametrize(
    ("given", "expected", "right"),
    [
        ("9+4=13\nAnswer: 63", "63", True),
        ("#### 1,063", "1063", True),
        ("Answer: 63 or so", "63", False),
        ("63", "63", True),
        ("Answer: 64", "63", False),
        (" Paris\n", "Paris", True),
        ("It is Paris", "Paris", False),
        ("Answer: 4.5", "4.5", True),
        ("#### 4.50.", "4.5", True),
        ("Answer: 4", "4.0", True),
        ("Answer: 42", "$42", True),
        ("#### -$1,234.5", "-1234.50", True),
        ("Answer: .5", "0.5", True),
        ("Answer: 50 %.", "50%", True),
        ("Answer: 45", "4.5", False),
        ("Answer: 4.5", "4", False),
        ("Answer: 0.5", "50%", False),
        ("Answer: 4.5.1", "4.5", False),
        ("It is 4.5", "4.5", False),
        ("1.2.3", "1.2.3", True),
    ],
)
def test_exact_answer(given: str, expected: str, right: bool) -> None:
    assert is_right(given, expected) is right
    assert ExactAnswer()([answer(given, expected), answer("Answer: 5", "5")]) == [float(right), 1.0]


def test_exact_answer_by_pattern() -> None:
    reward = ExactAnswer(pattern=r"\\boxed\{(.*?)\}")
    texts = [r"\boxed{1}, no: \boxed{ 63 }.", r"\boxed{62}", "63"]
    assert reward([answer(text, "63") for text in texts]) == [1.0, 0.0, 0.0]


def test_regex_is_found_anywhere() -> None:
    texts = ["I am SORRY", "sorry", "no"]
    assert Regex(pattern="(?i)sorry$")([answer(text) for text in texts]) == [1.0, 1.0, 0.0]


def test_length_by_maximum_is_the_soft_overlong_punishment() -> None:
    lengths = [0, 80, 81, 90, 99, 100, 150]
    given = Length(maximum=100, buffer=20)([answer(length=length) for length in lengths])
    # DAPO's equation 13: ((L_max - L_cache) - |y|) / L_cache between the two, 0 before and -1 after
    assert given == [0.0, 0.0, -0.05, -0.5, -0.95, -1.0, -1.0]


def test_a_share_of_the_maximum_is_that_many_tokens() -> None:
    answers = [answer(length=length) for length in (0, 80, 81, 90, 100, 150)]
    assert Length(maximum=100, buffer=0.2)(answers) == Length(maximum=100, buffer=20)(answers)
    assert Length(maximum=1, buffer=0.2)([answer(length=length) for length in (0, 1)]) == [0.0, -1.0]


def test_length_by_maximum_alone_counts_every_token() -> None:
    assert Length(maximum=10)([answer(length=length) for length in (0, 1, 10, 11)]) == [0.0, -0.1, -1.0, -1.0]


def test_length_by_target() -> None:
    assert Length(target=4)([answer(length=length) for length in (0, 2, 4, 5, 9)]) == [-1.0, -0.5, 0.0, -0.25, -1.0]


def test_format_by_sections() -> None:
    texts = {
        "<think>a\nb</think>\n<answer>4</answer>\n": 1.0,
        "<think></think><answer></answer>": 1.0,
        "<think>a</think><answer>4</answer> so": 0.0,
        "<answer>4</answer><think>a</think>": 0.0,
        "<think>a</think><think>b</think><answer>4</answer>": 0.0,
        "<think>a<answer>b</think><answer>4</answer>": 0.0,
        "<think>a</think>": 0.0,
    }
    assert Format(sections=["think", "answer"])([answer(text) for text in texts]) == list(texts.values())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Regex(pattern="(a"), r"pattern '\(a' is no regular expression: missing \)"),
        (lambda: Regex(pattern=3), "pattern 3 is no regular expression"),  # type: ignore[arg-type]
        (lambda: ExactAnswer(pattern="a+"), r"pattern 'a\+' has no group"),
        (lambda: Length(), "either maximum or target"),
        (lambda: Length(maximum=3, target=3), "either maximum or target"),
        (lambda: Length(maximum=0), "maximum must be a whole number >= 1, found 0"),
        (lambda: Length(target="long"), "target must be a whole number >= 1, found 'long'"),  # type: ignore[arg-type]
        (lambda: Length(maximum=5, buffer=6), "buffer=6 is a part of maximum=5"),
        (lambda: Length(target=5, buffer=6), "buffer=6 is a part of maximum=None"),
        (lambda: Length(target=5, buffer=0.2), "buffer=0.2 is a part of maximum=None"),
        (
            lambda: Length(maximum=5, buffer=1.5),
            "buffer must be a whole number >= 1, or a share above 0 and below 1, f",
        ),
        (
            lambda: Length(maximum=5, buffer=0.0),
            "buffer must be a whole number >= 1, or a share above 0 and below 1, f",
        ),
        (lambda: Format(), "either pattern or sections"),
        (lambda: Format(sections=["a b"]), "sections must be a list of names"),
        (lambda: Format(sections="think"), "sections must be a list of names"),
        (lambda: Format(sections=[]), "sections must be a list of names"),
    ],
)
def test_options_that_cannot_be(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_the_shipped_group_judges_the_embedded_arithmetic(tmp_path: object) -> None:
    line = ["method=ppo", "method.max_new_tokens=20", "rewards=[exact_answer,format,length]"]
    config = load_config("align", line)
    rewards = build_functions(config.rewards)
    assert list(rewards) == ["exact_answer", "format", "length"]
    problem = arithmetic.problem(0)
    texts = [problem.answer, arithmetic.wrong_answer(problem), problem.answer.replace("Answer", "It is")]
    answers = [answer(text, str(problem.final), length=18) for text in texts]
    assert {name: reward(answers) for name, reward in rewards.items()} == {
        "exact_answer": [1.0, 0.0, 0.0], "format": [1.0, 1.0, 0.0], "length": [-0.5, -0.5, -0.5],
    }  # fmt: skip


def test_rewards_are_pickled() -> None:
    for reward in (ExactAnswer(pattern="(a)"), Regex(pattern="a"), Length(target=4), Format(sections=["a"])):
        assert pickle.loads(pickle.dumps(reward)) == reward
