"""Learning rates over widths: the best one under muP and under the usual parametrisation, on real text.

    python benchmarks/mup.py [--widths 32,64,128,256] [--steps 150] [--seed 0]

Every width, every learning rate: a new model of two layers (Llama's parts, heads of 16, more of them in wider models)
is trained for some steps on bytes of the embedded prose, on the same rows in the same order, with AdamW, a warm-up of
a tenth and a linear decay. Which learning rate is best is said by the loss on held-out bytes, in bits per byte, and
between the points of the grid by the parabola through the lowest point and its neighbours. Under muP the narrowest
width is the base model, which both parametrisations have in common.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from llmtrain.config.schema import (
    Gpt2InitConfig,
    InitConfig,
    ModelConfig,
    MupInitConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from llmtrain.data.embedded import embedded_documents
from llmtrain.models.heads import LanguageModel
from llmtrain.models.mup import at_width, learning_rate_scales
from llmtrain.objectives.next_token import NextToken, TokenBatch
from llmtrain.optim.optimizers import build_optimizer
from llmtrain.optim.schedules import learning_rate

VOCAB_SIZE, LENGTH, ROWS, HELD_OUT_ROWS, HEAD_DIM = 256, 64, 8, 128, 16
# Powers of 2.
EXPONENTS = range(-10, -2)
OBJECTIVE = NextToken()


def text() -> Tensor:
    """The embedded prose as bytes, in rows [N, LENGTH] of which the first are held out."""
    whole = np.frombuffer("".join(embedded_documents("prose")).encode(), dtype=np.uint8)
    rows = torch.from_numpy(whole[: len(whole) // LENGTH * LENGTH].astype(np.int64)).view(-1, LENGTH)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def batch(rows: Tensor) -> TokenBatch:
    """Rows of bytes of which all but the first are learnt."""
    mask = torch.ones(rows.shape, dtype=torch.bool)
    mask[:, 0] = False
    return TokenBatch(tokens=rows, loss_mask=mask, source=torch.zeros(len(rows), dtype=torch.int64))


def architecture(width: int, init: InitConfig) -> ModelConfig:
    """The model of a width."""
    return ModelConfig(
        num_layers=2, hidden_size=width, num_heads=width // HEAD_DIM, ffn_hidden_size=3 * width,
        max_sequence_length=LENGTH, tied_embeddings=False, init_std=0.1, init=init,
    )  # fmt: skip


def trained(config: ModelConfig, lr: float, rows: Tensor, *, steps: int, seed: int) -> float:
    """Bits per byte of held-out rows after training; infinite where it diverged."""
    model = LanguageModel(at_width(config), VOCAB_SIZE).initialise(torch.Generator().manual_seed(seed))
    settings = OptimizerConfig(lr=lr)
    optimizer = build_optimizer(model, settings, learning_rate_scales(model, settings.target))
    schedule = ScheduleConfig(name="linear", warmup_steps=steps // 10)
    order = torch.randperm(len(rows) - HELD_OUT_ROWS, generator=torch.Generator().manual_seed(seed)) + HELD_OUT_ROWS
    for step in range(steps):
        now = learning_rate(step, peak=lr, total_steps=steps, config=schedule)
        for group in optimizer.param_groups:
            group["lr"] = now * group.get("lr_scale", 1.0)
        portion = batch(rows[order[step * ROWS : (step + 1) * ROWS]])
        (OBJECTIVE(model, portion)[0] / OBJECTIVE.weight(portion)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    held_out = batch(rows[:HELD_OUT_ROWS])
    with torch.no_grad():
        nats = float(OBJECTIVE(model, held_out)[0] / OBJECTIVE.weight(held_out))
    return nats / math.log(2) if math.isfinite(nats) else math.inf


def best_exponent(losses: Sequence[float]) -> float:
    """Where the parabola through the lowest point and its neighbours is lowest, as a power of 2."""
    lowest = min(range(len(losses)), key=losses.__getitem__)
    if not 0 < lowest < len(losses) - 1 or not math.isfinite(sum(losses[lowest - 1 : lowest + 2])):
        return EXPONENTS[lowest]
    before, at, after = losses[lowest - 1 : lowest + 2]
    return EXPONENTS[lowest] + (before - after) / (2 * (before - 2 * at + after))


def main() -> None:
    """Measure and print: one line for each parametrisation and width."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="32,64,128,256")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    widths = [int(width) for width in arguments.widths.split(",")]
    rows = text()
    inits: tuple[InitConfig, ...] = (
        MupInitConfig(base_hidden_size=min(widths), base_head_dim=HEAD_DIM), Gpt2InitConfig(),
    )  # fmt: skip
    for init in inits:
        for width in widths:
            start = time.process_time()
            losses = [
                trained(architecture(width, init), 2.0**exponent, rows, steps=arguments.steps, seed=arguments.seed)
                for exponent in EXPONENTS
            ]
            result = {
                "init": init.name, "width": width, "steps": arguments.steps, "seed": arguments.seed,
                "best_lr_log2": round(best_exponent(losses), 2), "best_bits_per_byte": round(min(losses), 4),
                "bits_per_byte": {
                    f"2^{exponent}": round(loss, 4) for exponent, loss in zip(EXPONENTS, losses, strict=True)
                },
                "cpu_seconds": round(time.process_time() - start, 1), "torch": torch.__version__,
                "machine": platform.processor() or platform.machine(),
            }  # fmt: skip
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
