"""Fill-in-the-middle: documents as beginning, end, middle, so that a decoder learns to fill gaps.

Bavarian et al. 2022 (arXiv 2207.14255, section 3), at the level of the context: what a row holds of each document is
put into another order by itself. Borders of the parts lie between tokens. Shapes: B rows, S tokens of a row.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from llmtrain.config.schema import FillInTheMiddleConfig
from llmtrain.data.corruption import draws, text_lengths, whole
from llmtrain.data.special_tokens import InfillingTokens
from llmtrain.objectives.next_token import TokenBatch

ADDED = 3  # tokens that the parts of a document bring with them


class Infilling:
    """Puts a share of the documents of each row into another order; an end token stays at the end.

    Prefix-suffix-middle: P prefix S suffix M middle; suffix-prefix-middle: P S suffix M prefix middle, in which prefix
    and middle follow one another (its second variant). Rows stay as long as they are: padding makes room for the added
    tokens, or as much text is left out at the end of the row, before it is put into another order.
    """

    def __init__(self, config: FillInTheMiddleConfig, tokens: InfillingTokens, *, eos_id: int, pad_id: int) -> None:
        self.config, self.tokens, self.eos_id, self.pad_id = config, tokens, eos_id, pad_id

    def __call__(self, batch: TokenBatch, keys: Sequence[int]) -> TokenBatch:
        """The rows in another order."""
        lengths, width = text_lengths(batch, self.pad_id).tolist(), batch.tokens.shape[1]
        tokens = np.full(batch.tokens.shape, self.pad_id, dtype=np.int64)
        numbers = np.zeros(batch.tokens.shape, dtype=np.int32)
        mask = np.ones(batch.tokens.shape, dtype=np.bool_)
        for number, (row, length, key) in enumerate(zip(batch.tokens.numpy(), lengths, keys, strict=True)):
            place = 0
            for document, piece in enumerate(self.pieces(row[:length], width, key)):
                behind = place + len(piece)
                tokens[number, place:behind], numbers[number, place:behind] = piece, document
                mask[number, place] = batch.documents is None
                place = behind
            mask[number, 0], mask[number, place:] = False, False
            numbers[number, place:] = numbers[number, place - 1] + 1  # padding is a document of its own
        documents = None if batch.documents is None else torch.from_numpy(numbers)
        return dataclasses.replace(
            batch, tokens=torch.from_numpy(tokens), loss_mask=torch.from_numpy(mask), documents=documents
        )

    def pieces(self, text: NDArray[np.int64], room: int, key: int) -> list[NDArray[np.int64]]:
        """What becomes of each document of a text, `room` tokens in all at most."""
        documents = np.split(text, np.flatnonzero(text[:-1] == self.eos_id) + 1)
        found = []
        for document, (coin, order, *cuts) in zip(
            documents, draws([key], 4 * len(documents)).reshape(-1, 4), strict=True
        ):
            if coin < self.config.rate and room > ADDED:
                document = self._reordered(document[: room - ADDED], order < self.config.spm_rate, np.array(cuts))
            found.append(document[:room])
            room -= len(found[-1])
            if not room:
                break
        return found

    def _reordered(
        self, document: NDArray[np.int64], suffix_first: bool, cuts: NDArray[np.float64]
    ) -> NDArray[np.int64]:
        has_end = document[-1] == self.eos_id
        text, end = (document[:-1], document[-1:]) if has_end else (document, document[:0])
        first, second = np.sort(whole(cuts, 0, len(text))).tolist()
        prefix, middle, suffix = text[:first], text[first:second], text[second:]
        p, s, m = ([each] for each in self.tokens)
        parts = [p, s, suffix, m, prefix, middle] if suffix_first else [p, prefix, s, suffix, m, middle]
        return np.concatenate([*parts, end]).astype(np.int64)
