"""Answers per second of whole GRPO steps against trl's GRPOTrainer, and of PPO steps, which trl no longer has.

A step is sampling, rewards, the reference's log-probabilities, one pass forward and backward over all answers, and the
optimizer. All contenders start from the same random weights with prompts of as many tokens, a reward that counts even
tokens, 32 answers to 4 prompts (PPO: to 32), the same learning rate and KL coefficient, each in a process of its own,
and take turns (`contenders.py`). Reported are the median step of each, and the median over rounds of the ratios.

    python benchmarks/rollout_step.py                                       # trl as it comes
    python benchmarks/rollout_step.py --stops 128 --trl-keeps-activations   # mixed lengths, trl made faster

What nothing is said about is as trl has it unasked: no KL and so no reference, fused AdamW, 8 rows at a time (ours:
all, `--micro-batch-rows` for both), and activations computed again in the backward pass, which costs time and saves
memory; with `--trl-keeps-activations` they are not. `--stops N`: N of the 8192 tokens end an answer; with 0 all answers
have 64 tokens, the most.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from contenders import Contender, ratios, report, turns

VOCAB_SIZE = 8192
PROMPTS, GROUP_ROWS, PROMPT_TOKENS, NEW_TOKENS = 4, 8, 64, 64
ANSWERS = PROMPTS * GROUP_ROWS
TRL_MICRO_BATCH_ROWS = 8  # what GRPOConfig has unless told otherwise
LEARNING_RATE, INIT_STD = 1e-6, 0.02
CONTENDERS = ("grpo", "trl", "ppo")


def make_model(folder: Path, stops: int) -> None:
    """The model that all start from."""
    import dataclasses

    import torch

    from llmtrain.config.compose import load_config
    from llmtrain.models.formats import save_model
    from llmtrain.models.heads import LanguageModel

    config = dataclasses.replace(load_config("pretrain", ["model=bench_b"]).model, init_std=INIT_STD)
    model = LanguageModel(config, VOCAB_SIZE).initialise(torch.Generator().manual_seed(0))
    # The last of the ids end an answer; trl insists on one.
    ends = list(range(VOCAB_SIZE - max(stops, 1), VOCAB_SIZE))
    save_model(folder, model, extra_config={"bos_token_id": 0, "eos_token_id": ends, "pad_token_id": 0})


def make_prompts(step: int, count: int) -> list[list[int]]:
    """Random tokens."""
    import torch

    generator = torch.Generator().manual_seed(step)
    return torch.randint(1, VOCAB_SIZE - 1000, (count, PROMPT_TOKENS), generator=generator).tolist()


def ours(method: str, folder: Path, arguments: argparse.Namespace) -> None:
    """The loop of the align stage."""
    from llmtrain.config.compose import load_config
    from llmtrain.data.encoding import PromptRow
    from llmtrain.data.mixture import Phase, PhasedMixture
    from llmtrain.engine.distributed import join
    from llmtrain.generation.engines import OwnEngine
    from llmtrain.generation.rollouts import Rollouts
    from llmtrain.rewards.sums import WeightedSum
    from llmtrain.stages.assembly import Plan, Run
    from llmtrain.stages.reinforcement import LEARNERS
    from llmtrain.stages.starts import load_policy

    options = [f"method.samples_per_prompt={GROUP_ROWS}"] if method == "grpo" else ["method.value_model=policy"]
    config = load_config("align", [
        f"method={method}", "rewards=length", f"model.init_from={folder}", f"train.batch_rows={ANSWERS}",
        "train.steps=100000", f"train.micro_batch_rows={arguments.micro_batch_rows or 'null'}", "schedule=constant",
        f"optimizer.lr={LEARNING_RATE}", f"engine.precision={arguments.dtype}", f"method.max_new_tokens={NEW_TOKENS}",
        f"method.kl_coefficient={arguments.kl}", *options,
    ])  # fmt: skip
    clock = turns()

    class Prompts:
        def __call__(self, step: int, replacement: int = 0) -> list[PromptRow]:
            if next(clock, "end") == "end":
                sys.exit(0)
            count = PROMPTS if method == "grpo" else ANSWERS
            return [PromptRow(tokens, "", None) for tokens in make_prompts(step, count)]

        def counts(self, step: int) -> dict[str, float]:
            return {}

    def even(answers: Any) -> list[float]:
        return [sum(token % 2 == 0 for token in answer.tokens) / len(answer.tokens) for answer in answers]

    run = Run(config, Path(tempfile.mkdtemp()), join("cpu"), time.monotonic())  # before the first tensor, as in a run
    policy = load_policy(str(folder), dropout=0.0)
    learner = LEARNERS[type(config.method)](run, config.method, policy)
    rollouts = Rollouts(
        engine=OwnEngine(policy), prompts=Prompts(), reward=WeightedSum({"even": even}, {"even": 1.0}),
        learn_from=learner.learn_from, decode=lambda tokens: "",
        stop_tokens=frozenset(range(VOCAB_SIZE - max(arguments.stops, 1), VOCAB_SIZE)), pad_id=0,
        settings=config.method, batch_rows=ANSWERS, group_rows=learner.group_rows, minibatches=learner.minibatches,
        seed=0, layout=run.layout, autocast=run.autocast,
    )  # fmt: skip
    plan = Plan(PhasedMixture([Phase(0, {"random": 1.0})]), 100_000, ANSWERS, {"random": 1}, {"random": ""})
    run.fit(
        model=learner.model, trained=learner.trained, batches=rollouts, objective=learner.objective, tokenizer=None,
        plan=plan, parts=learner.parts,
    )  # fmt: skip


def trl(folder: Path, arguments: argparse.Namespace) -> None:
    """trl.GRPOTrainer."""
    import datasets
    import tokenizers
    import torch
    import transformers
    from trl import GRPOConfig, GRPOTrainer

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"t{i}": i for i in range(VOCAB_SIZE)}, unk_token="t0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="t0", pad_token="t0", eos_token=f"t{VOCAB_SIZE - 1}"
    )
    prompts = [" ".join(f"t{token}" for token in row) for step in range(64) for row in make_prompts(step, PROMPTS)]
    clock = turns()

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if next(clock, "end") == "end":
                sys.exit(0)

    def even(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(token % 2 == 0 for token in tokens) / len(tokens) for tokens in completion_ids]

    rows = arguments.micro_batch_rows or TRL_MICRO_BATCH_ROWS
    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=rows,
        gradient_accumulation_steps=ANSWERS // rows, num_generations=GROUP_ROWS,
        max_completion_length=NEW_TOKENS, max_steps=100_000, learning_rate=LEARNING_RATE, beta=arguments.kl,
        bf16=arguments.dtype == "bfloat16", use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        lr_scheduler_type="constant", gradient_checkpointing=not arguments.trl_keeps_activations,
    )  # fmt: skip
    transformers.utils.logging.set_verbosity_error()
    # A folder by name: the reference is loaded from it anew.
    trainer = GRPOTrainer(
        model=str(folder), reward_funcs=even, args=config, processing_class=tokenizer, callbacks=[Turns()],
        train_dataset=datasets.Dataset.from_dict({"prompt": prompts}),
    )  # fmt: skip
    trainer.log = lambda *_, **__: None  # it would print into our channel
    assert trainer.model.dtype == torch.float32
    trainer.train()


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Let them take turns; the first turn of each is not counted."""
    settings = {name: getattr(arguments, name) for name in ("dtype", "stops", "kl", "micro_batch_rows")}
    keys = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if value is not None]
    keys += ["--trl-keeps-activations"] if arguments.trl_keeps_activations else []
    settings["trl_recomputes"] = not arguments.trl_keeps_activations
    rounds, steps = arguments.rounds, arguments.steps
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder), arguments.stops)
        contenders = {
            name: Contender([__file__, *keys, "--contender", name, "--folder", folder]) for name in CONTENDERS
        }
        for contender in contenders.values():
            contender.turn(1)
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for number in range(rounds):
            for name in CONTENDERS if number % 2 == 0 else CONTENDERS[::-1]:
                seconds[name].append(statistics.median(contenders[name].turn(steps)))
        for contender in contenders.values():
            contender.end()
    result: dict[str, Any] = {"model": "bench_b"} | settings | {"rounds": rounds, "steps": steps}
    for name, values in seconds.items():
        result[f"{name}_answers_per_second"] = round(ANSWERS / statistics.median(values), 2)
    result["grpo_over_trl"] = ratios(seconds["trl"], seconds["grpo"], 2)
    return result


def main() -> None:
    """Parse the arguments; run one contender, or compare all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--stops", type=int, default=0, help="how many tokens end an answer")
    parser.add_argument("--kl", type=float, default=0.0, help="coefficient of the KL to the reference")
    parser.add_argument("--micro-batch-rows", type=int, help="answers computed at a time by all, PPO's too")
    parser.add_argument("--trl-keeps-activations", action="store_true", help="no gradient_checkpointing, trl's default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="append the result to this JSON-lines file")
    arguments = parser.parse_args()
    if arguments.contender == "trl":
        trl(arguments.folder, arguments)
    elif arguments.contender:
        ours(arguments.contender, arguments.folder, arguments)
    if arguments.contender:
        return
    result = compare(arguments)
    report(result, arguments.output, "transformers", "trl")


if __name__ == "__main__":
    main()
