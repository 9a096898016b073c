"""What every batch type has in common: tensors that share their first dimension, the rows."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

# What an objective reports beside its loss: (sum, weight) pairs.
# Their ratio is the mean over rows, micro-batches and processes. Of names that end in _max or _min, the first number
# itself counts: the largest or smallest of all.
Metrics = dict[str, tuple[Tensor, Tensor]]
# What people are shown of a batch: a line of a table for each of some rows, `row` being its number among the rows of
# all processes; the values are numbers, texts, booleans or None.
Samples = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of tensors. Subclasses are frozen dataclasses whose tensor fields are `[rows, ...]`."""

    samples: Samples | None = dataclasses.field(default=None, kw_only=True)
    """What people are shown of this process's rows; None for batches that nothing is shown of."""

    def __len__(self) -> int:
        """Number of rows."""
        return next(len(value) for value in self._fields().values() if isinstance(value, Tensor))

    def __getitem__(self, rows: slice | Tensor) -> Self:
        """The given rows; what is not a tensor stays as it is."""
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> Self:
        """The same rows on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def updates(self) -> Iterator[Self]:
        """The optimizer updates that this batch is good for, in order: itself, once, unless a subclass says more."""
        yield self

    def num_updates(self) -> int:
        """How many updates there are if none is left out."""
        return 1

    def metrics(self) -> Metrics:
        """What is known of the batch before it is trained on; a rollout knows its rewards."""
        return {}

    def num_tokens(self) -> int:
        """Tokens of all rows, padding and shared prompts included: the elements of the integer matrices."""
        tensors = (value for value in self._fields().values() if isinstance(value, Tensor))
        return sum(tensor.numel() for tensor in tensors if tensor.dtype == torch.int64 and tensor.dim() == 2)

    def width(self) -> int:
        """Positions of a row, padding included: the columns of the widest integer matrix; 0 where there is none."""
        tensors = (value for value in self._fields().values() if isinstance(value, Tensor))
        return max((each.shape[1] for each in tensors if each.dtype == torch.int64 and each.dim() == 2), default=0)

    def num_predicted(self) -> int:
        """Tokens whose predictions are made: all of them, unless a subclass leaves some out by its shape."""
        return self.num_tokens()

    def micro_batches(self, rows: int | None) -> Iterator[Self]:
        """The batch in portions of at most `rows` rows (None: in one)."""
        rows = rows or max(len(self), 1)
        for start in range(0, len(self), rows):
            yield self[start : start + rows]

    def _fields(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def _map(self, function: Any) -> Self:
        changed = {name: function(value) for name, value in self._fields().items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **changed)
