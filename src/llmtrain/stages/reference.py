"""The reference's log-probabilities of all rows, computed once before training and kept on disk.

Then no second model is in memory while the policy trains, and none is computed again in a later epoch or run. They are
those that would be computed on the fly within rounding, not to the bit: here rows stand beside others of their length,
there beside those of their batch, and with another padding the matrix products add up in another order.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Generic

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmtrain.config.errors import UserError
from llmtrain.config.schema import AlignConfig
from llmtrain.data.batches import TwoSided
from llmtrain.engine.distributed import agree, total
from llmtrain.models.heads import LanguageModel
from llmtrain.objectives.kto import AnswerBatch
from llmtrain.objectives.pairs import PairBatch, answer_logprobs
from llmtrain.stages.assembly import Run
from llmtrain.stages.planning import rows_per_step


@dataclasses.dataclass
class Precomputed(Generic[TwoSided]):
    """Adds to rows the log-probabilities that a model gives to their sides, from the cache if they are there."""

    run: Run[AlignConfig]
    model: LanguageModel
    """The reference, whole: the policy before it is trained or spread."""
    collate: Callable[[Sequence[TwoSided], Sequence[int], int, int], PairBatch | AnswerBatch]
    pad_id: int

    def __call__(self, rows: Mapping[str, Sequence[TwoSided]]) -> dict[str, list[TwoSided]]:
        """The rows by source; all processes call this together."""
        return {name: self._with_reference(name, each) for name, each in rows.items()}

    def _with_reference(self, name: str, rows: Sequence[TwoSided]) -> list[TwoSided]:
        path = self.run.cache / f"reference-{self._digest(rows)[:32]}.safetensors"
        found = agree(_read(path, len(rows)) if self.run.layout.is_main else None, self.run.layout)
        if found is None:
            self.run.say(f"{name}: the reference reads {len(rows):,} rows, once")
            found = self._logprobs(rows)
            if self.run.layout.is_main:
                _write(path, found)
        return [row._replace(reference=(one, two)) for row, (one, two) in zip(rows, found.tolist(), strict=True)]

    @functools.cached_property
    def _model_digest(self) -> bytes:
        """Of the weights, the architecture and the precision that they are multiplied in."""
        digest = hashlib.sha256(repr((self.model.config, self.run.autocast_dtype)).encode())
        for name, value in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.digest()

    def _digest(self, rows: Sequence[TwoSided]) -> str:
        """Of the model and the rows' ids and masks; the ids stand for the tokenizer and its chat template."""
        digest = hashlib.sha256(self._model_digest)
        for row in rows:
            for side in row.sides:
                digest.update(len(side.tokens).to_bytes(8, "little"))
                digest.update(np.asarray(side.tokens, dtype=np.int64).tobytes())
                digest.update(side.mask.tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def _logprobs(self, rows: Sequence[TwoSided]) -> Tensor:
        """Of both sides of each row, [rows, 2]; rows of about one length together, shared out over the processes."""
        layout, train = self.run.layout, self.run.config.train
        model = self.model.to(layout.device).eval()
        widths = [max(len(side.tokens) for side in row.sides) for row in rows]
        longest_first = sorted(range(len(rows)), key=lambda number: -widths[number])
        size = train.given_micro_batch_rows or max(rows_per_step(train) // layout.data_world, 1)
        portions = [longest_first[start : start + size] for start in range(0, len(rows), size)]
        found = torch.zeros(len(rows), 2, device=layout.device)
        for numbers in portions[layout.data_rank :: layout.data_world]:
            portion = [rows[number] for number in numbers]
            batch = self.collate(portion, [0] * len(portion), self.pad_id, widths[numbers[0]]).to(layout.device)
            with self.run.autocast():
                found[numbers] = answer_logprobs(model, *batch.rows()).float().view(2, -1).T
        return total(found, layout).cpu()


def _read(path: Path, rows: int) -> Tensor | None:
    """What is in the cache; None where there is nothing that can be used."""
    try:
        found = load_file(path)["logprobs"]
    except (OSError, SafetensorError, KeyError):
        return None
    is_whole = found.shape == (rows, 2) and found.dtype == torch.float32 and bool(found.isfinite().all())
    return found if is_whole else None


def _write(path: Path, logprobs: Tensor) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"logprobs": logprobs}, aside)
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error}. Make room, or set method.reference=on_the_fly.") from error
