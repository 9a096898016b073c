"""What the loader costs beside a training step: `TokenBatches(step)` against the loop of `pretrain`, in one process.

    python benchmarks/loader.py [--models bench_a bench_b] [--steps 10]

A mixture of four sources is prepared into a temporary folder: prose and code of the standard library, hundreds of
thousands of documents of some words, and hundreds of long ones. `pretrain`'s loop trains the models of
`train_throughput.py` on it, 4096 tokens a step, compiled, in bfloat16 where the processor has units for it; timed are
its steps and, inside of them, the loader. Then the loader is timed alone at random steps, for each way of making
rows. The share is the loader's time over that of the step: in the loop, or (alone) over the loop's median step.
"""

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from train_throughput import ROWS, build_config

from llmtrain.config.schema import CorpusConfig, SourceConfig
from llmtrain.data.batches import RowOrder, TokenBatches
from llmtrain.data.embedded import embedded_documents
from llmtrain.data.mixture import Phase, PhasedMixture
from llmtrain.data.preparation import prepare_sources
from llmtrain.data.sequences import text_rows
from llmtrain.data.shards import PreparedSource
from llmtrain.data.tokenizers import Tokenizer, train_tokenizer
from llmtrain.engine.distributed import join
from llmtrain.engine.speed import has_bfloat16
from llmtrain.models.heads import LanguageModel
from llmtrain.objectives.next_token import NextToken, TokenBatch
from llmtrain.stages.assembly import Plan, Run

VOCAB_SIZE = 8192
BATCH_TOKENS = 4096
WARM_UP = 3  # steps; the first compiles
WEIGHTS = {"prose": 0.4, "code": 0.3, "short": 0.2, "long": 0.1}
WAYS: dict[str, dict[str, Any]] = {
    "blocks": {}, "blocks, documents apart": {"attend_across_documents": False},
    "documents": {"sequences": "documents"},
    "documents apart": {"sequences": "documents", "attend_across_documents": False},
}  # fmt: skip


class Timed:
    """A batch source that notes when it was called and how long it took."""

    def __init__(self, batches: TokenBatches) -> None:
        self.batches, self.counts = batches, batches.counts
        self.begun: list[float] = []
        self.seconds: list[float] = []

    def __call__(self, step: int) -> TokenBatch:
        """The batch."""
        self.begun.append(time.perf_counter())
        batch = self.batches(step)
        self.seconds.append(time.perf_counter() - self.begun[-1])
        return batch


def made_up(documents: int, words: int) -> Iterator[str]:
    """Texts of up to `words` words."""
    draw = random.Random(0)
    vocabulary = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(1, 9))) for _ in range(2000)]
    return (" ".join(draw.choices(vocabulary, k=draw.randint(1, words))) for _ in range(documents))


def prepare(folder: Path, short_documents: int) -> tuple[dict[str, PreparedSource], Tokenizer]:
    """The sources, prepared."""
    sources = {name: SourceConfig(path=f"embedded:{name}") for name in ("prose", "code")}
    for name, texts in (("short", made_up(short_documents, 20)), ("long", made_up(short_documents // 500, 5000))):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        sources[name] = SourceConfig(path=str(file))
    tokenizer = train_tokenizer(embedded_documents("prose"), VOCAB_SIZE)
    return prepare_sources(CorpusConfig(sources=sources), tokenizer=tokenizer, cache_dir=folder), tokenizer


def loader(
    prepared: dict[str, PreparedSource], tokenizer: Tokenizer, length: int, way: dict[str, Any]
) -> tuple[TokenBatches, Plan]:
    """The batches of `pretrain` on the sources."""
    data = CorpusConfig(sources={name: SourceConfig(path=name) for name in prepared}, **way)
    rows = {name: text_rows(each.train, data, length, tokenizer.pad_id) for name, each in prepared.items()}
    sizes = {name: len(each) for name, each in rows.items()}
    mixture = PhasedMixture([Phase(0, WEIGHTS)])
    order = RowOrder(mixture, sizes, BATCH_TOKENS // length, seed=0)
    plan = Plan(mixture, 0, order.batch_rows, sizes, dict.fromkeys(sizes, ""))
    return TokenBatches(rows, order, sequence_length=length), plan


def train(config: Any, batches: Timed, plan: Plan, tokenizer: Tokenizer, folder: Path) -> None:
    """Some steps of the loop of `pretrain`."""
    model = LanguageModel(config.model, VOCAB_SIZE).initialise(torch.Generator().manual_seed(0))
    run = Run(config, folder, join("cpu"), time.monotonic())
    run.fit(
        model=model, trained=model, batches=batches, tokenizer=tokenizer, plan=plan, fixed_shapes=True,
        objective=NextToken(source_names=list(WEIGHTS)),
    )  # fmt: skip


def seconds_alone(batches: TokenBatches, calls: int) -> float:
    """Mean time of a batch, at random steps of a long run."""
    steps = random.Random(1).choices(range(10**6), k=calls)
    for step in steps[:20]:
        batches(step)
    start = time.perf_counter()
    for step in steps:
        batches(step)
    return (time.perf_counter() - start) / calls


def measure(
    model: str, steps: int, calls: int, prepared: dict[str, PreparedSource], tokenizer: Tokenizer, folder: Path
) -> Iterator[dict[str, Any]]:
    """One result for the loop, and one for each way of making rows."""
    config = build_config(model, "bfloat16")
    length = config.train.sequence_length
    assert ROWS[model] * length == BATCH_TOKENS
    batches, plan = loader(prepared, tokenizer, length, {})
    plan.steps = WARM_UP + steps + 1  # a step lasts until the next begins
    timed = Timed(batches)
    train(config, timed, plan, tokenizer, folder / model)
    taken = [after - before for before, after in zip(timed.begun, timed.begun[1:], strict=False)][WARM_UP:]
    inside = timed.seconds[WARM_UP:-1]
    yield said(model, "blocks, in the loop", sum(inside) / len(inside), sum(taken) / len(taken))
    for name, way in WAYS.items():
        alone = seconds_alone(loader(prepared, tokenizer, length, way)[0], calls)
        yield said(model, f"{name}, alone", alone, statistics.median(taken))


def said(model: str, what: str, loading: float, step: float) -> dict[str, Any]:
    """A line of the results."""
    return {
        "model": model, "rows": what, "loader_ms": round(loading * 1e3, 3), "step_ms": round(step * 1e3, 1),
        "share_percent": round(100 * loading / step, 4), "delivered_tokens_per_second": round(BATCH_TOKENS / loading),
        "consumed_tokens_per_second": round(BATCH_TOKENS / step), "delivered_over_consumed": round(step / loading),
    }  # fmt: skip


def main() -> None:
    """Prepare, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--steps", type=int, default=10, help="measured training steps")
    parser.add_argument("--calls", type=int, default=500, help="batches of the loader alone")
    parser.add_argument("--documents", type=int, default=300_000, help="in the source of short ones")
    parser.add_argument("--output", type=Path, help="append the results to this JSON-lines file")
    arguments = parser.parse_args()
    machine = {
        "dtype": "bfloat16" if has_bfloat16(torch.device("cpu")) else "float32", "torch": torch.__version__,
        "cpus": torch.get_num_threads(), "machine": platform.processor() or platform.machine(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        prepared, tokenizer = prepare(Path(name), arguments.documents)
        sizes = {name: (each.train.summary.documents, len(each.train)) for name, each in prepared.items()}
        print(json.dumps({"documents and tokens": sizes} | machine), flush=True)
        for model in arguments.models:
            for result in measure(model, arguments.steps, arguments.calls, prepared, tokenizer, Path(name)):
                print(json.dumps(result), flush=True)
                if arguments.output:
                    with arguments.output.open("a") as file:
                        file.write(json.dumps(result | machine) + "\n")


if __name__ == "__main__":
    main()
