"""Which token comes next: temperature, top-k, the nucleus, and a uniform number that decides.

Shapes: B rows, V vocabulary.
"""

import torch
from torch import Tensor

# The nucleus is looked for among so many of the likeliest tokens before all are sorted.
NUCLEUS_CANDIDATES = 256


class Choice:
    """Picks a token for each row from its logits and a uniform number in [0, 1)."""

    def __init__(self, temperature: float, top_k: int | None, top_p: float | None) -> None:
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = None if top_p == 1.0 else top_p

    def __call__(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Tokens [B] for logits [B, V] and uniforms [B]."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        return invert_cdf(self.probabilities(logits), uniforms)

    def probabilities(self, logits: Tensor) -> Tensor:
        """What is sampled from, [B, V] float32: tempered, then cut to the top k, then to the nucleus."""
        logits = logits.float()
        if self.temperature != 1:
            logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            weakest = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < weakest, float("-inf"))
        probabilities = logits.softmax(dim=-1)
        if self.top_p is None:
            return probabilities
        vocab_size = probabilities.shape[-1]
        nucleus, reached = self._nucleus(probabilities, min(NUCLEUS_CANDIDATES, vocab_size))
        # Row by row, so that how a row is cut does not depend on those beside it.
        short = (~reached).nonzero()[:, 0]
        if len(short) and vocab_size > NUCLEUS_CANDIDATES:
            nucleus[short] = self._nucleus(probabilities[short], vocab_size)[0]
        return nucleus

    def _nucleus(self, probabilities: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
        """The nucleus among the likeliest `candidates` [B, V], and whether they reach `top_p` [B]."""
        assert self.top_p is not None
        descending, tokens = probabilities.topk(candidates, dim=-1)
        cumulated = descending.cumsum(dim=-1)
        # A token stays if those before it fall short of p: the first one always does.
        outside = cumulated - descending >= self.top_p
        nucleus = torch.zeros_like(probabilities).scatter_(-1, tokens, descending.masked_fill(outside, 0.0))
        return nucleus, cumulated[:, -1] >= self.top_p


def invert_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The tokens [B] at which the cumulated probabilities [B, V] first exceed the uniforms [B] x their sum."""
    cumulated = probabilities.cumsum(dim=-1)
    # A float32 uniform is at most 1 - 2**-24, and that times the sum still rounds to less than the sum: there is
    # always a token, and one whose own probability is not 0.
    return torch.searchsorted(cumulated, uniforms[:, None] * cumulated[:, -1:], right=True)[:, 0]


def row_uniforms(seeds: list[int], count: int) -> Tensor:
    """Numbers in [0, 1), [len(seeds), count], each row from a generator with its own seed."""
    generator = torch.Generator()
    return torch.stack([torch.rand(count, generator=generator.manual_seed(seed)) for seed in seeds])
