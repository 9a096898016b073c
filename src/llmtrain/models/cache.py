"""What generation keeps of keys and values: of the rows themselves, and of the sources that they look at.

Shapes: B rows, T positions, D head size, Q query heads, K key-value heads (Q a multiple of K); R rows that are kept,
C columns that are there for each.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.config.schema import ModelConfig
from llmtrain.models.attend import attend_one, attend_one_capped, with_sinks
from llmtrain.models.masks import added, score_mask

# Prompts are padded, and columns of a cache read, in multiples of these: torch's CPU kernels then give a row the same
# bits whatever stands behind its own columns, and their products are the faster for it.
PROMPT_MULTIPLE = 16
WIDTH_MULTIPLE = 64


def rounded_up(columns: int, multiple: int) -> int:
    """The next multiple."""
    return -(-columns // multiple) * multiple


class _Columns:
    """Keys and values of rows, per layer [2, R, K, C, D]: position p of a row in column p, behind its last one zeros or
    what other rows have left there.

    `width` columns are read. On a CPU there are no others, and keys and values lie one behind the other: batched
    products would copy them first. Elsewhere there are `capacity` columns from the beginning.
    """

    def __init__(
        self, config: ModelConfig, rows: int, capacity: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.config, self.capacity, self.width = config, rounded_up(capacity, WIDTH_MULTIPLE), 0
        columns = 0 if device.type == "cpu" else self.capacity
        shape = (2, rows, config.kv_heads, columns, config.head_size)
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]

    def set_width(self, columns: int) -> None:
        """Makes at least so many columns readable."""
        width = min(rounded_up(columns, WIDTH_MULTIPLE), self.capacity)
        if width == self.width:
            return
        if self.layers[0].device.type == "cpu":
            self.layers = [_of_width(layer, width) for layer in self.layers]
        self.width = width

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values [R, K, width, D] of a layer."""
        keys, values = self.layers[layer][:, :, :, : self.width]
        return keys, values

    def keep_first(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Writes keys and values of a layer [R, T, K, D] into the first columns."""
        self.layers[layer][:, :, :, : key.shape[1]] = torch.stack((key, value)).transpose(2, 3)

    def take_from(self, other: "_Columns", rows: Tensor, which: Tensor) -> None:
        """Puts rows `which` ([N] indices) of another in place of the given rows [N], which are wide enough."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine[:, rows, :, : other.width] = theirs[:, which, :, : other.width]

    def select_rows(self, rows: Tensor) -> None:
        """Keeps the given rows ([new R] indices) only, in this order."""
        self.layers = [layer[:, rows] for layer in self.layers]

    def attend(
        self, layer: int, query: Tensor, mask: Tensor, sinks: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """One query of each row [B, 1, Q, D], B at least R → [B, Q, 1, D], zeros for what is more than R."""
        keys, values = self.read(layer)
        if sinks is not None:
            keys, values, mask = with_sinks(keys, values, mask, sinks)
        one, softcap = query[: len(keys)].transpose(1, 2), self.config.attention_softcap
        if softcap is None:
            attended = attend_one(one, keys, values, mask)
        else:
            attended = attend_one_capped(one, keys, values, mask, softcap)
        lacking = len(query) - len(keys)
        return F.pad(attended, (0, 0, 0, 0, 0, 0, 0, lacking)) if lacking else attended


def _of_width(layer: Tensor, width: int) -> Tensor:
    """Columns [2, R, K, C, D] cut off, or filled up with zeros."""
    resized = layer.new_empty(*layer.shape[:3], width, layer.shape[4])
    resized[..., : layer.shape[3], :] = layer[..., :width, :]
    resized[..., layer.shape[3] :, :] = 0
    return resized


class KVCache:
    """Keys and values of the tokens that rows have seen.

    The first forward pass takes right-padded prompts, every later one a single token more for each row.

    `lengths` are the unpadded lengths of the prompts, 0 for rows that `adopt` fills; `capacity` is the longest that a
    row may grow, `dtype` that of the projections.
    """

    def __init__(
        self, config: ModelConfig, lengths: Sequence[int], capacity: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.config, self.windows = config, {*config.windows}
        self.source: SourceCache | None = None  # of a decoder beside an encoder
        self.columns = _Columns(config, len(lengths), capacity, dtype=dtype, device=device)
        self.lengths = torch.tensor(lengths, device=device)  # [R]
        self.longest = max(lengths)  # known without asking the device
        self.last = min(config.max_sequence_length, self.columns.capacity) - 1
        self.adding = False  # single tokens, no longer prompts

    @property
    def width(self) -> int:
        """How many columns are read."""
        return self.columns.width

    def begin(self, tokens: Tensor, relative: Tensor | None = None) -> Tensor:
        """Positions of the tokens [B, T] that come next, [1, T] for prompts, [B, 1] for one token more of each row.

        There may be more rows of tokens than the cache has: what is added to fill them up is not kept.
        `relative` is that of `score_mask`.
        """
        if self.width == 0:
            self.columns.set_width(tokens.shape[1])
            return torch.arange(tokens.shape[1], device=tokens.device)[None]
        self.adding = True
        self.columns.set_width(self.longest + 1)
        _, rows, kv_heads, there, _ = self.columns.layers[0].shape
        # A row that has ended may be computed along with the others: its position must exist.
        positions = self.lengths.clamp(max=self.last)[:, None]  # [R, 1]
        starts = torch.arange(0, 2 * rows * kv_heads * there, there, device=tokens.device)
        self.places = (starts.view(2, rows, kv_heads) + positions).flatten()  # [2 R K], of 2 R K C
        keys, dtype = torch.arange(self.width, device=tokens.device), self.columns.layers[0].dtype
        self.masks = {  # of each kind of layer, [R, 1 or Q, 1, width]
            window: added(score_mask(self.config, window, positions, keys, relative=relative), dtype)
            for window in self.windows
        }
        self.lengths = positions[:, 0] + 1
        self.longest += 1
        return F.pad(positions, (0, 0, 0, len(tokens) - rows)) if len(tokens) > rows else positions

    def keep_prompts(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Writes a layer's keys and values of the prompts, [R, T, K, D]."""
        self.columns.keep_first(layer, key, value)

    def attend(
        self, layer: int, window: int | None, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """Adds one position [B, 1, K, D] and attends to those it sees: queries [B, 1, Q, D] → [B, Q, 1, D]."""
        new = torch.stack((key, value))[:, : len(self.lengths)]
        head_size = key.shape[3]
        self.columns.layers[layer].view(-1, head_size).index_copy_(0, self.places, new.reshape(-1, head_size))
        return self.columns.attend(layer, query, self.masks[window], sinks)

    def adopt(self, rows: Tensor, other: "KVCache", which: Tensor) -> None:
        """Puts rows `which` ([N] indices) of another cache in place of the given rows [N]."""
        self.columns.set_width(max(self.width, other.width))
        self.columns.take_from(other.columns, rows, which)
        self.lengths[rows] = other.lengths[which]
        self.longest = int(self.lengths.max())
        if self.source is not None and other.source is not None:
            self.source.adopt(rows, other.source, which)

    def release(self, rows: Tensor) -> None:
        """Forgets what the given rows ([N] indices) have seen; they are computed on as if they were new."""
        self.lengths[rows] = 0
        self.longest = int(self.lengths.max())

    def select(self, rows: Tensor) -> None:
        """Keeps the given rows ([new R] indices, each at most once) only, in this order."""
        self.columns.select_rows(rows)
        self.lengths = self.lengths[rows]
        self.longest = int(self.lengths.max())
        self.columns.set_width(self.longest)
        if self.source is not None:
            self.source.select(rows)


class SourceCache:
    """Keys and values of each row's source: written once, attended to by every token.

    `lengths` are those of the sources without padding, 0 for rows that `adopt` fills; `capacity` is the longest.
    """

    def __init__(
        self, config: ModelConfig, lengths: Sequence[int], capacity: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.columns = _Columns(config, len(lengths), capacity, dtype=dtype, device=device)
        self._set_lengths(torch.tensor(lengths, device=device))

    def keep(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Writes a layer's keys and values of the sources, [R, S, K, D]."""
        self.columns.keep_first(layer, key, value)

    def attend(self, layer: int, query: Tensor) -> Tensor:
        """One query of each row [B, 1, Q, D] over its source → [B, Q, 1, D]."""
        return self.columns.attend(layer, query, self.mask)

    def adopt(self, rows: Tensor, other: "SourceCache", which: Tensor) -> None:
        """Puts rows `which` ([N] indices) of another cache in place of the given rows [N]."""
        self.columns.set_width(max(self.columns.width, other.columns.width))
        self.columns.take_from(other.columns, rows, which)
        self._set_lengths(self.lengths.index_copy(0, rows, other.lengths[which]))

    def select(self, rows: Tensor) -> None:
        """Keeps the given rows ([new R] indices) only, in this order."""
        self.columns.select_rows(rows)
        self._set_lengths(self.lengths[rows])

    def _set_lengths(self, lengths: Tensor) -> None:
        self.lengths = lengths  # [R]
        self.columns.set_width(max(int(lengths.max()), 1))
        # A row without a request is computed along with the others: it must see something.
        seen = torch.arange(self.columns.width, device=lengths.device) < lengths.clamp(min=1)[:, None, None, None]
        self.mask = added(seen, self.columns.layers[0].dtype)  # [R, 1, 1, width]
