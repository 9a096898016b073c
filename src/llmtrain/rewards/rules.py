"""Rewards by rule: what can be told from an answer's text and its length.

The fields of each class are the options of `rewards.<name>.options`; a ValueError says what is wrong with them.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import ClassVar

from llmtrain.data.arithmetic import final_answer
from llmtrain.rewards.answers import Answer

SECTION = re.compile(r"\w[\w-]*")


def is_right(given: str, answer: str) -> bool:
    """Whether an answer is right: the same number at its end where the right answer is a number, else the same text.

    What is a number, `final_answer` says: 4.0 is 4, and $1,000 is 1000.
    """
    expected = final_answer(f"Answer: {answer}")
    return final_answer(given) == expected if expected is not None else given.strip() == answer.strip()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExactAnswer:
    """1 for the right answer, else 0, as `is_right` says."""

    pattern: str | None = None
    """Where in the text the answer stands: the first group of the last match. None: at the end, or the whole text."""
    needs_expected: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.pattern is not None and not compiled(self.pattern).groups:
            raise ValueError(f"pattern {self.pattern!r} has no group (...) around the answer")

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """The rewards, [B]. Every answer has an `expected` one."""
        return [float(is_right(self._given(each.text), each.expected or "")) for each in answers]

    def _given(self, text: str) -> str:
        if self.pattern is None:
            return text
        *_, last = [None, *compiled(self.pattern).finditer(text)]
        return (last.group(1) or "").strip() if last else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regex:
    """1 where the pattern is found anywhere in the answer, else 0."""

    pattern: str
    """A regular expression of Python's `re`; (?i), (?m) and (?s) at its start set flags."""

    def __post_init__(self) -> None:
        compiled(self.pattern)

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """The rewards, [B]."""
        return [float(compiled(self.pattern).search(each.text) is not None) for each in answers]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Length:
    """From 0 down to -1 in proportion to the tokens that an answer is too long, or too far from a length.

    With a maximum: 0 up to `buffer` tokens before it, then a line down to -1 at the maximum and beyond, the soft
    overlong punishment of DAPO (Yu et al. 2025, arXiv 2503.14476, equation 13). With a target: 0 there, and a line down
    to -1 at no token and at twice the target. An answer's end token counts.
    """

    maximum: int | None = None
    """Tokens at which the reward is -1."""
    buffer: float | None = None
    """Tokens before the maximum over which it falls, or below 1 their share of it. None: all, so every token counts."""
    target: int | None = None
    """Tokens at which the reward is 0, instead of a maximum."""

    def __post_init__(self) -> None:
        if (self.maximum is None) == (self.target is None):
            raise ValueError("give either maximum or target; the other is null")
        share = isinstance(self.buffer, float) and 0 < self.buffer < 1
        for name in ("maximum", "target") if share else ("maximum", "buffer", "target"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                or_share = ", or a share above 0 and below 1" if name == "buffer" else ""
                raise ValueError(f"{name} must be a whole number >= 1{or_share}, found {value!r}")
        if self.buffer is not None and (self.maximum is None or self.buffer > self.maximum):
            raise ValueError(f"buffer={self.buffer} is a part of maximum={self.maximum}")

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """The rewards, [B]."""
        return [-min(1.0, self._excess(len(each.tokens))) for each in answers]

    def _excess(self, length: int) -> float:
        if self.maximum is None:
            assert self.target is not None
            return abs(length - self.target) / self.target
        buffer = self.buffer or self.maximum
        buffer = buffer * self.maximum if buffer < 1 else buffer
        return max(0, length - self.maximum + buffer) / buffer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """1 where the whole answer has the form, else 0; white space around it does not count.

    The form is a pattern, or sections as in DeepSeek-R1 (arXiv 2501.12948, section 2.2.2):
    [think, answer] is <think>...</think><answer>...</answer>, each once, in this order, and nothing but space between.
    """

    pattern: str | None = None
    """A regular expression of Python's `re`; (?s) at its start lets a dot match line breaks."""
    sections: Sequence[str] | None = None
    """Names of the sections, instead of a pattern."""

    def __post_init__(self) -> None:
        if (self.pattern is None) == (self.sections is None):
            raise ValueError("give either pattern or sections; the other is null")
        if self.sections is not None:
            wrong = [name for name in self.sections if not (isinstance(name, str) and SECTION.fullmatch(name))]
            if wrong or isinstance(self.sections, str) or not self.sections:
                raise ValueError(f"sections must be a list of names, as in [think, answer], found {self.sections!r}")
        compiled(self._form)

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """The rewards, [B]."""
        return [float(compiled(self._form).fullmatch(each.text.strip()) is not None) for each in answers]

    @property
    def _form(self) -> str:
        if self.sections is None:
            return str(self.pattern)
        tag = f"</?(?:{'|'.join(self.sections)})>"
        return "(?s)" + r"\s*".join(f"<{name}>(?:(?!{tag}).)*</{name}>" for name in self.sections)


def compiled(pattern: str) -> re.Pattern[str]:
    """The pattern (`re` keeps those in use). Raises ValueError for what is no regular expression."""
    try:
        return re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from None
