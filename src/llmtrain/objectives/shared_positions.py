"""Which positions of a batch a causal model has to compute: of rows that begin alike, the beginning only once.

The same tokens after the same past have the same hidden states and the same keys and values. So the answers to one
prompt share its positions, and nobody asks for those of padding.

Shapes: B rows, S tokens of the longest row.
"""

import math

import torch
from torch import Tensor


def shared_positions(tokens: Tensor, mask: Tensor, leaders: Tensor) -> Tensor:
    """The position that is computed in the place of each one, [B, S] int64: number b · S + s, or −1 for none.

    Args:
        tokens: [B, S] int64.
        mask: [B, S] bool, the tokens that are predicted. Only what stands before a row's last one is computed, and of
            each leader its first position, so that there is something to compute.
        leaders: [B] int64, the row that each row is held against, its own number or that of a leader; as far as a row
            has its leader's tokens, it shares its leader's positions.
    """
    rows, length = tokens.shape
    numbers, columns = (torch.arange(size, device=tokens.device) for size in (rows, length))
    alike = (tokens == tokens[leaders]).long().cumprod(dim=1).sum(dim=1)  # [B]
    wanted = torch.where(mask, columns, 0).amax(dim=1).maximum((leaders == numbers).long())
    alike = alike.minimum(wanted)
    wanted = wanted.scatter_reduce(0, leaders, alike, "amax")
    computed = torch.where(columns < alike[:, None], leaders[:, None], numbers[:, None]) * length + columns
    return torch.where(columns < wanted[:, None], computed, -1)


def group_leaders(tokens: Tensor, group_rows: int) -> Tensor:
    """The first row of each row's group, [B] int64: of as many of its rows as every portion of B rows has together."""
    together = math.gcd(len(tokens), group_rows)
    numbers = torch.arange(len(tokens), device=tokens.device)
    return numbers - numbers % together
