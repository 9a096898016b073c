"""What saving costs: steps of `pretrain`'s own loop with asynchronous saves every so many steps against steps without.

    python benchmarks/save_stall.py --model llama_10m --every 50 --rounds 4

One run, in which intervals with a save and intervals without take turns, so that a machine whose speed drifts treats
them alike. An interval begins with the step that the save comes after, so that what stands still counts, and so does
what the writing thread takes from the steps beside it. Reported are the ratio of mean steps, over all and of each pair
of intervals, the same of the processor's time, which others on the machine hardly change, what a save takes judging by
the steps next to it alone, and the seconds that the loop itself stood still.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from contenders import report

VOCAB_SIZE = 8192
LENGTH = 256
NEAR = 10  # steps after a save in which its file is written


def build_config(folder: Path, model: str, rows: int, every: int, rounds: int, overrides: list[str]) -> Any:
    """The config of `llmtrain pretrain`: a save at every second interval."""
    from llmtrain.config.compose import load_config

    return load_config(
        "pretrain",
        [
            f"runs_dir={folder}", "run=stall", f"model={model}", f"tokenizer.vocab_size={VOCAB_SIZE}",
            f"train.sequence_length={LENGTH}", f"train.batch_tokens={rows * LENGTH}",
            f"train.steps={(2 * rounds + 1) * every}", f"checkpoint.every_steps={2 * every}", "engine.compile=false",
            *overrides,
        ],
    )  # fmt: skip


def train(config: Any, rows: int) -> tuple[list[float], list[float]]:
    """The seconds of each step, from its batch to the next one's: of the clock, and of the processor."""
    import torch

    from llmtrain.data.mixture import Phase, PhasedMixture
    from llmtrain.models.heads import LanguageModel
    from llmtrain.objectives.next_token import NextToken, TokenBatch
    from llmtrain.stages.assembly import Plan, Run
    from llmtrain.stages.pretrain import build_tokenizer

    stamps: list[tuple[float, float]] = []

    class Batches:
        def __call__(self, step: int) -> TokenBatch:
            stamps.append((time.perf_counter(), time.process_time()))
            tokens = torch.randint(VOCAB_SIZE, (rows, LENGTH), generator=torch.Generator().manual_seed(step))
            mask = torch.ones_like(tokens, dtype=torch.bool)
            mask[:, 0] = False
            return TokenBatch(tokens=tokens, loss_mask=mask, source=torch.zeros(rows, dtype=torch.int64))

        def counts(self, step: int) -> dict[str, float]:
            return {}

    run = Run.open(config)
    tokenizer = build_tokenizer(config, run.cache)
    model = LanguageModel(config.model, VOCAB_SIZE).initialise(torch.Generator().manual_seed(0))
    plan = Plan(PhasedMixture([Phase(0, {"random": 1.0})]), config.train.steps, rows, {"random": 1}, {"random": ""})
    run.fit(
        model=model, trained=model, batches=Batches(), objective=NextToken(), tokenizer=tokenizer, plan=plan,
        fixed_shapes=True,
    )  # fmt: skip
    clock, processor = zip(*stamps, strict=True)
    return tuple([end - begin for begin, end in itertools.pairwise(each)] for each in (clock, processor))


def compare(seconds: list[float], every: int, rounds: int) -> dict[str, Any]:
    """Intervals with and without a save, in turn."""
    # the save comes after step 2 * every, which is number 2 * every - 1
    begins = [2 * every * (number + 1) - 1 for number in range(rounds)]
    with_save = [seconds[begin : begin + every] for begin in begins]
    without = [seconds[begin - every : begin] for begin in begins]
    # the same as what a save takes off the steps beside it, which a machine whose speed drifts disturbs least: how much
    # longer each of the first steps of an interval is than the last ones, its median over the intervals of either kind
    longer = {}
    for kind, blocks in (("with", with_save), ("without", without)):
        late = [statistics.median(block[NEAR:]) for block in blocks]
        near = [[block[place] - rest for block, rest in zip(blocks, late, strict=True)] for place in range(NEAR)]
        longer[kind] = sum(map(statistics.median, near))
    seconds_of_a_save = longer["with"] - longer["without"]
    pairs = [statistics.fmean(a) / statistics.fmean(b) for a, b in zip(with_save, without, strict=True)]
    mean_with, mean_without = (statistics.fmean(itertools.chain(*blocks)) for blocks in (with_save, without))
    return {
        "step_seconds": round(mean_without, 4),
        "with_over_without": round(mean_with / mean_without, 4),
        "median_of_pairs": round(statistics.median(pairs), 4),
        "seconds_of_a_save": round(seconds_of_a_save, 4),
        "of_an_interval": round(seconds_of_a_save / (every * mean_without), 4),
        "pairs": [round(pair, 4) for pair in pairs],
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama_10m")
    parser.add_argument("--rows", type=int, default=4, help=f"rows of {LENGTH} tokens in a step")
    parser.add_argument("--every", type=int, default=50, help="steps between saves")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--output", type=Path, help="append the result to this JSON-lines file")
    parser.add_argument("overrides", nargs="*", help="of the config, such as checkpoint.asynchronous=false")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = build_config(
            Path(folder), arguments.model, arguments.rows, arguments.every, arguments.rounds, arguments.overrides
        )
        clock, processor = train(config, arguments.rows)
        from llmtrain.engine.tracking import read_metrics

        run = Path(folder) / "stall"
        stalls = [row["perf/seconds/saving"] for row in read_metrics(run) if row.get("perf/seconds/saving")]
        newest = max((run / "checkpoints").glob("step-*"))
        size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    told = {"model": arguments.model, "rows": arguments.rows, "every": arguments.every, "mb": round(size / 1e6)}
    told |= {"overrides": arguments.overrides} if arguments.overrides else {}
    stood_still = {"stall_seconds": round(statistics.median(stalls), 4)}
    of_processor = compare(processor, arguments.every, arguments.rounds)["with_over_without"]
    told |= compare(clock, arguments.every, arguments.rounds) | {"processor_with_over_without": of_processor}
    report(told | stood_still, arguments.output)


if __name__ == "__main__":
    main()
