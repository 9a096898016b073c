"""Which positions one sees where that is not simply all before it, and what distance takes off the scores.

Shapes: B rows, T queries, S keys, Q query heads.
"""

import torch
from torch import Tensor

from llmtrain.config.schema import ModelConfig
from llmtrain.models.positions import alibi_slopes


def needs_mask(config: ModelConfig, window: int | None, length: int) -> bool:
    """Whether a layer with this window takes `score_mask` for sequences of this length, rather than "causal"."""
    reaches = window is None or window >= length
    return not reaches or config.positions == "alibi" or config.attention_softcap is not None


def score_mask(
    config: ModelConfig, window: int | None, queries: Tensor, keys: Tensor, documents: Tensor | None = None
) -> Tensor:
    """Bool [B or 1, 1, T, S], true where a query sees a key; with ALiBi float32 [B or 1, Q, T, S], added to scores.

    `queries` [B or 1, T] and `keys` [S] are the columns that they stand in: one sees its own and what is before it,
    at most `window` of them, and in its own document ([B, T] numbers, of the same columns) alone.
    ALiBi takes slope · distance off (Press et al. 2022, arXiv 2108.12409, section 3); what is not seen has -inf.
    """
    distance = queries[:, None, :, None] - keys
    seen = distance >= 0
    if window is not None:
        seen &= distance < window
    if documents is not None:
        seen = seen & (documents[:, None, :, None] == documents[:, None, None, :])
    if config.positions != "alibi":
        return seen
    slopes = torch.tensor(alibi_slopes(config.num_heads), device=keys.device)[:, None, None]
    return (-slopes * distance).masked_fill(~seen, float("-inf"))


def added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as what is added to scores of this dtype."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
    return mask.to(dtype)
