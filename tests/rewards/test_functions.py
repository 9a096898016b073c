"""Reward functions of the user's own: looked up, held against their signature, summed by weight."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from llmtrain.config.errors import ConfigError, UserError
from llmtrain.config.schema import RewardFunctionConfig
from llmtrain.rewards.answers import Answer
from llmtrain.rewards.functions import build_functions, check_functions
from llmtrain.rewards.sums import WeightedSum

HERE = "tests.rewards.test_functions"
ANSWERS = [
    Answer(prompt_tokens=[1], tokens=[2, 3], prompt="a", text=text, expected=None, finished=True)
    for text in ("b", "cc")
]


def characters(answers: Sequence[Answer], *, scale: float = 1.0) -> list[float]:
    return [scale * len(each.text) for each in answers]


def with_needs(answers: Sequence[Answer], word: str) -> list[float]:
    return [float(word in each.text) for each in answers]


def nothing() -> list[float]:
    return []


class Counted:
    def __init__(self, letter: str) -> None:
        if len(letter) != 1:
            raise ValueError(f"one letter, not {letter!r}")
        self.letter = letter

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        return [float(each.text.count(self.letter)) for each in answers]


class NotCalled:
    pass


def wanted(name: str, **options: object) -> dict[str, RewardFunctionConfig]:
    return {"mine": RewardFunctionConfig(_target_=f"{HERE}.{name}", options=options)}


def test_functions_and_classes() -> None:
    assert build_functions(wanted("characters"))["mine"](ANSWERS) == [1.0, 2.0]
    assert build_functions(wanted("characters", scale=0.5))["mine"](ANSWERS) == [0.5, 1.0]
    assert build_functions(wanted("with_needs", word="c"))["mine"](ANSWERS) == [0.0, 1.0]
    assert build_functions(wanted("Counted", letter="c"))["mine"](ANSWERS) == [0.0, 2.0]


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        (wanted("charakters"), r"rewards.mine._target_=.*has no 'charakters'; did you mean characters\?"),
        (wanted("HERE"), "rewards.mine._target_=.*expected a class or a function"),
        (wanted("nothing"), r"rewards.mine._target_=.*expected a function f\(answers, \*\*options\)"),
        (wanted("NotCalled"), "rewards.mine._target_=.*or a class whose instances are called"),
        (wanted("characters", skale=2), "rewards.mine.options.skale: characters knows no such option; .*scale"),
        (wanted("characters", answers=2), "rewards.mine.options.answers: is set by a key of its own"),
        (wanted("with_needs"), "rewards.mine.options.word: needs a value"),
        (wanted("Counted"), "rewards.mine.options.letter: needs a value"),
        ({"r": RewardFunctionConfig(_target_="no_such.f")}, "rewards.r._target_='no_such.f': cannot import 'no_such'"),
    ],
)
def test_refused_before_anything_is_called(functions: dict[str, RewardFunctionConfig], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_functions(functions)


def test_options_that_a_class_refuses() -> None:
    with pytest.raises(ConfigError, match=r"rewards.mine.options: .*Counted refuses them: one letter, not 'cc'"):
        build_functions(wanted("Counted", letter="cc"))


def test_weighted_sum_and_its_parts() -> None:
    reward = WeightedSum({"a": characters, "b": Counted("c")}, {"a": 0.5, "b": -1.0})
    components = reward.components(ANSWERS)
    assert components == {"a": [1.0, 2.0], "b": [0.0, 2.0]}
    assert reward.total(components) == reward(ANSWERS) == [0.5, -1.0]
    assert reward.needs_expected == ()


def test_a_reward_of_weight_one_is_given_as_it_is() -> None:
    values = [0.1, -1.0 / 3.0]
    assert WeightedSum({"a": lambda answers: values}, {"a": 1.0})(ANSWERS) == values


@pytest.mark.parametrize(
    "values", [[1, True], (1, 1.0), torch.ones(2), [torch.tensor(1.0)] * 2, np.ones(2), {"b": 1.0, "cc": 1}.values()]
)
def test_numbers_of_any_kind_are_taken(values: object) -> None:
    assert WeightedSum({"a": lambda answers: values}, {"a": 1.0})(ANSWERS) == [1.0, 1.0]  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (lambda answers: [1.0], "rewards.a gave 1 numbers for 2 answers"),
        (lambda answers: [1.0, float("nan")], "rewards.a gave nan, which float32 does not hold, for the answer 'cc'"),
        (lambda answers: 1 / 0, r"rewards.a failed at .*test_functions.py:\d+: ZeroDivisionError"),
        (lambda answers: ["x", "y"], r"rewards.a gave \['x', 'y'\]; expected a list with one number for each answer"),
        (lambda answers: ["1", 2.0], r"rewards.a gave \['1', 2.0\]; expected a list with one number for each answer"),
        (lambda answers: [b"1", 2.0], r"rewards.a gave \[b'1', 2.0\]; expected a list"),
        (lambda answers: {1.0: "b", 2.0: "cc"}, r"rewards.a gave \{1.0: 'b', 2.0: 'cc'\}; expected a list with"),
        (lambda answers: {2.0, 1.0}, r"rewards.a gave \{.*\}; expected a list with one number for each answer"),
        (lambda answers: "11", "rewards.a gave '11'; expected a list with one number for each answer"),
        (lambda answers: b"11", "rewards.a gave b'11'; expected a list with one number for each answer"),
        (lambda answers: None, "rewards.a gave None; expected a list with one number for each answer"),
        (lambda answers: torch.zeros(2, 3), "rewards.a gave .*; expected a list with one number for each answer"),
        (lambda answers: (1 / 0 for _ in answers), r"rewards.a failed at .*test_functions.py:\d+: ZeroDivisionError"),
        (lambda answers: [1e39, 0.0], "rewards.a gave 1e.39, which float32 does not hold"),
    ],
)
def test_rewards_that_give_no_numbers(reward: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        WeightedSum({"a": reward}, {"a": 1.0})(ANSWERS)  # type: ignore[dict-item]


def test_a_sum_beyond_float32_is_refused() -> None:
    with pytest.raises(UserError, match=r"the sum of the rewards is 3e.39, which float32 does not hold"):
        WeightedSum({"a": lambda answers: [3e38, 0.0]}, {"a": 10.0})(ANSWERS)
