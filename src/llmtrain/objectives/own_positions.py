"""Which positions of a row each of several processes computes, and an objective whose loss is counted there alone.

Rows are cut into twice as many pieces as there are processes, of which each takes one from the beginning and one from
the end (Llama 3, arXiv 2407.21783, section 3.3.2): with causal attention all have the same work.
"""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.objectives.batch import Metrics


def padded_length(length: int, processes: int) -> int:
    """The length up to which rows are filled so that all pieces are equal."""
    return -(-length // (2 * processes)) * 2 * processes


def own_columns(length: int, rank: int, processes: int, device: torch.device | None = None) -> Tensor:
    """The columns of process `rank`, ascending, int64, of rows of `length` and what fills them up."""
    size = padded_length(length, processes) // (2 * processes)
    columns = torch.arange(size, device=device)
    return torch.cat((columns + rank * size, columns + (2 * processes - 1 - rank) * size))


class OwnPositions:
    """An objective of next tokens, of which each process counts those that its own positions predict."""

    def __init__(self, objective: Any, rank: int, processes: int) -> None:
        self.objective, self.rank, self.processes = objective, rank, processes

    def weight(self, batch: Any) -> Tensor:
        """This process's part of the objective's weight."""
        weight: Tensor = self.objective.weight(self._own(batch))
        return weight

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, Metrics]:
        """This process's part of the summed loss and of the metrics' sums."""
        made: tuple[Tensor, Metrics] = self.objective(model, self._own(batch))
        return made

    def _own(self, batch: Any) -> Any:
        length = batch.tokens.shape[1]
        columns = own_columns(length, self.rank, self.processes, batch.tokens.device)
        predicts = torch.zeros(padded_length(length, self.processes), dtype=torch.bool, device=batch.tokens.device)
        predicts[columns] = True
        return dataclasses.replace(batch, loss_mask=batch.loss_mask & F.pad(predicts[: length - 1], (1, 0)))
