"""Additions and subtractions with worked answers, generated: problems with one right answer that a program can check.

In the manner of Goat (Liu and Low, "Goat: fine-tuned LLaMA outperforms GPT-4 on arithmetic tasks", 2023): questions in
varied words, answers column by column. Columns are worked from the units up, so that each line needs only what stands
before it. A share of all operand pairs is held out: no training problem, in whatever words, has such a pair.
"""

import dataclasses
import random
import re
from collections.abc import Iterator
from typing import Literal

from llmtrain.config.seeds import derive_seed

OPERAND_DIGITS = (2, 2)  # fewest and most
HELD_OUT_SHARE = 0.1
TRAIN_PROBLEMS = 10_000
HELD_OUT_PROBLEMS = 500
DOCUMENTS = 4_000

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
FINAL_ANSWER = re.compile(r"(?:\A|Answer:|####)\s*(-?\d[\d,]{0,17})\s*$")

# How an answer can go wrong: in a column of the work (and on from there), or when the result is written down.
Mistake = Literal["copy", "fact", "carry", "digit", "ten", "swap"]
MISTAKES: tuple[Mistake, ...] = ("copy", "fact", "carry", "digit", "ten", "swap")


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


def wrong_answer(problem: Problem, variant: int) -> str:
    """A plausible wrong answer; `variant` chooses the mistake and where it is made."""
    draw = random.Random(derive_seed("mistake", problem.prompt, variant))
    kinds = [*MISTAKES[variant % len(MISTAKES) :], *MISTAKES[: variant % len(MISTAKES)]]
    columns = list(range(len(str(problem.first))))
    draw.shuffle(columns)
    for kind in kinds:
        for column in columns:
            answer = _worked(problem, kind, column, draw)
            if final_answer(answer) != problem.final:
                return answer
    raise AssertionError("a mistake in a column always changes the result")


def final_answer(text: str) -> int | None:
    """The number after `Answer:` (or `####`) at the very end of a text, or that is all of it; else None."""
    found = FINAL_ANSWER.search(text)
    return int(found.group(1).replace(",", "")) if found else None


def documents(seed: int = 0) -> Iterator[str]:
    """Texts for pretraining: training problems as statements, as question and answer, and as work that is marked.

    Marked work teaches to tell right from wrong, on which a reward model can build.
    """
    for index in range(DOCUMENTS):
        draw = random.Random(derive_seed("arithmetic document", seed, index))
        lines = []
        for _ in range(draw.randint(8, 16)):
            each, form = problem(draw.randrange(10**9), seed=seed), draw.random()
            if form < 0.5:
                lines.append(f"{each.prompt}\n{each.answer}")
            elif form < 0.85:
                lines.append(_marked(each, draw))
            else:
                statement = draw.choice(STATEMENTS[each.operator])
                lines.append(statement.format(a=each.first, b=each.second, c=each.final))
        yield "\n".join(lines) + "\n"


def _marked(problem: Problem, draw: random.Random) -> str:
    """A worked answer, in half of the cases with a mistake, every line marked; work ends at the first wrong line."""
    right = problem.answer.split("\n")
    given = right if draw.random() < 0.5 else wrong_answer(problem, draw.randrange(10**6)).split("\n")
    lines = [f"Mark: {problem.prompt}"]
    for line, expected in zip(given, right, strict=True):
        lines.append(f"{line} {'yes' if line == expected else 'no'}")
        if line != expected:
            break
    return "\n".join(lines)


def _operand(draw: random.Random) -> int:
    digits = draw.randint(*OPERAND_DIGITS)
    return draw.randrange(10 ** (digits - 1), 10**digits)


def _worked(problem: Problem, mistake: Mistake | None = None, at: int = 0, draw: random.Random | None = None) -> str:
    """The answer, one line for each column from the units up; with a mistake, made in column `at`."""
    width = max(len(str(problem.first)), len(str(problem.second)))
    first, second = ([int(digit) for digit in str(n).zfill(width)[::-1]] for n in (problem.first, problem.second))
    lines, digits, carry = [], [], 0
    for column in range(width):
        if mistake == "carry" and column == at:
            carry = 1 - carry
        upper, lower = first[column], second[column]
        if mistake == "copy" and column == at and draw:
            upper, lower = _miscopied(upper, lower, [*first, *second], draw)
        if problem.operator == "-" and upper - lower - carry < 0:
            upper += 10
        carried = f"{problem.operator}1" if carry else ""
        step = lower + carry
        result = upper + step if problem.operator == "+" else upper - step
        if mistake == "fact" and column == at and draw:
            result = max(0, result + draw.choice((-2, -1, 1, 2)))
        lines.append(f"{upper}{problem.operator}{lower}{carried}={result}")
        digits.append(result % 10)
        carry = int(result >= 10 if problem.operator == "+" else upper >= 10)
    total = carry * 10**width if problem.operator == "+" else 0
    total += sum(digit * 10**column for column, digit in enumerate(digits))
    if draw and mistake in ("digit", "ten", "swap"):
        total = _miswritten(total, mistake, at, draw)
    return "\n".join([*lines, f"Answer: {total}"])


def _miscopied(upper: int, lower: int, digits: list[int], draw: random.Random) -> tuple[int, int]:
    """The two digits of a column, one of them read wrongly: as another one of the problem, or as its neighbour."""
    wrong = draw.choice(digits) if draw.random() < 0.5 else (upper + draw.choice((1, 9))) % 10
    return (wrong, lower) if draw.random() < 0.5 else (upper, wrong)


def _miswritten(number: int, mistake: Mistake, at: int, draw: random.Random) -> int:
    digits = list(str(number))
    place = at % len(digits)
    if mistake == "ten":
        return abs(number + draw.choice((-10, 10)))
    if mistake == "swap":
        other = (place + 1) % len(digits)
        digits[place], digits[other] = digits[other], digits[place]
    else:
        digits[place] = str((int(digits[place]) + draw.choice((1, 9))) % 10)
    return int("".join(digits))
