"""What a reward sees of a sampled answer, and what every reward is: a function from answers to numbers.

Shapes: B answers.
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer of the policy, as tokens and as text."""

    prompt_tokens: Sequence[int]
    """The prompt as the model has read it, the chat template's tokens included."""
    tokens: Sequence[int]
    """The sampled tokens, the end token included where there is one."""
    prompt: str
    """The prompt's text as the data has it: the last question."""
    text: str
    """The answer's text, without special tokens."""
    expected: str | None
    """The right answer, where the data has one (column `answer`)."""
    finished: bool
    """Whether the answer ended by itself and was not cut off."""
    logprobs: Sequence[float] | None = None
    """Log-probabilities of the tokens, where an engine with kernels of its own has sampled them."""


class Reward(Protocol):
    """Judges answers: a learned reward model, a rule, a weighted sum of both."""

    def __call__(self, answers: Sequence[Answer]) -> Sequence[float]:
        """A number for each answer, more is better, [B]; depends on the answer alone, not on those beside it."""
