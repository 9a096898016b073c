"""How fast `llmtrain prepare` makes tokens of text, against bare `tokenizers` and `datasets.map`, in one run.

    python benchmarks/prepare.py [--text corpus.jsonl --tokenizer FOLDER] [--rounds 3] [--megabytes 200]

Per round, in turn: `encode_batch_fast` on texts that are in memory already (the ceiling: with as many threads as there
are cores, nothing read or written); `llmtrain prepare` as users start it, from JSONL to finished shards; and
`datasets.map(batched)` with 1 and 2 processes. Reported are MB of text a second and medians of the ratios; start-up
and imports are not counted for `datasets`, whose work is measured from `map` on, but they are for `llmtrain prepare`.
The peak memory of `llmtrain prepare` is that of all its processes together, pages they share left out.
Without `--text` it is the machine's own Python sources, over and over with words exchanged. `datasets.map` is slower by
far, so it may be measured on the first `--map-megabytes` only.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from llmtrain.data.embedded import embedded_documents
from llmtrain.data.tokenizers import train_tokenizer

LLMTRAIN = str(Path(sys.executable).with_name("llmtrain"))
BARE = """
import json, sys, time
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[2])
texts = [json.loads(line)["text"] for line in open(sys.argv[1], encoding="utf-8")]
tokenizer.encode_batch_fast(texts[:50], add_special_tokens=False)
start = time.perf_counter()
for first in range(0, len(texts), 1000):
    tokenizer.encode_batch_fast(texts[first : first + 1000], add_special_tokens=False)
print(time.perf_counter() - start)
"""
MAPPED = """
import sys, tempfile, time
import datasets
from tokenizers import Tokenizer
datasets.disable_progress_bars()
tokenizer = Tokenizer.from_file(sys.argv[2])
rows = datasets.load_dataset("json", data_files=sys.argv[1], split="train", cache_dir=sys.argv[4])
def encode(batch):
    return {"ids": [each.ids for each in tokenizer.encode_batch(batch["text"], add_special_tokens=False)]}
start = time.perf_counter()
rows.map(encode, batched=True, remove_columns=["text"], num_proc=int(sys.argv[3]), load_from_cache_file=False)
print(time.perf_counter() - start)
"""


def take(text: Path, megabytes: float, into: Path) -> float:
    """The first `megabytes` of a JSONL file as another; MB of text in it."""
    size = 0
    with text.open(encoding="utf-8") as source, into.open("w", encoding="utf-8") as target:
        for line in source:
            size += len(json.loads(line)["text"].encode())
            target.write(line)
            if size >= megabytes * 1e6:
                break
    return size / 1e6


def script(code: str, *arguments: str, parallel: bool = True) -> float:
    """Seconds that a script reports."""
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "true" if parallel else "false"}
    command = [sys.executable, "-c", code, *arguments]
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def prepare(text: Path, tokenizer: Path, folder: Path) -> list[str]:
    """The command that prepares a file."""
    return [
        LLMTRAIN, "prepare", "data=files", f"data.sources.files.path={text}", f"tokenizer.path={tokenizer}",
        f"runs_dir={folder}",
    ]  # fmt: skip


def watched(command: list[str]) -> tuple[float, float]:
    """Wall time of a command, and the largest sum of the memory that it and its children have for themselves, in MB."""
    start = time.perf_counter()
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak, done = 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.5):
            total = 0.0
            for each in [process, *process.children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    total += each.memory_full_info().uss / 1e6
            peak = max(peak, total)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    assert code == 0
    return seconds, peak


def speeds(text: Path, tokenizer: Path, megabytes: float, folder: Path) -> dict[str, float]:
    """MB a second of the ceiling and of ours, one after the other."""
    ceiling = script(BARE, str(text), str(tokenizer / "tokenizer.json"))
    ours, peak = watched(prepare(text, tokenizer, folder / "runs"))
    return {"encode_batch_fast": megabytes / ceiling, "llmtrain prepare": megabytes / ours, "peak MB": peak}


def mapped(text: Path, tokenizer: Path, megabytes: float, folder: Path) -> dict[str, float]:
    """MB a second of `datasets.map`."""
    arguments = [str(text), str(tokenizer / "tokenizer.json")]
    one = script(MAPPED, *arguments, "1", str(folder / "map"))
    two = script(MAPPED, *arguments, "2", str(folder / "map"), parallel=False)
    return {"datasets.map, 1 process": megabytes / one, "datasets.map, 2 processes": megabytes / two}


def make_text(folder: Path, megabytes: float) -> Path:
    """JSONL of the machine's Python sources, each time with other words exchanged."""
    documents, draw = [*embedded_documents("code"), *embedded_documents("prose")], random.Random(0)
    size, file = 0, folder / "text.jsonl"
    with file.open("w", encoding="utf-8") as target:
        while size < megabytes * 1e6:
            words = draw.choice(documents).split(" ")
            for _ in range(len(words) // 20 + 1):
                words[draw.randrange(len(words))] = draw.choice(words) + str(draw.randrange(100))
            text = " ".join(words)
            size += len(text.encode())
            target.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return file


def make_tokenizer(text: Path, folder: Path) -> Path:
    """A tokenizer of 8192 tokens trained on the first 20 MB."""
    part = folder / "first.jsonl"
    take(text, 20, part)
    with part.open(encoding="utf-8") as lines:
        train_tokenizer((json.loads(line)["text"] for line in lines), 8192).save(folder / "tokenizer")
    return folder / "tokenizer"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="JSONL with a column `text`")
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer.json; else one of 8192 tokens is trained")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=float, default=200.0)
    parser.add_argument("--map-megabytes", type=float, default=40.0)
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp())
    try:
        text, part, less = (
            arguments.text or make_text(work, arguments.megabytes),
            work / "part.jsonl",
            work / "less.jsonl",
        )
        tokenizer = arguments.tokenizer or make_tokenizer(text, work)
        megabytes = take(text, arguments.megabytes, part)
        map_megabytes = take(text, arguments.map_megabytes, less)
        rounds = []
        for number in range(arguments.rounds):
            folder = work / str(number)
            rounds.append(speeds(part, tokenizer, megabytes, folder) | mapped(less, tokenizer, map_megabytes, folder))
            print(json.dumps({name: round(speed, 2) for name, speed in rounds[-1].items()}), flush=True)
        best_map = [max(v for name, v in each.items() if "map" in name) for each in rounds]
        ours = [each["llmtrain prepare"] for each in rounds]
        ceiling = [each["encode_batch_fast"] for each in rounds]
        print(f"{megabytes:.0f} MB; over encode_batch_fast: {_median(ours, ceiling):.2f}; "
              f"over the better datasets.map: {_median(ours, best_map):.2f}")  # fmt: skip
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _median(ours: list[float], others: list[float]) -> float:
    return statistics.median(our / other for our, other in zip(ours, others, strict=True))


if __name__ == "__main__":
    main()
