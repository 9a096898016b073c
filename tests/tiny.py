"""Runs so small that a test can afford several: overrides for each stage, and finished runs to start from."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from llmtrain.config.compose import load_config
from llmtrain.config.folders import packaged_configs
from llmtrain.config.schema import ModelConfig

# The shipped architectures of a size to train on a laptop, one of each family: decoders, and those with an encoder.
TINY_MODELS = {file.stem: file.read_text() for file in sorted((packaged_configs() / "model").glob("*_tiny.yaml"))}
MODELS = [name for name, text in TINY_MODELS.items() if "architecture: encoder" not in text]
ENCODERS = [name for name in TINY_MODELS if name not in MODELS]
MODEL = ["model.num_layers=2", "model.hidden_size=32", "model.num_heads=2", "model.max_sequence_length=128"]
ROWS = [
    "data.sources.arithmetic.max_rows=64", "data.validation_every=8", "train.batch_rows=8", "train.sequence_length=128",
    "eval.max_rows=4",
]  # fmt: skip
PROBLEMS = ["eval.max_problems=2", "eval.max_new_tokens=4"]
TINY = {
    "pretrain": [
        *MODEL, "tokenizer.vocab_size=300", "tokenizer.train_bytes=20000", "train.sequence_length=32",
        "train.batch_tokens=256", "eval.max_rows=4", "data.validation_every=2",
        *(f"data.sources.{name}.max_documents=4" for name in ("prose", "code", "arithmetic")),
    ],
    "sft": [*ROWS, *PROBLEMS],
    "reward": ROWS,
    "dpo": [*ROWS, *PROBLEMS],
    "ppo": [
        *ROWS, *PROBLEMS, "method.max_new_tokens=8", "method.kl_target=1.0", "method.kl_horizon=100",
        "eval.max_prompts=3",
    ],
}  # fmt: skip
# A reward that tells short answers from long ones, so that a model which knows nothing gets different ones.
LENGTH = ["rewards=length", "rewards.length.options.maximum=8", "rewards.length.options.buffer=8"]
GROUPS = [*ROWS, *PROBLEMS, *LENGTH, "method.max_new_tokens=8", "method.samples_per_prompt=2"]
TINY |= {
    "shared-ppo": [
        *ROWS, *PROBLEMS, *LENGTH, "method.max_new_tokens=8", "method.value_model=shared", "method.kl_limit=1e-5",
    ],
    "grpo": [*GROUPS, "method.epochs=2", "method.minibatches=2", "method.dynamic_sampling=2", "eval.best_of=2"],
    "rloo": [*GROUPS, "method.minibatches=2", "method.kl_limit=1e-5"],
    "reinforce": [*ROWS, *PROBLEMS, *LENGTH, "method.max_new_tokens=8"],
    "online_dpo": GROUPS,
    "rejection_sampling": [*GROUPS, "method.minimum_reward=-1.2"],
}  # fmt: skip
COMMANDS = {
    "pretrain": ["pretrain", *TINY["pretrain"]],
    "sft": ["sft", *TINY["sft"]],
    "reward": ["reward", *TINY["reward"]],
    "dpo": ["align", "method=dpo", *TINY["dpo"]],
    "ppo": ["align", "method=ppo", *TINY["ppo"]],
    "shared-ppo": ["align", "method=ppo", *TINY["shared-ppo"]],
    **{
        name: ["align", f"method={name}", *TINY[name]]
        for name in ("grpo", "rloo", "reinforce", "online_dpo", "rejection_sampling")
    },
}
COMMANDS |= {
    method: ["align", f"method={method}", *TINY["dpo"]]
    for method in ("ipo", "hinge", "robust", "orpo", "simpo", "cpo", "kto")
}
SENTINELS = "tokenizer.vocab_size=420"  # of which a hundred are sentinels
OBJECTIVES = {
    "masked": ["objective=masked", "model.architecture=encoder"],
    "two-segments": [
        "objective=masked", "objective.next_sentence=true", "objective.whole_words=true", "model.architecture=encoder",
        "model.pooler=true", "model.num_segments=2",
    ],
    "span-corruption": ["objective=span_corruption", "model.architecture=encoder_decoder", SENTINELS],
    "prefix": ["objective=prefix", "objective.z_loss=1e-4"],
    "infilling": ["objective=fill_in_the_middle", "objective.label_smoothing=0.1"],
}  # fmt: skip
COMMANDS |= {name: [*COMMANDS["pretrain"], *overrides] for name, overrides in OBJECTIVES.items()}
COMMANDS["sequence-to-sequence"] = [*COMMANDS["sft"], "objective.label_smoothing=0.1"]
COMMANDS["precomputed"] = [*COMMANDS["dpo"], "method.reference=precomputed"]
COMMANDS["kto-precomputed"] = [*COMMANDS["kto"], "method.reference=precomputed"]
LORA = ["adapter=lora", "adapter.rank=4", "optimizer.lr=1e-2"]
COMMANDS |= {f"lora-{name}": [*COMMANDS[name], *LORA] for name in ("sft", "reward", "dpo", "ppo")}
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def tiny_model(name: str) -> ModelConfig:
    """One of `TINY_MODELS`, with a window, where it has one, that rows of some ten tokens are longer than."""
    config: ModelConfig = load_config("pretrain", [f"model={name}"]).model
    return config if config.sliding_window is None else dataclasses.replace(config, sliding_window=7)


def start(arguments: Sequence[str], launcher: Sequence[str] = (), **options: object) -> subprocess.Popen[str]:
    """`llmtrain ...` in a process of its own; `launcher` is what stands before `-m llmtrain`, such as torchrun."""
    before = launcher or [sys.executable]
    return subprocess.Popen(
        [*before, "-m", "llmtrain", *arguments], env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def finish(arguments: Sequence[str], launcher: Sequence[str] = (), expect: int = 0) -> str:
    """Run `llmtrain ...` to its end, which must be with exit code `expect`; what it wrote on standard error."""
    process = start(arguments, launcher)
    output, errors = process.communicate(timeout=280)
    assert process.returncode == expect, f"exit code {process.returncode}\n{output}\n{errors}"
    return errors


def starting_from(folder: Path, stage: str) -> list[str]:
    """Overrides by which a stage starts from the runs of `make_parents`, whatever else has finished there."""
    if stage in ("pretrain", *OBJECTIVES):
        return []
    start = {"sft": "pretrain", "sequence-to-sequence": "span-corruption"}.get(stage, "sft")
    before = [f"model.init_from={folder / start}"]
    return [*before, f"reward_model={folder / 'reward'}"] if stage in ("ppo", "lora-ppo") else before


def make_parents(folder: Path) -> Path:
    """A folder with tiny finished runs `pretrain`, `sft` and `reward`, each started from the one before, and one of an
    encoder-decoder."""
    for name in ("pretrain", "sft", "reward", "span-corruption"):
        where = [*starting_from(folder, name), f"runs_dir={folder}", f"run={name}"]
        finish([*COMMANDS[name], "train.steps=3", "schedule.warmup_steps=0", *where])
    return folder
