"""Does PPO change the style of a small model of real dialogues, for a reward that it has learned from pairs?

    LLMTRAIN_DATA=FOLDER python benchmarks/style.py --output benchmarks/results      # three seeds, then the table
    LLMTRAIN_DATA=FOLDER python benchmarks/style.py --seeds 0 engine.threads=1       # one seed, keys for every run

FOLDER holds sft/sgd_multiturn: 3,300 dialogues in which an assistant books and finds (Rastogi et al. 2020, arXiv
1909.05855). A model learns to speak from them alone: pretraining on their text, then fine-tuning on the assistant's
turns. The style: an answer first says something, then asks what comes next, as one turn in fourteen does. It is told
apart by a rule, `STYLE`, but neither the policy nor the reward model ever sees the rule: the reward model learns from
pairs of turns that were really said, and PPO from the reward model. The rule is only measured (a reward of weight 0).

reward: the learned reward of one answer to each held-out prompt, sampled at temperature 1, before and after PPO; 0 and
1 are mean and standard deviation over the answers of the pairs. style: the share of these answers that have the style.
KL: to the fine-tuned model in nats per answer, exact at every position of the sampled answers. distinct: different
texts among them. Samples stand in runs/style/seedN/ppo/report.html. What has finished is not done again.
"""

import argparse
import json
import os
import platform
import random
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from alignment import exact_kl, llmtrain, spread

from llmtrain.config.schema import RowsConfig, RowSourceConfig
from llmtrain.config.seeds import derive_seed
from llmtrain.data.encoding import load_prompts
from llmtrain.data.files import open_bytes
from llmtrain.data.tokenizers import load_tokenizer
from llmtrain.engine.health import read_warnings
from llmtrain.engine.tracking import read_metrics
from llmtrain.generation.sampler import generate
from llmtrain.stages import handover, starts

RUNS_DIR = Path("runs/style")
DATA = RUNS_DIR / "data"
STYLE = r"(?s)\w\w[.!] .*\?\s*$"
CONTEXT = 3  # messages before an answer: longer ones cost time and tell a small model little
LENGTH, NEW_TOKENS = 160, 48
HELD_OUT = 256  # prompts


def files(name: str) -> list[str]:
    """Keys for the training and held-out rows that `write_data` has written."""
    source = "data.sources.files"
    return ["data=files", f"{source}.path={DATA}/{name}.train.jsonl",
            f"{source}.validation_path={DATA}/{name}.validation.jsonl"]  # fmt: skip


STAGES: dict[str, tuple[str, Sequence[str]]] = {
    "pretrain": ("pretrain", [
        *files("text"), "model=llama_tiny", "model.hidden_size=192", "model.num_heads=6", "tokenizer.vocab_size=2048",
        "train.batch_tokens=4096", "train.sequence_length=128", "train.steps=1000", "optimizer.lr=3e-3",
        "eval.every_steps=500", "eval.max_rows=64",
    ]),
    "sft": ("sft", [
        *files("dialogues"), "model.init_from={seed}/pretrain", "data.too_long=split", "train.batch_rows=16",
        "train.sequence_length=256", "train.steps=300", "optimizer.lr=1e-3", "eval.problems=null",
        "eval.every_steps=100", "eval.max_rows=64",
    ]),
    "reward": ("reward", [
        *files("pairs"), "model.init_from={seed}/sft", "data.too_long=cut", "train.batch_rows=32",
        f"train.sequence_length={LENGTH}", "train.steps=200", "schedule=linear", "optimizer.lr=5e-4",
        "eval.max_rows=500",
    ]),
    # Scores have standard deviation 1, and two answers of which one has the style are about 2 apart. At 0.2 a nat the
    # best policy gives the style 2 / 0.2 = 10 nats more log-odds, enough by far, and hardly prefers one such answer to
    # another: at 0.05 the one sentence that the reward model likes best would pay for any context.
    "ppo": ("align", [
        *files("prompts"), "method=ppo", "model.init_from={seed}/sft", "reward_model={seed}/reward",
        "data.too_long=cut", "rewards=regex", f"rewards.regex.options.pattern='{STYLE}'", "rewards.regex.weight=0",
        f"method.max_new_tokens={NEW_TOKENS}", "method.kl_coefficient=0.2",
        "method.value_clip_range=0.5", "method.value_weight=0.5", "method.whiten_rewards=false",
        "method.minibatches=4", "train.batch_rows=128", f"train.sequence_length={LENGTH}", "train.steps=60",
        "schedule=linear", "schedule.warmup_steps=0", "optimizer.lr=1e-4", "optimizer.weight_decay=0",
        "eval.problems=null", f"eval.max_prompts={HELD_OUT}", "eval.every_steps=10",
        "checkpoint.final=last", "health.held_out_metric=eval/regex/reward",
    ]),
}  # fmt: skip


# The data ----------------------------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """What the assistant said, after what, and in a dialogue about which service."""

    context: list[dict[str, str]]
    text: str
    service: str

    @property
    def has_style(self) -> bool:
        """Whether it says something and then asks."""
        return re.search(STYLE, self.text) is not None


def write_data(source: Path) -> None:
    """The dialogues as text, as they are, as pairs and as prompts; a split each, the same at every call."""
    DATA.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        with open_bytes(str(source / f"{split}.jsonl.gz")) as lines:
            dialogues = [json.loads(line) for line in lines]
        turns = [turn for dialogue in dialogues for turn in turns_of(dialogue)]
        draw = random.Random(0)
        draw.shuffle(turns)
        made: dict[str, Iterable[Mapping[str, Any]]] = {
            "text": ({"text": as_text(dialogue["messages"])} for dialogue in dialogues),
            "dialogues": ({"messages": dialogue["messages"]} for dialogue in dialogues),
            "pairs": pairs(turns, draw),
            "prompts": ({"prompt": turn.context} for turn in turns),
        }
        for name, rows in made.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (DATA / f"{name}.{split}.jsonl").write_text(text, encoding="utf-8")


def turns_of(dialogue: Mapping[str, Any]) -> Iterator[Turn]:
    """The assistant's turns."""
    messages, service = dialogue["messages"], dialogue["meta"]["services"][0]
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            yield Turn(messages[max(0, place - CONTEXT) : place], message["content"], service)


def as_text(messages: Sequence[Mapping[str, str]]) -> str:
    """A dialogue as plain text."""
    return "\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)


def pairs(turns: Sequence[Turn], draw: random.Random) -> Iterator[dict[str, Any]]:
    """Each turn with the style against one without, of another dialogue about the same service and about as long.

    They are answers in the place of the one and in the place of the other, so that neither fitting in nor length tells
    which is better.
    """
    plain = defaultdict(list)
    for turn in turns:
        if not turn.has_style:
            plain[turn.service].append(turn)
    for turn in filter(lambda each: each.has_style and plain[each.service], turns):
        found = draw.choices(plain[turn.service], k=16)
        other = min(found, key=lambda each: abs(len(each.text) - len(turn.text)))
        for place in (turn, other):
            yield {"prompt": place.context, "chosen": turn.text, "rejected": other.text}


# The runs ----------------------------------------------------------------------------------------------------------


def measured(seed: int, keys: Sequence[str]) -> dict[str, Any]:
    """What the runs of a seed have come to, kept beside them; what is not there is run now."""
    root = RUNS_DIR / f"seed{seed}"
    for name, (stage, overrides) in STAGES.items():
        if not handover.read_lineage(root / name).get("finished"):
            fixed = [f"run=seed{seed}/{name}", f"runs_dir={RUNS_DIR}", f"seed={seed}"]
            llmtrain(stage, [*fixed, *(each.format(seed=root) for each in overrides), *keys])
    kept = root / "style.json"
    if not kept.is_file():
        kept.write_text(json.dumps(measure(root), ensure_ascii=False))
    found: dict[str, Any] = json.loads(kept.read_text())
    return {"seed": seed} | found


def measure(root: Path) -> dict[str, Any]:
    """Held-out reward and style before and after, KL, time, samples; how well the reward model tells held-out pairs."""
    rows = [row for row in read_metrics(root / "ppo") if "eval/reward" in row]
    curves = {
        name: [(row["step"], row[f"eval/{key}"]) for row in rows]
        for name, key in (("reward", "reward_model/reward"), ("style", "regex/reward"), ("tokens", "answer_tokens"))
    }
    judge = [row for row in read_metrics(root / "reward") if "eval/pair_accuracy" in row][-1]
    lineages = {name: handover.read_lineage(root / name) for name in STAGES}
    return {
        **{name: {"before": curve[0][1], "after": curve[-1][1], "curve": curve} for name, curve in curves.items()},
        **sampled(root), "pair_accuracy": judge["eval/pair_accuracy"],
        "seconds": {name: lineage["seconds"] for name, lineage in lineages.items()},
        "samples": json.loads((root / "ppo" / "samples.json").read_text()),
        "warnings": [warning._asdict() for warning in read_warnings(root / "ppo")],
        "torch": torch.__version__, "machine": platform.processor() or platform.machine(),
        "commit": lineages["ppo"]["code"].get("commit"),
    }  # fmt: skip


@torch.no_grad()
def sampled(root: Path) -> dict[str, Any]:
    """KL per answer, and how many different answers there are before and after."""
    policy, reference = (starts.load_policy(str(root / name)).eval() for name in ("ppo", "sft"))
    tokenizer = load_tokenizer(handover.model_folder(root / "ppo"))
    path = str(DATA / "prompts.validation.jsonl")
    data = RowsConfig(sources={"files": RowSourceConfig(path=path, validation_path=path)}, too_long="cut")
    rows = load_prompts(
        data, tokenizer, split="validation", max_length=LENGTH - NEW_TOKENS, cache_dir=RUNS_DIR / "cache",
        limit=HELD_OUT,
    )  # fmt: skip
    prompts = [row.tokens for row in rows["files"]]
    seeds = [derive_seed(0, "style", number) for number in range(len(prompts))]
    after, before = (
        generate(model, prompts, max_new_tokens=NEW_TOKENS, stop_tokens=set(tokenizer.stop_ids), seeds=seeds)
        for model in (policy, reference)
    )
    kl = [exact_kl(policy, reference, prompt, answer) for prompt, answer in zip(prompts, after, strict=True)]
    distinct = {"before": len(set(map(tuple, before))), "after": len(set(map(tuple, after)))}
    return {"kl": sum(kl) / len(kl), "answers": len(prompts), "distinct": distinct}


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Medians over seeds with the lowest and the highest, in Markdown."""
    lines = ["| | before PPO | after PPO |", "|---|---|---|"]
    for title, key, factor, unit in (
        ("held-out reward", "reward", 1, ""), ("style", "style", 100, " %"), ("tokens an answer", "tokens", 1, ""),
        (f"distinct of {rows[0]['answers']} answers", "distinct", 1, ""),
    ):  # fmt: skip
        cells = [spread([row[key][when] for row in rows], factor, unit) for when in ("before", "after")]
        lines.append(f"| {title} | {cells[0]} | {cells[1]} |")
    judge = spread([row["pair_accuracy"] for row in rows], 100, " %")
    lines.append(f"| KL to the fine-tuned model, nats an answer | 0 | {spread([row['kl'] for row in rows])} |")
    lines.append(f"| the reward model's accuracy on held-out pairs | {judge} | |")
    lines.append(f"| minutes: all, PPO | | {minutes(rows)} |")
    return "\n".join(lines)


def minutes(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of all stages, and of PPO; nothing where others computed meanwhile."""
    timed = [row["seconds"] for row in rows if row["seconds"]]
    every = spread([sum(each.values()) for each in timed], 1 / 60)
    return f"{every}, {spread([each['ppo'] for each in timed], 1 / 60)}" if timed else ""


def examples(row: Mapping[str, Any]) -> str:
    """The samples of a run's report, in Markdown."""
    lines = ["| after this was said | before PPO | after PPO |", "|---|---|---|"]
    for before, after in zip(row["samples"]["before"], row["samples"]["after"], strict=True):
        cells = (before["prompt"], before["answer"], after["answer"])
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", "<br>") for cell in cells) + " |")
    return "\n".join(lines)


def answers(row: Mapping[str, Any]) -> dict[str, list[str]]:
    """Those of the samples, before and after."""
    return {moment: [each["answer"] for each in samples] for moment, samples in row["samples"].items()}


def main() -> None:
    """Write the data, run what is missing, print the tables, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path, help="write style.jsonl into this folder")
    parser.add_argument("--shared", action="store_true", help="leave the times out: others computed meanwhile")
    parser.add_argument("keys", nargs="*", help="keys for every run, such as engine.threads=1")
    arguments = parser.parse_intermixed_args()
    if "LLMTRAIN_DATA" not in os.environ:
        sys.exit("set LLMTRAIN_DATA to the folder that holds sft/sgd_multiturn")
    write_data(Path(os.environ["LLMTRAIN_DATA"]) / "sft" / "sgd_multiturn")
    rows = [measured(seed, arguments.keys) for seed in arguments.seeds]
    rows = [row | ({"seconds": None} if arguments.shared else {}) for row in rows]
    print(table(rows), examples(rows[0]), sep="\n\n")
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        # of the samples the answers alone: the prompts are the data's
        kept = [row | {"samples": answers(row)} for row in rows]
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in kept]
        (arguments.output / "style.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
