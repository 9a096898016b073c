"""The largest number of rows that fits: found by measuring, the same at a resume, less where memory ends yet."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.engine.test_trainer import ALONE, Line, Points, SquaredError
from torch import Tensor, nn

from llmtrain.config.errors import UserError
from llmtrain.engine import micro_batches
from llmtrain.engine.distributed import Layout
from llmtrain.engine.micro_batches import FoundRows, free_memory, peak
from llmtrain.engine.trainer import Trainer
from llmtrain.objectives.batch import Metrics

Build = Callable[..., Trainer]
CPU = torch.device("cpu")
ROW = 1_000_000


def passes(rows: int) -> None:
    """Takes 3 MB besides 4 MB for each row, and gives all of it back."""
    always = torch.zeros(3 * ROW // 4)
    for_rows = [torch.zeros(4 * ROW // 4) for _ in range(rows)]
    del always, for_rows


def test_the_peak_is_that_of_the_tensors() -> None:
    for rows in (1, 2, 5):
        assert peak(lambda rows=rows: passes(rows), CPU) == pytest.approx((3 + 4 * rows) * ROW, rel=1e-3)


@pytest.mark.parametrize(
    ("free", "reserved", "longer", "expected"),
    [
        (2 * 23 * ROW, 0, None, 5),  # 3 + 5 · 4 MB are half of it
        (2 * 22 * ROW, 0, None, 4),
        (2 * 22 * ROW + 2, ROW, None, 4),
        (2 * 46 * ROW, 0, 20, 5),  # rows may come that are twice as long
        (10**12, 0, None, 12),
        (0, 0, None, 1),
    ],
)
def test_as_many_rows_as_half_of_the_free_memory_suffices_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, reserved: int, longer: int | None, expected: int
) -> None:
    monkeypatch.setattr(micro_batches, "free_memory", lambda device: free + 2000)
    found = FoundRows(tmp_path, ALONE, reserved=reserved, longest_row=longer)
    assert found.find(3, passes, rows=12, width=10) == -(-12 // -(-12 // expected)), "micro-batches of nearly one size"
    assert found.at(2) is None
    again = FoundRows(tmp_path, ALONE)
    assert again.at(3) == again.at(99) == found.at(3)
    other = FoundRows(tmp_path, Layout(0, 1, CPU))
    assert other.rows == again.rows


def test_what_other_processes_found_is_not_taken_over_and_not_lost(tmp_path: Path) -> None:
    (tmp_path / "micro_batches.json").write_text('[{"step": 0, "rows": 7, "processes": 4}]')
    found = FoundRows(tmp_path, ALONE)
    assert found.at(10) is None
    found.halve(6, 8)
    said = json.loads((tmp_path / "micro_batches.json").read_text())
    assert said == [{"step": 0, "rows": 7, "processes": 4}, {"step": 6, "rows": 4, "processes": 1}]


def test_free_memory_is_what_the_machine_or_the_container_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(micro_batches, "CGROUPS", ())
    machine = free_memory(CPU)
    assert machine > 10**8
    limit, used = tmp_path / "limit", tmp_path / "used"
    used.write_text("60000\n")
    monkeypatch.setattr(micro_batches, "CGROUPS", ((limit, used),))
    for text, expected in (("max\n", machine), (f"{2**62}\n", machine), ("100000\n", 40000)):
        limit.write_text(text)
        assert free_memory(CPU) == pytest.approx(expected, rel=0.5)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory(CPU) == 10000


class Hungry(SquaredError):
    """Counts the rows of each pass, and has no memory for more than some of them at some step."""

    def __init__(self, batches: Line, most: int = 99, at_step: int = 99, text: str = "CUDA out of memory.") -> None:
        self.batches, self.most, self.at_step, self.text = batches, most, at_step, text
        self.seen: list[tuple[int, int]] = []

    def __call__(self, model: nn.Module, batch: Points) -> tuple[Tensor, Metrics]:
        step = self.batches.asked[-1]
        self.seen.append((step, len(batch)))
        if step >= self.at_step and len(batch) > self.most:
            raise torch.OutOfMemoryError(self.text)
        return super().__call__(model, batch)


def hungry(build: Build, folder: Path, found: bool = True, **options: Any) -> tuple[Trainer, Hungry]:
    batches = Line()
    objective = Hungry(batches, **options)
    rows = FoundRows(folder, ALONE) if found else None
    return build(
        batches=batches, objective=objective, micro_batch_rows=rows, checkpoint={"every_steps": 2}
    ), objective  # fmt: skip


def test_a_number_is_found_at_the_first_step_and_changes_nothing_else(build: Build, tmp_path: Path) -> None:
    plain = build()
    plain.fit()
    (tmp_path / "checkpoints").rename(tmp_path / "others")
    trainer, objective = hungry(build, tmp_path)
    trainer.fit()
    assert objective.seen == [(0, 1), (0, 1), (0, 2), *((step, 8) for step in range(6))]
    assert torch.equal(trainer.model.weight, plain.model.weight)


def test_where_memory_ends_the_step_is_done_again_with_half_the_rows_and_a_resume_does_the_same(
    build: Build, tmp_path: Path
) -> None:
    trainer, objective = hungry(build, tmp_path, most=3, at_step=3)
    trainer.fit()
    assert objective.seen[3:] == [
        (0, 8), (1, 8), (2, 8), (3, 8), (3, 4), (3, 2), (3, 2), (3, 2), (3, 2),
        *((step, 2) for step in (4, 4, 4, 4, 5, 5, 5, 5)),
    ]  # fmt: skip
    expected = trainer.model.weight.clone()
    for step in (4, 6):
        (tmp_path / "checkpoints" / f"step-{step:08d}").rename(tmp_path / f"step-{step}")
    again, seen = hungry(build, tmp_path)  # with memory enough, which makes no difference
    again.fit()
    assert seen.seen[0] == (0, 8), "from the start: no checkpoint is left"
    assert [rows for step, rows in seen.seen] == [8, 8, 8, *[2] * 12]
    assert torch.equal(again.model.weight, expected)


def test_memory_that_is_not_enough_for_a_row_ends_the_run(build: Build, tmp_path: Path) -> None:
    trainer, _ = hungry(build, tmp_path, most=0, at_step=2)
    with pytest.raises(UserError, match=r"step 3: there is not enough memory for a single row\. Lower train\.seq"):
        trainer.fit()


def test_without_auto_it_is_named_as_the_cure(build: Build, tmp_path: Path) -> None:
    trainer, _ = hungry(build, tmp_path, found=False, most=3, at_step=2, text="CUDA out of memory. Tried\nmore")
    with pytest.raises(
        UserError, match=r"step 3: ran out of memory\..* or set it to auto.*\(CUDA out of memory\. Tried\)"
    ):
        trainer.fit()


def test_other_errors_stay_what_they_are(build: Build, tmp_path: Path) -> None:
    trainer, objective = hungry(build, tmp_path)
    objective.weight = lambda batch: (_ for _ in ()).throw(RuntimeError("a fault of ours"))
    with pytest.raises(RuntimeError, match="a fault of ours"):
        trainer.fit()


def test_of_several_processes_one_that_runs_out_of_memory_ends_the_run_and_leaves_word(tmp_path: Path) -> None:
    second = Layout(1, 2, CPU)
    found = FoundRows.__new__(FoundRows)
    found.path, found.layout, found.rows = tmp_path / "micro_batches.json", second, {0: 8}
    with pytest.raises(UserError, match=r"step 6: process 1 ran out of memory with 8 rows.* it will be 4; the same"):
        found.halve(5, 8)
    said = json.loads((tmp_path / "micro_batches.json").read_text())
    assert [(each["step"], each["rows"]) for each in said] == [(0, 8), (5, 4)]
