"""What the parts of a model are worth at a small size: one budget, one text, one part changed at a time.

    LLMTRAIN_DATA=FOLDER python benchmarks/architectures.py --output benchmarks/results   # all, then the tables
    LLMTRAIN_DATA=FOLDER python benchmarks/architectures.py engine.threads=1 --only llama alibi

FOLDER holds pretrain/{wikipedia_en,books,stackexchange,github_code}, which are mixed alike. All models have 4 layers of
width 128, the same tokenizer of 2048 tokens, and 500 steps of 2048 tokens (a million, seen at most once) in rows of
128; learning rate, schedule and seed are the same, so that a part which wants others is at a disadvantage. Mixtures of
experts have the active parameters of the base and more in all. Encoders and encoder-decoders have objectives of their
own, which predict one token in seven: they get 3000 steps.

bits per byte: on held-out text of the four sources, mean of the four, at the end; beside it what a model of single
tokens has on the same tokens, to which it is to be compared: a masked or a corrupted text tells more of what is missing
than what stands before it does, so rows of different objectives are not comparable. What has finished is not done
again.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alignment import llmtrain

from llmtrain.engine.tracking import read_metrics
from llmtrain.models.footprint import num_active, num_parameters
from llmtrain.models.formats import read_config
from llmtrain.models.heads import make_model
from llmtrain.models.meta import on_meta
from llmtrain.stages import handover

RUNS_DIR = Path("runs/architectures")
SOURCES = ("wikipedia_en", "books", "stackexchange", "github_code")
BASE = [
    "tokenizer.vocab_size=2048",
    "train.sequence_length=128", "train.batch_tokens=2048", "train.steps=500", "optimizer.lr=2e-3",
    "eval.every_steps=100", "eval.max_rows=64",
]  # fmt: skip
LONGER = ["train.steps=3000", "eval.every_steps=500"]
# Of llama_tiny, one part changed. Without a gate 4 x hidden, as many parameters as 8/3 with one.
PARTS: dict[str, Sequence[str]] = {
    "llama": [],
    "llama, another seed": ["seed=1"],
    "llama, a third seed": ["seed=2"],
    "no positions": ["model.positions=none"],
    "learned positions": ["model.positions=learned"],
    "sinusoidal positions": ["model.positions=sinusoidal"],
    "alibi": ["model.positions=alibi"],
    "a quarter rotated": ["model.partial_rotary_factor=0.25"],
    "window of 32": ["model.sliding_window=32"],
    "window of 32, every second layer": ["model.sliding_window=32", "model.attention_pattern=[sliding,full]"],
    "two key-value heads": ["model.num_kv_heads=2"],
    "one key-value head": ["model.num_kv_heads=1"],
    "query-key norm": ["model.qk_norm=head"],
    "layernorm": ["model.norm=layernorm"],
    "post-norm": ["model.norm_placement=post"],
    "reordered norm": ["model.norm_placement=reordered"],
    "sandwich norm": ["model.norm_placement=sandwich"],
    "parallel block": ["model.block=parallel"],
    "gelu": ["model.activation=gelu_tanh"],
    "squared relu": ["model.activation=relu_squared"],
    "geglu": ["model.activation=geglu"],
    "biases": ["model.bias=true"],
    "head of its own": ["model.tied_embeddings=false"],
    "soft-capped logits": ["model.logit_softcap=30"],
    "label smoothing": ["objective.label_smoothing=0.1"],
    "z-loss": ["objective.z_loss=1e-4"],
}  # fmt: skip
MODELS = {name: ["model=llama_tiny", *keys] for name, keys in PARTS.items()} | {
    # other architectures of the gallery: experts, of which each token goes through some, and other objectives
    "switch_tiny": ["model=switch_tiny", "model.experts.capacity_group_tokens=128"],
    "mixtral_tiny": ["model=mixtral_tiny"],
    "mpt_tiny": ["model=mpt_tiny"],
    "gemma3_tiny": ["model=gemma3_tiny"],
    "prefix": ["model=llama_tiny", "objective=prefix"],
    # one token in seven is predicted, and post-norm does not bear the rate of the others
    "bert_tiny": ["model=bert_tiny", *LONGER, "optimizer.lr=5e-4"],
    "t5_tiny": ["model=t5_tiny", *LONGER, "optimizer.lr=1e-3"],
    # of such rows the decoder reads 29 tokens
    "switch_t5_tiny": [
        "model=switch_t5_tiny",
        "model.experts.capacity_group_tokens=16",
        *LONGER,
        "optimizer.lr=1e-3",
    ],
}


def sources(folder: Path) -> list[str]:
    """Keys for the text."""
    found = ["data=files"]
    for name in SOURCES:
        key = f"data.sources.{name}"
        found += [f"+{key}.path={folder}/{name}/train.jsonl.gz",
                  f"+{key}.validation_path={folder}/{name}/validation.jsonl.gz"]  # fmt: skip
    return [*found, "~data.sources.files"]


def measured(name: str, keys: Sequence[str], text: Sequence[str]) -> dict[str, Any]:
    """What a run has come to; made if it is not there."""
    run = name.replace(" ", "_").replace(",", "")
    folder = RUNS_DIR / run
    if not (folder / "model").is_dir():
        llmtrain("pretrain", [f"runs_dir={RUNS_DIR}", f"run={run}", *text, *BASE, *MODELS[name], *keys])
    rows = [row for row in read_metrics(folder) if f"eval/{SOURCES[0]}/bits_per_byte" in row]
    with on_meta():
        built = make_model(*read_config(folder / "model"))

    def mean(row: dict[str, Any], metric: str) -> float:
        return statistics.mean(row[f"eval/{source}/{metric}"] for source in SOURCES)

    return {
        "model": name, "keys": list(MODELS[name]), "bits_per_byte": round(mean(rows[-1], "bits_per_byte"), 4),
        "unigram_bits_per_byte": round(mean(rows[-1], "unigram_bits_per_byte"), 4),
        "curve": [[row["step"], round(mean(row, "bits_per_byte"), 4)] for row in rows],
        "parameters": num_parameters(built), "active": num_active(built), "code": handover.read_lineage(folder)["code"],
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown, the best first."""
    lines = ["| model | bits per byte | a model of single tokens | parameters | active |", "|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: row["bits_per_byte"]):
        measured = f"{row['bits_per_byte']:.3f} | {row['unigram_bits_per_byte']:.3f}"
        lines.append(f"| {row['model']} | {measured} | {row['parameters']:,} | {row['active']:,} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MODELS, help="these models alone")
    parser.add_argument("--output", type=Path, help="write architectures.jsonl into this folder")
    parser.add_argument("keys", nargs="*", help="keys for every run, such as engine.threads=1")
    arguments = parser.parse_intermixed_args()
    if "LLMTRAIN_DATA" not in os.environ:
        sys.exit("set LLMTRAIN_DATA to the folder that holds pretrain/wikipedia_en and others")
    text = sources(Path(os.environ["LLMTRAIN_DATA"]) / "pretrain")
    rows = [measured(name, arguments.keys, text) for name in arguments.only or MODELS]
    print(table(rows))
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        (arguments.output / "architectures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
