"""Does every method of `llmtrain align` learn? The demo's sums, one fine-tuned model, three seeds.

    python benchmarks/alignment.py --output benchmarks/results      # everything, then the table and the curves
    python benchmarks/alignment.py --only grpo dpo --seeds 1        # some methods, one seed
    python benchmarks/alignment.py engine.threads=1 --shared        # keys for every run; times are not worth a word

Each seed has its own `llmtrain pipeline`, whose ppo and dpo are those of the table. Every other run is one command,
`llmtrain align` with what `RUNS` says; all else is shipped defaults. What has finished is not done again.

exact match: answers to 500 held-out problems that are right, taken greedily; sampled: at temperature 1.
KL: to the fine-tuned model in nats per answer, exact at every position of the sampled answers.
best_of_8 trains nothing: of eight answers of the fine-tuned model, the one that its reward model scores highest.
overoptimised is a known trap (Gao et al. 2022, arXiv 2210.10760): a small reward model, and no KL holds the policy.
"""

import argparse
import json
import math
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llmtrain.config.compose import load_config
from llmtrain.data.encoding import encoded_prompt
from llmtrain.data.rows import read_problems
from llmtrain.data.tokenizers import load_tokenizer
from llmtrain.engine.charts import HEIGHT, NUM_COLOURS, WIDTH, Points, line_chart
from llmtrain.engine.health import read_warnings
from llmtrain.engine.tracking import read_metrics
from llmtrain.generation.sampler import generate
from llmtrain.models.heads import LanguageModel
from llmtrain.rewards.rules import is_right
from llmtrain.stages import handover, starts

RUNS_DIR = Path("runs/alignment")
STAGES = load_config("pipeline", []).stages
LENGTH, NEW_TOKENS = 96, 32
LEARNED = ["reward_model={seed}/reward"]
# the fine-tuned model hardly ever writes some right digits; what is never sampled is never rewarded
RULE = ["rewards=exact_answer", "method.temperature=1.3"]
BASE = [f"train.sequence_length={LENGTH}", f"eval.max_new_tokens={NEW_TOKENS}", "optimizer.weight_decay=0"]
PPO = [key for key in STAGES["ppo"].overrides if key != "method=ppo"]
PAIRS = [*BASE, "train.steps=80", "schedule=linear", "optimizer.lr=2e-4", "eval.every_steps=20"]
ANSWERS = [
    *BASE,
    f"method.max_new_tokens={NEW_TOKENS}",
    "train.batch_rows=256",
    "train.steps=40",
    "eval.every_steps=10",
    "checkpoint.final=last",  # the problems that are measured shall not choose what is measured
]


class Command(NamedTuple):
    """One run of a stage; `{seed}` stands for the folder of the seed's runs."""

    stage: str
    overrides: Sequence[str]
    needs: Sequence[str] = ()
    """Runs that come first, beside those of the pipeline."""


def align(method: str, *overrides: str, needs: Sequence[str] = ()) -> Command:
    """A run from the fine-tuned model."""
    return Command("align", [f"method={method}", "model.init_from={seed}/sft", *overrides], needs)


RUNS = {
    # its margin is one per token: beta=0.1 asks for 5 nats, a hundred for an answer
    "ipo": align("ipo", *PAIRS, "method.beta=1", "method.sft_weight=1"),
    "kto": align("kto", *PAIRS, "method.beta=0.5", "train.batch_rows=32"),
    "orpo": align("orpo", *PAIRS),
    "simpo": align("simpo", *PAIRS, "method.beta=10", "method.sft_weight=1"),
    "best_of_8": align("rejection_sampling", *LEARNED, *ANSWERS, "train.steps=1", "eval.best_of=8"),
    "online_dpo": align("online_dpo", *LEARNED, *ANSWERS, "optimizer.lr=1e-4", "method.beta=0.5"),
    "ppo_rule": align("ppo", *RULE, *PPO),
    "grpo": align(
        "grpo", *RULE, *ANSWERS, "train.steps=200", "schedule=linear", "optimizer.lr=2e-4", "method.minibatches=2",
        "method.dynamic_sampling=2",
    ),
    "rloo": align("rloo", *RULE, *ANSWERS, "optimizer.lr=2e-4", "method.minibatches=2"),
    "reinforce": align("reinforce", *RULE, *ANSWERS, "optimizer.lr=2e-4"),
    "rejection_sampling": align(
        "rejection_sampling", *RULE, *ANSWERS, "optimizer.lr=1e-4", "method.minimum_reward=1"
    ),
    "small": Command("pretrain", [
        "tokenizer.path={seed}/pretrain/model", "model=llama_tiny", "model.num_layers=1", "model.hidden_size=64",
        "model.num_heads=2", "train.batch_tokens=2048", "train.sequence_length=128", "train.steps=400",
        "data.sources.prose.weight=0.05", "data.sources.code.weight=0.05", "data.sources.arithmetic.weight=0.9",
        "optimizer.lr=3e-3", "eval.max_rows=64",
    ]),
    "small_reward": Command("reward", [
        "model.init_from={seed}/small", "train.steps=150", "train.batch_rows=32", f"train.sequence_length={LENGTH}",
        "schedule=linear", "optimizer.lr=1e-3", "eval.max_rows=500",
    ], needs=["small"]),
    "overoptimised": align(
        "ppo", *PPO, "reward_model={seed}/small_reward", "method.kl_coefficient=0",
        "train.steps=20", "schedule=constant", "eval.every_steps=1", needs=["small_reward"],
    ),
}  # fmt: skip
GROUPS = {
    "given pairs": ["dpo", "ipo", "kto", "orpo", "simpo"],
    "learned reward": ["ppo", "online_dpo", "best_of_8"],
    "right or wrong": ["ppo_rule", "grpo", "rloo", "reinforce", "rejection_sampling"],
    "a trap": ["overoptimised"],
}
SHARES = ("before", "exact_match", "sampled")
METHODS = [name for group in GROUPS.values() for name in group]


def make(name: str, seed: int, keys: Sequence[str]) -> Path:
    """The folder of a finished run of this seed; what is not there is run now, with what it needs."""
    root = RUNS_DIR / f"seed{seed}"
    fixed = [f"runs_dir={RUNS_DIR}", f"seed={seed}"]
    if name in STAGES:
        if not (root / "summary.json").is_file():
            llmtrain("pipeline", [f"run={root.name}", *fixed, f"overrides=[{','.join(keys)}]"])
        return root / name
    command = RUNS[name]
    for needed in ("sft", *command.needs):
        make(needed, seed, keys)
    if not handover.read_lineage(root / name).get("finished"):
        overrides = [each.format(seed=root) for each in command.overrides]
        llmtrain(command.stage, [f"run={root.name}/{name}", *fixed, *overrides, *keys])
    return root / name


def llmtrain(command: str, overrides: Sequence[str]) -> None:
    """The product's own command line."""
    line = [sys.executable, "-m", "llmtrain", command, *overrides]
    print("$ llmtrain", *line[3:], file=sys.stderr, flush=True)
    if code := subprocess.run(line, check=False).returncode:
        sys.exit(code)


def measured(name: str, seed: int, keys: Sequence[str]) -> dict[str, Any]:
    """What a run has come to, kept beside it."""
    folder = make(name, seed, keys)
    kept = folder / "alignment.json"
    if not kept.is_file():
        kept.write_text(json.dumps(measure(folder, folder.parent / "sft", name)))
    found: dict[str, Any] = json.loads(kept.read_text())
    return {"method": name, "seed": seed} | found


@torch.no_grad()
def measure(folder: Path, reference: Path, name: str) -> dict[str, Any]:
    """Exact match before and after, sampled too, KL, time, and the curves of a run."""
    rows, lineage = read_metrics(folder), handover.read_lineage(folder)
    curve = [(row["step"], row["eval/exact_match"]) for row in rows if "eval/exact_match" in row]
    found = {
        "before": curve[0][1], "exact_match": curve[-1][1], "seconds": lineage["seconds"], "curve": curve,
        "reward": [(row["step"], row["align/reward"]) for row in rows if "align/reward" in row],
        "warnings": [warning._asdict() for warning in read_warnings(folder)],
    }  # fmt: skip
    if name == "best_of_8":  # log n - (n - 1) / n: an upper bound (Beirami et al. 2024, arXiv 2401.01879)
        best = rows[0]["eval/best_of_8/exact_match"]
        found |= {"exact_match": best, "curve": [(0, best)], "reward": [], "kl": math.log(8) - 7 / 8, "sampled": None}
    else:
        found |= sampled(starts.load_policy(str(folder)), starts.load_policy(str(reference)), folder)
    machine = {"torch": torch.__version__, "machine": platform.processor() or platform.machine()}
    return found | machine | {"commit": lineage["code"].get("commit")}


def sampled(policy: LanguageModel, reference: LanguageModel, folder: Path) -> dict[str, float]:
    """Exact match and KL of one answer to each problem, sampled at temperature 1."""
    tokenizer = load_tokenizer(handover.model_folder(folder))
    problems = read_problems("embedded:arithmetic", 500, RUNS_DIR / "cache")
    rows = [row for each in problems if (row := encoded_prompt(tokenizer, each, LENGTH, "cut"))]
    answers = generate(
        policy.eval(), [row.tokens for row in rows], max_new_tokens=NEW_TOKENS, stop_tokens=set(tokenizer.stop_ids)
    )  # fmt: skip
    right, kl = 0, 0.0
    for row, answer in zip(rows, answers, strict=True):
        right += is_right(tokenizer.decode(answer), row.answer or "")
        kl += exact_kl(policy, reference.eval(), row.tokens, answer)
    return {"sampled": right / len(rows), "kl": kl / len(rows)}


def exact_kl(policy: LanguageModel, reference: LanguageModel, prompt: Sequence[int], answer: Sequence[int]) -> float:
    """KL of the policy to the reference in nats, summed over the positions of an answer, each over all tokens."""
    tokens = torch.tensor([[*prompt, *answer]])
    new, old = (model(tokens)[0, len(prompt) - 1 : -1].log_softmax(-1) for model in (policy, reference))
    return float((new.exp() * (new - old)).sum())


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Medians over seeds with the lowest and the highest, in Markdown."""
    lines = ["| learns from | method | seeds | before | after | sampled | KL, nats | seconds |", "|---" * 8 + "|"]
    for group, names in GROUPS.items():
        for name in names:
            found = [row for row in rows if row["method"] == name]
            if found:
                shares = [spread([row[key] for row in found], 100, " %") for key in SHARES]
                kl, seconds = spread([row["kl"] for row in found]), spread([row["seconds"] for row in found])
                lines.append("| " + " | ".join([group, f"`{name}`", str(len(found)), *shares, kl, seconds]) + " |")
    return "\n".join(lines)


def spread(values: Sequence[float | None], factor: float = 1.0, unit: str = "") -> str:
    """`median (lowest to highest)`; nothing where nothing was measured."""
    kept = sorted(factor * value for value in values if value is not None)
    if not kept:
        return ""
    shown = [f"{value:.3g}" for value in (statistics.median(kept), kept[0], kept[-1])]
    return f"{shown[0]}{unit} ({shown[1]} to {shown[2]})" if len(kept) > 1 else shown[0] + unit


def told(row: Mapping[str, Any]) -> str:
    """Of the trap: when it was noticed, and when the held-out score was below its start."""
    below = next((step for step, score in row["curve"] if score < row["before"]), None)
    said = ", ".join(f"health.{warning['rule']} at step {warning['step']}" for warning in row["warnings"])
    return f"overoptimised, seed {row['seed']}: warned by {said or 'nothing'}; below its start from step {below}"


STYLE = (
    "svg{--line-0:#2458a8;--line-1:#c2541b;--line-2:#2c7d4f;--line-3:#8a3f9e;--line-4:#9a7400;--line-5:#b02a4c}"
    "rect{fill:#fff}text{font:11px system-ui,sans-serif;fill:#68707a}.title{font-weight:bold;fill:#22262b}"
    ".grid{stroke:#e3e1dc}"
)
GAP = 36


def drawing(rows: Sequence[Mapping[str, Any]]) -> str:
    """The curves of exact match, means over seeds, one panel for each group, as a file of SVG."""
    of = {name: [row for row in rows if row["method"] == name] for name in METHODS}
    panels = {
        f"exact match: {group}": {name: mean_curve([row["curve"] for row in of[name]]) for name in names}
        for group, names in GROUPS.items()
    }
    panels["a trap: the reward that is learned from"] = {
        "reward": mean_curve([row["reward"] for row in of["overoptimised"]])
    }
    # what has not been run has no curve
    drawn = {title: {name: points for name, points in curves.items() if points} for title, curves in panels.items()}
    panels = {title: curves for title, curves in drawn.items() if curves}
    parts = [panel(title, curves, 10, n * (HEIGHT + GAP)) for n, (title, curves) in enumerate(panels.items())]
    width, height = WIDTH + 20, len(panels) * (HEIGHT + GAP) + 10
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{1.6 * width:.0f}">'
        f'<style>{STYLE}</style><rect width="{width}" height="{height}"/>{"".join(parts)}</svg>\n'
    )


def mean_curve(curves: Sequence[Points]) -> Points:
    """The mean over seeds at each step that all have."""
    values = [dict(curve) for curve in curves]
    steps = set.intersection(*map(set, values)) if values else set()
    return [(step, statistics.fmean(each[step] for each in values)) for step in sorted(steps)]


def panel(title: str, curves: Mapping[str, Points], x: int, y: int) -> str:
    """One chart of the report with its title and names as text."""
    chart = str(line_chart(title, curves))
    svg = chart[chart.index("<svg") : chart.index("</figure>")]
    names = "".join(
        f'<tspan dx="8" style="fill:var(--line-{number % NUM_COLOURS})">{name}</tspan>'
        for number, name in enumerate(curves)
    )
    return (
        f'<text x="{x}" y="{y + GAP - 14}"><tspan class="title">{title}</tspan>{names}</text>'
        + svg.replace("<svg", f'<svg x="{x}" y="{y + GAP - 8}" width="{WIDTH}" height="{HEIGHT}"', 1)
    )  # fmt: skip


def main() -> None:
    """Run what is missing, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=METHODS, default=METHODS, help="some methods")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, help="write alignment.jsonl and alignment.svg into this folder")
    parser.add_argument("--shared", action="store_true", help="leave the times out: others computed meanwhile")
    parser.add_argument("keys", nargs="*", help="keys for every run, such as engine.threads=1")
    arguments = parser.parse_intermixed_args()
    rows = [measured(name, seed, arguments.keys) for seed in arguments.seeds for name in arguments.only]
    rows = [row | ({"seconds": None} if arguments.shared else {}) for row in rows]
    print(table(rows), *(told(row) for row in rows if row["method"] == "overoptimised"), sep="\n")
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (arguments.output / "alignment.jsonl").write_text("".join(lines))
        (arguments.output / "alignment.svg").write_text(drawing(rows))


if __name__ == "__main__":
    main()
