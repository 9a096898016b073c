"""Additions and subtractions with worked answers, generated: problems with one right answer that a program can check.

In the manner of Goat (Liu and Low, "Goat: fine-tuned LLaMA outperforms GPT-4 on arithmetic tasks", 2023): questions in
varied words, answers column by column. Columns are worked from the units up, so that each line needs only what stands
before it. A share of all operand pairs is held out: no training problem, in whatever words, has such a pair.

Texts for pretraining and demonstrations for fine-tuning are written in haste, as much that people write is: where
something is to be carried into the last column, most of them forget it. Preferences are given with care: the right
answer is always preferred. So a fine-tuned model knows its digits but has a bad habit, and preference optimisation has
something to do: the right way is in the model, only too seldom taken.
"""

import dataclasses
import random
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Literal

from llmtrain.config.seeds import derive_seed

OPERAND_DIGITS = (2, 2)  # fewest and most
HELD_OUT_SHARE = 0.1
TRAIN_PROBLEMS = 10_000
HELD_OUT_PROBLEMS = 500
DOCUMENTS = 6_000
FORGOTTEN_SHARE = 0.7  # of the carries in hasty work

# The operands always stand in the order in which they are worked with: "subtract b from a" is a task of its own.
QUESTIONS = {
    "+": (
        "What is {a} + {b}?", "Work out {a} + {b}.", "Add {a} and {b}.", "What is the sum of {a} and {b}?",
        "How much is {a} plus {b}?", "Please compute {a} plus {b}.", "{a} + {b} = ?", "Give the total of {a} and {b}.",
    ),
    "-": (
        "What is {a} - {b}?", "Work out {a} - {b}.", "From {a} take {b}.", "What is the difference of {a} and {b}?",
        "How much is {a} minus {b}?", "Please compute {a} minus {b}.", "{a} - {b} = ?", "Tell me what {a} less {b} is.",
    ),
}  # fmt: skip
STATEMENTS = {
    "+": ("{a} + {b} = {c}", "The sum of {a} and {b} is {c}.", "{a} plus {b} is {c}."),
    "-": ("{a} - {b} = {c}", "{a} minus {b} is {c}.", "{a} less {b} is {c}."),
}
NUMBER = r"(?:-?\$?|\$-)(?:\d[\d,]{0,17}(?:\.\d{1,18})?|\.\d{1,18})"
FINAL_ANSWER = re.compile(rf"(?:\A|Answer:|####)\s*({NUMBER})(?:\s?%)?\.?\s*$")
UNCOUNTED = str.maketrans("", "", "$,")


@dataclasses.dataclass(frozen=True)
class Problem:
    """One addition or subtraction with its question in words."""

    first: int
    operator: Literal["+", "-"]
    second: int
    question: int

    @property
    def prompt(self) -> str:
        """The question."""
        return QUESTIONS[self.operator][self.question].format(a=self.first, b=self.second)

    @property
    def final(self) -> int:
        """The right result."""
        return self.first + self.second if self.operator == "+" else self.first - self.second

    @property
    def has_carry(self) -> bool:
        """Whether something is carried into, or borrowed from, the last column."""
        place = 10 ** (len(str(self.first)) - 1)
        low = (self.first % place, self.second % place)
        return sum(low) >= place if self.operator == "+" else low[0] < low[1]

    @property
    def answer(self) -> str:
        """The worked answer."""
        return _worked(self)


def problem(index: int, held_out: bool = False, seed: int = 0) -> Problem:
    """Problem number `index` of the training problems, or of the held-out ones."""
    draw = random.Random(derive_seed("arithmetic", seed, int(held_out), index))
    while True:
        first, second = (_operand(draw) for _ in range(2))
        operator: Literal["+", "-"] = "+" if draw.random() < 0.5 else "-"
        if operator == "-" and first < second:
            first, second = second, first
        if is_held_out(first, second) == held_out:
            return Problem(first, operator, second, draw.randrange(len(QUESTIONS[operator])))


def held_out_problems(limit: int = HELD_OUT_PROBLEMS, seed: int = 0) -> Iterator[Problem]:
    """Up to `limit` held-out problems, no question twice."""
    seen: set[Problem] = set()
    for index in range(20 * limit):
        each = problem(index, held_out=True, seed=seed)
        if each not in seen and len(seen) < limit:
            seen.add(each)
            yield each


def is_held_out(first: int, second: int) -> bool:
    """Whether this pair of operands, in either order, is kept from training."""
    low, high = sorted((first, second))
    return derive_seed("held out", low, high) < HELD_OUT_SHARE * 2**63


def wrong_answer(problem: Problem) -> str:
    """A plausible wrong answer: a carry (or borrow) into the last column forgotten, or made up where there is none."""
    return _worked(problem, slip=True)


def hasty_answer(problem: Problem, draw: random.Random) -> str:
    """The worked answer; where there is a carry, it is forgotten more often than not."""
    forgotten = problem.has_carry and draw.random() < FORGOTTEN_SHARE
    return wrong_answer(problem) if forgotten else problem.answer


def demonstration(problem: Problem, number: int) -> str:
    """The hasty answer of row `number` of the instruction set."""
    return hasty_answer(problem, random.Random(derive_seed("demonstration", number)))


def final_answer(text: str) -> Decimal | None:
    """The number after `Answer:` (or `####`) at the very end of a text, or that is all of it; else None.

    Commas in it, a dollar sign before it, a percent sign and a full stop after it do not count.
    """
    found = FINAL_ANSWER.search(text)
    return Decimal(found.group(1).translate(UNCOUNTED)) if found else None


def documents(seed: int = 0) -> Iterator[str]:
    """Texts for pretraining: training problems, most as question and worked answer, some as statements."""
    for index in range(DOCUMENTS):
        draw = random.Random(derive_seed("arithmetic document", seed, index))
        lines = []
        for _ in range(draw.randint(8, 16)):
            each = problem(draw.randrange(10**9), seed=seed)
            if draw.random() < 0.9:
                lines.append(f"{each.prompt}\n{hasty_answer(each, draw)}")
            else:
                statement = draw.choice(STATEMENTS[each.operator])
                lines.append(statement.format(a=each.first, b=each.second, c=each.final))
        yield "\n".join(lines) + "\n"


def _operand(draw: random.Random) -> int:
    digits = draw.randint(*OPERAND_DIGITS)
    return draw.randrange(10 ** (digits - 1), 10**digits)


def _worked(problem: Problem, slip: bool = False) -> str:
    """The answer, one line for each column from the units up; with a slip, the last column's carry is wrong."""
    width = max(len(str(problem.first)), len(str(problem.second)))
    first, second = ([int(digit) for digit in str(n).zfill(width)[::-1]] for n in (problem.first, problem.second))
    lines, total, carry = [], 0, 0
    for column, (upper, lower) in enumerate(zip(first, second, strict=True)):
        if slip and column == width - 1:
            carry = 1 - carry
        if problem.operator == "-" and upper - lower - carry < 0:
            upper += 10
        result = upper + lower + carry if problem.operator == "+" else upper - lower - carry
        lines.append(f"{upper}{problem.operator}{lower}{f'{problem.operator}1' if carry else ''}={result}")
        total += (result if column == width - 1 else result % 10) * 10**column
        carry = int(result >= 10 if problem.operator == "+" else upper >= 10)
    return "\n".join([*lines, f"Answer: {total}"])
