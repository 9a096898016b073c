"""Which positions one sees where that is not simply all, or all before it, and what distance does to the scores.

Shapes: B rows, T queries, S keys, Q query heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.config.schema import ModelConfig
from llmtrain.models.positions import alibi_slopes, relative_buckets


def needs_mask(config: ModelConfig, window: int | None, length: int) -> bool:
    """Whether a layer with this window takes `score_mask` for sequences of this length, rather than all or "causal"."""
    reaches = window is None or window >= length
    changed = config.attention_softcap is not None or config.attention_sinks
    return not reaches or changed or config.positions in ("alibi", "relative")


def score_mask(
    config: ModelConfig, window: int | None, queries: Tensor, keys: Tensor, documents: Tensor | None = None,
    prefix: Tensor | None = None, relative: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Bool [B or 1, 1, T, S], true where a query sees a key; or float [B or 1, Q, T, S], added to scores.

    `queries` [B or 1, T] and `keys` [S] are the columns that they stand in: one sees its own and what is before it, in
    an encoder what is behind it too, at a distance below `window`, and in its own document ([B, S] numbers) alone.
    `prefix` [B, S] bool: keys that queries before them see too (Raffel et al. 2020, arXiv 1910.10683, figure 4).
    ALiBi takes slope · distance off (Press et al. 2022, arXiv 2108.12409, section 3); `relative` [buckets, Q] is what
    relative positions add (arXiv 1910.10683, section 2.1). There, what is not seen has -inf.
    """
    distance = queries[:, None, :, None] - keys
    seen = distance >= 0 if config.is_causal else torch.ones_like(distance, dtype=torch.bool)
    if prefix is not None:
        seen = seen | prefix[:, None, None, :]
    if window is not None:
        seen = seen & (distance.abs() < window)
    if documents is not None:
        own = documents.gather(1, queries.expand(len(documents), -1))
        seen = seen & (own[:, None, :, None] == documents[:, None, None, :])
    if config.positions == "alibi":
        slopes = torch.tensor(alibi_slopes(config.num_heads), device=keys.device)[:, None, None]
        return (-slopes * distance.abs()).masked_fill(~seen, float("-inf"))
    if relative is not None:
        buckets = relative_buckets(
            distance[:, 0], config.relative_buckets, config.relative_max_distance, both_ways=not config.is_causal
        )
        return F.embedding(buckets, relative).permute(0, 3, 1, 2).masked_fill(~seen, float("-inf"))
    return seen


def added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as what is added to scores of this dtype."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
    return mask.to(dtype)
