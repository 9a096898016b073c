"""Prefix language modelling: rows whose beginning is read in both directions, and the rest predicted.

Liu et al. 2018 (arXiv 1801.10198); Raffel et al. 2020 (arXiv 1910.10683, section 3.2.2). Shapes: B rows, S tokens.
"""

import dataclasses
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from llmtrain.config.schema import PrefixConfig
from llmtrain.data.corruption import draws, text_lengths, whole
from llmtrain.objectives.next_token import TokenBatch


class Prefixes:
    """Draws how much of each row is its prefix; where documents do not see each other, of each document.

    Of n tokens all lengths between the two shares are as likely, rounded, from 1 to n - 1.
    """

    def __init__(self, config: PrefixConfig, pad_id: int) -> None:
        self.config, self.pad_id = config, pad_id

    def __call__(self, batch: TokenBatch, keys: Sequence[int]) -> TokenBatch:
        """The rows with their prefixes, none of whose tokens is predicted."""
        width = batch.tokens.shape[1]
        prefix = np.zeros(batch.tokens.shape, dtype=np.bool_)
        draw = draws(keys, width)
        for row, length in enumerate(text_lengths(batch, self.pad_id).tolist()):
            borders = [0, length]
            if batch.documents is not None:
                borders[1:1] = (np.flatnonzero(np.diff(batch.documents[row, :length].numpy())) + 1).tolist()
            sizes = np.diff(borders)
            low = np.rint(self.config.min_share * sizes).astype(np.int64).clip(1, np.maximum(sizes - 1, 1))
            high = np.rint(self.config.max_share * sizes).astype(np.int64).clip(low, np.maximum(sizes - 1, 1))
            found = whole(draw[row, : len(sizes)], low, high).tolist()
            for (start, _), each in zip(pairwise(borders), found, strict=True):
                prefix[row, start : start + each] = True
        seen = torch.from_numpy(prefix)
        return dataclasses.replace(batch, prefix=seen, loss_mask=batch.loss_mask & ~seen)
