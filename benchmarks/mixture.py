"""The order of the data over 10^12 samples: time of a batch, memory, and how closely the weights are met.

    python benchmarks/mixture.py [--printed] [--batch 1024] [--samples 1000000000000]

The 22 weights are those of `data=pile`, which follow from sizes and epochs and have no small common denominator; with
`--printed` they are taken to a hundredth of a percent, as the paper prints them. Each source has as many rows as its
published size gives. Nothing is read: this is which row of which source comes when, of which a batch is made. Memory is
what the process holds more than before the mixture was made; the process as a whole, torch and all, is reported apart.
"""

import argparse
import json
import platform
import random
import statistics
import time
from collections import Counter
from fractions import Fraction

import numpy as np
import psutil

from llmtrain.config.compose import load_config
from llmtrain.data.batches import RowOrder, share
from llmtrain.data.mixture import Mixture, Phase, PhasedMixture
from llmtrain.data.plans import source_weights

PROCESSES = (1, 2, 8, 64)
ROW_BYTES = 8192  # of text: about 2048 tokens
PREFIXES = 1000


def sizes_and_weights(*, printed: bool) -> tuple[dict[str, int], dict[str, float]]:
    """Rows and weights of the Pile's sources, as `data=pile` has them, or as its paper prints them."""
    data = load_config("pretrain", ["data=pile"]).data
    sizes = {name: int((source.published_gib or 0) * 2**30 / ROW_BYTES) for name, source in data.sources.items()}
    weights = source_weights(data, {name: source.published_gib or 0 for name, source in data.sources.items()})
    whole = sum(weights.values())
    return sizes, {name: round(100 * each / whole, 2) for name, each in weights.items()} if printed else weights


def batch_milliseconds(order: RowOrder, samples: int) -> list[float]:
    """Time of the rows of a batch at random steps, sorted."""
    steps = random.Random(0).choices(range(samples // order.batch_rows), k=PREFIXES)
    taken = []
    for step in steps:
        start = time.perf_counter()
        order(step)
        taken.append(1e3 * (time.perf_counter() - start))
    return sorted(taken)


def worst_deviation(mixture: Mixture, weights: dict[str, float], samples: int) -> float:
    """How far the furthest source is from its share at random prefixes, in samples; exactly, of weights as given."""
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    whole, worst = sum(exact.values()), Fraction(0)
    for n in random.Random(1).choices(range(samples), k=PREFIXES):
        counts = mixture.counts(n)
        worst = max(worst, *(abs(counts[name] - n * weight / whole) for name, weight in exact.items()))
    return float(worst)


def counts_are_counted(mixture: PhasedMixture, samples: int) -> bool:
    """Whether `counts` says what the sequence holds, at every prefix."""
    seen: Counter[str] = Counter()
    for n, number in enumerate(mixture(np.arange(samples))[0].tolist(), 1):
        seen[mixture.names[number]] += 1
        if mixture.counts(n) != {name: seen[name] for name in mixture.names}:
            return False
    return True


def processes_agree(order: RowOrder, samples: int) -> bool:
    """Whether the processes' shares, one behind the other, are the global batch, at random steps."""
    for step in random.Random(2).choices(range(samples // order.batch_rows), k=20):
        whole = np.stack(order(step))
        for world in PROCESSES:
            parts = [whole[:, share(order.batch_rows, rank, world)] for rank in range(world)]
            if not (np.concatenate(parts, axis=1) == whole).all():
                return False
    return True


def epochs_are_whole(mixture: PhasedMixture, batch: int) -> bool:
    """Whether each epoch of small sources holds every row once."""
    sizes = {name: 50 + 7 * number for number, name in enumerate(mixture.names)}
    order = RowOrder(mixture, sizes, batch, seed=0)
    source, row = np.concatenate([np.stack(order(step)) for step in range(1 + 200_000 // batch)], axis=1)
    for number, size in enumerate(sizes.values()):
        rows = row[source == number]
        whole = rows[: len(rows) // size * size].reshape(-1, size)
        if not (np.sort(whole, axis=1) == np.arange(size)).all() or len(set(rows[whole.size :])) < len(rows) % size:
            return False
    return True


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--printed", action="store_true", help="weights to a hundredth of a percent")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=10**12)
    arguments = parser.parse_args()
    sizes, weights = sizes_and_weights(printed=arguments.printed)
    process = psutil.Process()
    before, start = process.memory_info().rss, time.perf_counter()
    mixture = PhasedMixture([Phase(0, weights)])
    order = RowOrder(mixture, sizes, arguments.batch, seed=0)
    made = time.perf_counter() - start
    taken = batch_milliseconds(order, arguments.samples)
    held = process.memory_info().rss - before
    plain = Mixture(weights)
    result = {
        "sources": len(weights), "samples": arguments.samples, "batch": arguments.batch,
        "made_in_seconds": round(made, 2), "batch_ms_median": round(statistics.median(taken), 3),
        "batch_ms_99th": round(taken[len(taken) * 99 // 100], 3), "batch_ms_worst": round(taken[-1], 3),
        "held_mb": round(held / 1e6, 1), "process_mb": round(process.memory_info().rss / 1e6, 1),
        "worst_deviation_in_samples": round(worst_deviation(plain, weights, arguments.samples), 4),
        "never_above": round(plain.deviation, 4),
        "counts_are_counted": counts_are_counted(mixture, 20_000),
        "processes_agree": processes_agree(order, arguments.samples),
        "epochs_are_whole": epochs_are_whole(mixture, arguments.batch),
        "numpy": np.__version__, "machine": platform.processor() or platform.machine(),
    }  # fmt: skip
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
