"""How soon the command line answers: `--help` and a config error, against `python -c pass` and `import torch`.

    python benchmarks/startup.py

Each command is run in turn, round after round; reported are medians and the median over rounds of the ratios.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

LLMTRAIN = str(Path(sys.executable).with_name("llmtrain"))
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "python -c 'import torch'": [sys.executable, "-c", "import torch"],
    "llmtrain --help": [LLMTRAIN, "--help"],
    "llmtrain pretrain --help": [LLMTRAIN, "pretrain", "--help"],
    "config error": [LLMTRAIN, "pretrain", "optimizer.lrr=1", "model=lama_tiny"],
}


def seconds(command: list[str]) -> float:
    """Wall time of a whole process."""
    start = time.perf_counter()
    subprocess.run(command, capture_output=True, check=False)
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    for command in COMMANDS.values():
        seconds(command)  # warm caches
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    bare, torch = times["python -c pass"], times["python -c 'import torch'"]
    for name, values in times.items():
        ratios = {
            "over_pass": statistics.median(value / other for value, other in zip(values, bare, strict=True)),
            "over_import_torch": statistics.median(value / other for value, other in zip(values, torch, strict=True)),
        }
        print(
            json.dumps(
                {"command": name, "seconds": round(statistics.median(values), 3)}
                | {key: round(value, 2) for key, value in ratios.items()}
            )
        )


if __name__ == "__main__":
    main()
