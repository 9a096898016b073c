"""Rows that share positions: what is computed of them, one position behind the other, and how attention finds its rows.

All but attention goes position by position, so it is done once for what rows have in common, such as the prompt of
several answers, and not at all for padding. Attention gets rows again, put together from what was computed: whole ones
for leaders, and for the others queries only where they have something of their own.

Shapes: B rows, T positions; N positions that are computed; L leaders, F followers, U positions of a follower's own.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class SharedRows(NamedTuple):
    """Which positions are computed and where rows take them from, made once for all layers."""

    computed: Tensor
    """[N] int64: the numbers, among all B T positions, of those that are computed."""
    sources: Tensor
    """[B, T] int64: which of the N stands at each position; any where nobody asks."""
    leaders: Tensor
    """[L] int64: rows that begin with positions of their own."""
    followers: Tensor
    """[F] int64: rows that begin with those of others and have some of their own."""
    first_own: int
    """T − U: no follower has a position of its own before this one."""
    attended: Tensor
    """[N] int64: where each is found among the L T + F U positions that attention is done for."""

    @classmethod
    def of(cls, same_as: Tensor) -> "SharedRows":
        """From the number of the position that is computed for each one, [B, T] int64; −1 for none."""
        rows, length = same_as.shape
        numbers = torch.arange(rows * length, device=same_as.device).view(rows, length)
        own = same_as == numbers
        computed = own.flatten().nonzero()[:, 0]
        sources = (own.flatten().cumsum(0) - 1)[same_as.clamp(min=0)]
        leaders, followers = own[:, 0].nonzero()[:, 0], (own.any(dim=1) & ~own[:, 0]).nonzero()[:, 0]
        first_own = int(own[followers].long().argmax(dim=1).min()) if len(followers) else 0
        asked = torch.cat([numbers[leaders].flatten(), numbers[followers, first_own:].flatten()])
        places = torch.zeros_like(numbers.flatten()).index_put((asked,), torch.arange(len(asked), device=asked.device))
        return cls(computed, sources, leaders, followers, first_own, places[computed])

    def positions(self) -> Tensor:
        """The place of each computed position in its row, [1, N] int64."""
        return self.computed[None] % self.sources.shape[1]

    def gather(self, values: Tensor) -> Tensor:
        """What is computed, [1, N, ...], of values [B, T, ...]."""
        return values.flatten(0, 1)[self.computed][None]

    def spread(self, values: Tensor) -> Tensor:
        """Values [B, T, C] of all positions from those that were computed, [1, N, C]."""
        return taken(values[0], self.sources)


def taken(values: Tensor, which: Tensor) -> Tensor:
    """values[which], [..., C] from values [N, C]; as an embedding, whose gradient is summed in a fixed order."""
    return F.embedding(which, values)
