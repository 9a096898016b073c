"""Masked language modelling: rows of text with some tokens hidden, and rows of two segments.

Devlin et al. 2019 (arXiv 1810.04805, section 3.1 and appendix A.2); masks are drawn anew for every step, as in Liu et
al. 2019 (RoBERTa, arXiv 1907.11692, section 4.1). Shapes: B rows, S tokens of a row, M places for predictions in each.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmtrain.config.schema import MaskedConfig
from llmtrain.data.corruption import draws, text_lengths, whole
from llmtrain.data.sequences import TextRows
from llmtrain.data.special_tokens import MaskTokens
from llmtrain.data.tokenizers import Tokenizer
from llmtrain.objectives.masked import MaskedBatch
from llmtrain.objectives.next_token import TokenBatch

BORDERS = 3  # special tokens of a row of two segments: one at the beginning, one behind each segment


class Masking:
    """Hides a share of the tokens of text of each row, to a whole number; special tokens and padding never.

    Of the hidden tokens some are read as the mask token, some as another token of text and the rest as they are, by
    draws of their own. With `config.next_sentence`, a row [S - 3] becomes two segments between special tokens [S]: the
    row as it is, cut anywhere, or, half of the time, its beginning with what another row has in the place of the rest.
    `others` are the rows to take that from, by number of the source.
    """

    def __init__(
        self, config: MaskedConfig, tokenizer: Tokenizer, special: MaskTokens, others: Mapping[int, TextRows]
    ) -> None:
        self.config, self.special, self.others, self.pad_id = config, special, others, tokenizer.pad_id
        self.is_text = np.ones(tokenizer.vocab_size, dtype=np.bool_)
        self.is_text[[*tokenizer.special_ids, tokenizer.eos_id, tokenizer.pad_id]] = False
        self.text_ids = np.flatnonzero(self.is_text)
        self.begins_word = tokenizer.begins_word

    def __call__(self, batch: TokenBatch, keys: Sequence[int]) -> MaskedBatch:
        """The rows as they are read, and what is hidden in them."""
        tokens, segments, is_other = batch.tokens.numpy(), None, None
        length = tokens.shape[1]
        width = length + BORDERS if self.config.next_sentence else length
        of_row, draw, kind, other = np.split(draws(keys, 3 + 3 * width), [3, 3 + width, 3 + 2 * width], axis=1)
        if self.config.next_sentence:
            tokens, segments, is_other = self._segments(tokens, batch.source.tolist(), of_row)
        places = int(_share(self.config.mask_rate, length).clip(1))
        hidden = self._hidden(tokens, draw, places)
        read = np.where(hidden & (kind < self.config.replace_rate), self.special.mask, tokens)
        is_random = (kind >= self.config.replace_rate) & (kind < self.config.replace_rate + self.config.random_rate)
        read = np.where(hidden & is_random, self.text_ids[whole(other, 0, len(self.text_ids) - 1)], read)
        where = np.sort(np.where(hidden, np.arange(width), width), axis=1)[:, :places]
        is_used = where < width
        where = np.where(is_used, where, 0)
        lengths = self._lengths(batch)
        return MaskedBatch(
            tokens=torch.from_numpy(read), places=torch.from_numpy(where),
            targets=torch.from_numpy(np.take_along_axis(tokens, where, axis=1)), loss_mask=torch.from_numpy(is_used),
            source=batch.source, documents=self._documents(batch, lengths), lengths=lengths,
            segments=None if segments is None else torch.from_numpy(segments),
            is_other=None if is_other is None else torch.from_numpy(is_other),
        )  # fmt: skip

    def _hidden(self, tokens: NDArray[np.int64], draw: NDArray[np.float64], places: int) -> NDArray[np.bool_]:
        """Which tokens are predicted, [B, S]: as near to the share as whole tokens or words come, `places` at most."""
        is_text = self.is_text[tokens]
        counts = _share(self.config.mask_rate, is_text.sum(axis=1)).clip(1, places)
        if self.config.whole_words:
            rows = zip(tokens, is_text, draw, counts.tolist(), strict=True)
            return np.stack([self._words(*row) for row in rows])
        rank = np.argsort(np.argsort(np.where(is_text, draw, 1.0), axis=1, kind="stable"), axis=1, kind="stable")
        return (rank < counts[:, None]) & is_text

    def _words(
        self, tokens: NDArray[np.int64], is_text: NDArray[np.bool_], draw: NDArray[np.float64], count: int
    ) -> NDArray[np.bool_]:
        """`count` tokens of a row [S] or somewhat fewer, in whole words; words that are too long are passed over."""
        begins = self.begins_word[tokens] | ~is_text
        begins[1:] |= ~is_text[:-1]
        word = np.cumsum(begins) - begins[0]
        starts = np.flatnonzero(np.diff(word, prepend=-1))
        sizes = np.diff(starts, append=len(tokens))
        chosen = np.zeros(len(starts), dtype=np.bool_)
        for each in np.argsort(np.where(is_text, draw, 1.0)[starts], kind="stable").tolist():
            if not count or not is_text[starts[each]]:
                break
            if sizes[each] <= count:
                chosen[each] = True
                count -= int(sizes[each])
        return chosen[word]

    def _segments(
        self, tokens: NDArray[np.int64], source: Sequence[int], draw: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Rows of two segments [B, S], the segment of each token [B, S], and whether the second is another's [B]."""
        length, cls, sep = tokens.shape[1], [self.special.cls], [self.special.sep]
        coin, cut, number = draw.T
        is_other, first = (coin < 0.5).astype(np.int64), whole(cut, 1, length - 1)
        made, segments = [], []
        for row, where, begins, place, other in zip(
            tokens, source, first.tolist(), number.tolist(), is_other, strict=True
        ):
            second = self._another(row, self.others[where], place)[begins:] if other else row[begins:]
            made.append(np.concatenate([cls, row[:begins], sep, second, sep]))
            segments.append(np.arange(length + BORDERS) > begins + 1)
        return np.stack(made).astype(np.int64), np.stack(segments).astype(np.int64), is_other

    def _another(self, row: NDArray[np.int64], others: TextRows, draw: float) -> NDArray[np.int64]:
        """The tokens of another row of the source than this one."""
        number = int(draw * len(others))
        found = others[number].tokens
        return others[(number + 1) % len(others)].tokens if np.array_equal(found, row) else found

    def _lengths(self, batch: TokenBatch) -> Tensor | None:
        """How many tokens of each row are no padding; of two segments all are."""
        if self.config.next_sentence:
            return None
        lengths = text_lengths(batch, self.pad_id)
        return None if (lengths == batch.tokens.shape[1]).all() else torch.from_numpy(lengths)

    def _documents(self, batch: TokenBatch, lengths: Tensor | None) -> Tensor | None:
        """The documents of the rows; where these see one another, padding is still apart."""
        if batch.documents is not None or lengths is None:
            return batch.documents
        return (torch.arange(batch.tokens.shape[1]) >= lengths[:, None]).int()


def _share(rate: float, of: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """A share as a whole number, halves up."""
    return np.floor(rate * np.asarray(of) + 0.5).astype(np.int64)
