"""What several processes gain: memory of each under FSDP2, and tokens per second of two over those of one.

    python benchmarks/parallel.py [--steps 8] [--rounds 3] [--processes 1 2 4]

Memory: a model of many small blocks is trained for a few steps with AdamW on a row of few tokens, alone and sharded
over two and four processes. Compared are the growth of each process's peak resident memory, from before the model is
built, and the formula: weights, gradients and two moments in float32, 16 bytes a parameter, over the processes. Freed
memory goes back to the kernel meanwhile; a run on CPUs keeps it (`engine/memory.py`), for speed, and in pieces.

Weak scaling: each process has one thread and as many rows as one process alone; in each round all take turns, and the
median of their steps counts.
"""

import argparse
import dataclasses
import functools
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from llmtrain.config.schema import (
    CheckpointConfig,
    EngineConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    TrackerConfig,
)
from llmtrain.engine.distributed import arrange, join, leave, spread
from llmtrain.engine.launching import launch
from llmtrain.engine.speed import Speed
from llmtrain.engine.tracking import Tracker
from llmtrain.engine.trainer import Trainer
from llmtrain.models.heads import make_model
from llmtrain.objectives.next_token import NextToken, TokenBatch
from llmtrain.optim.optimizers import build_optimizer

SLIM = ModelConfig(num_layers=48, hidden_size=256, num_heads=4, max_sequence_length=16)
SLIM_VOCAB, BYTES_PER_PARAMETER = 256, 16
WIDE = ModelConfig(num_layers=6, hidden_size=256, num_heads=4, max_sequence_length=256)
WIDE_VOCAB, WIDE_ROWS = 4096, 4
WARM_UP = 2  # steps


def make_trainer(config: ModelConfig, vocab_size: int, rows: int, length: int, engine: EngineConfig) -> Trainer:
    """The loop of the stages over made-up tokens, `rows` for each process; this process joins the others."""
    layout = arrange(join("cpu", threads=1), engine)
    trained = make_model(config, vocab_size).initialise(torch.Generator().manual_seed(0))

    def batches(step: int) -> TokenBatch:
        draw = torch.Generator().manual_seed(1000 * step + layout.data_rank)
        tokens = torch.randint(vocab_size, (rows, length), generator=draw)
        ones = torch.ones(tokens.shape, dtype=torch.bool)
        return TokenBatch(tokens=tokens, loss_mask=ones, source=torch.zeros(rows, dtype=torch.int64))

    quiet = Tracker(Path(tempfile.mkdtemp()), TrackerConfig(), steps=1, is_main=False, run="", run_config={})
    model = spread(trained, layout)
    return Trainer(
        folder=Path(), layout=layout, model=model, batches=batches, objective=NextToken(),
        optimizer=build_optimizer(trained, OptimizerConfig()), learning_rate=lambda step: 1e-4, steps=1, seed=0,
        tracker=quiet, checkpoint=CheckpointConfig(), eval=EvalConfig(), tracking=TrackerConfig(),
        extra=lambda step: lambda folder: None, autocast=lambda: torch.autocast("cpu", enabled=False),
        speed=Speed(layout.device, 1.0, 1.0),
    )  # fmt: skip


def resident(what: str) -> int:
    """Bytes of this process: `VmRSS` now, `VmHWM` at most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(what))


def forget_peak() -> None:
    """The peak is what it is now."""
    Path("/proc/self/clear_refs").write_text("5")


def measure_memory(folder: Path, engine: EngineConfig) -> None:
    """In each process: the growth of the peak over a few steps."""
    layout = join("cpu", threads=1)
    small = dataclasses.replace(SLIM, num_layers=2)
    warm = make_trainer(small, SLIM_VOCAB, 1, 16, engine)  # what libraries and collectives need themselves
    make_updates = warm.updates()
    for step in range(2):
        make_updates(step, warm.batches(step))
    del warm, make_updates
    gc.collect()
    forget_peak()
    before = resident("VmRSS")
    trainer = make_trainer(SLIM, SLIM_VOCAB, 1, 16, engine)
    make_updates = trainer.updates()
    for step in range(3):
        make_updates(step, trainer.batches(step))
    (folder / f"memory-{layout.rank}").write_text(str(resident("VmHWM") - before))
    leave()


def memory(processes: int) -> dict[str, Any]:
    """The largest growth of a process, against the formula."""
    folder = Path(tempfile.mkdtemp())
    engine = EngineConfig(sharding="fsdp" if processes > 1 else "ddp")
    os.environ["MALLOC_TOP_PAD_"] = "131072"  # the C library's own value; that it is set leaves all as it is
    launch(measure_memory, (folder, engine), processes)
    del os.environ["MALLOC_TOP_PAD_"]
    grown = max(int(path.read_text()) for path in folder.glob("memory-*"))
    parameters = sum(each.numel() for each in make_model(SLIM, SLIM_VOCAB).parameters())
    expected = BYTES_PER_PARAMETER * parameters / processes
    return {
        "measured": "memory", "processes": processes, "parameters": parameters,
        "expected_mib": round(expected / 2**20, 1), "grown_mib": round(grown / 2**20, 1),
        "over_expected": round(grown / expected, 3),
    }  # fmt: skip


def measure_speed(folder: Path, engine: EngineConfig, steps: int) -> None:
    """In each process: the seconds of each step."""
    trainer = make_trainer(WIDE, WIDE_VOCAB, WIDE_ROWS, WIDE.max_sequence_length, engine)
    seconds, make_updates = [], trainer.updates()
    for step in range(WARM_UP + steps):
        start = time.perf_counter()
        make_updates(step, trainer.batches(step))
        seconds.append(time.perf_counter() - start)
    if trainer.layout.is_main:
        (folder / "seconds").write_text(json.dumps(seconds[WARM_UP:]))
    leave()


def seconds_per_step(processes: int, engine: EngineConfig, steps: int) -> float:
    """The median."""
    folder = Path(tempfile.mkdtemp())
    launch(measure_speed, (folder, engine, steps), processes)
    return statistics.median(json.loads((folder / "seconds").read_text()))


def weak_scaling(rounds: int, steps: int) -> list[dict[str, Any]]:
    """Tokens per second of two processes over one, for each sharding."""
    tokens = WIDE_ROWS * WIDE.max_sequence_length
    found: dict[str, list[float]] = {"alone": [], "ddp": [], "fsdp": []}
    for _ in range(rounds):
        found["alone"].append(seconds_per_step(1, EngineConfig(), steps))
        for sharding in ("ddp", "fsdp"):
            found[sharding].append(seconds_per_step(2, EngineConfig(sharding=sharding), steps))
    alone = tokens / statistics.median(found["alone"])
    return [
        {
            "measured": "weak scaling", "sharding": sharding, "tokens_per_second": round(2 * tokens / median),
            "tokens_per_second_of_one": round(alone), "over_one": round(2 * tokens / median / alone, 3),
            "rounds": [round(before / after * 2, 3) for before, after in zip(found["alone"], times, strict=True)],
        }
        for sharding, times in found.items() if sharding != "alone"
        for median in [statistics.median(times)]
    ]  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="0: memory alone")
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2, 4], help="of memory; none: speed alone")
    arguments = parser.parse_args()
    where = {"torch": torch.__version__, "cores": os.cpu_count(), "machine": platform.processor() or platform.machine()}
    show = functools.partial(print, flush=True)
    for processes in arguments.processes:
        show(json.dumps(memory(processes) | where))
    for result in weak_scaling(arguments.rounds, arguments.steps) if arguments.rounds else []:
        show(json.dumps(result | where))


if __name__ == "__main__":
    main()
