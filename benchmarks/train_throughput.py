"""Tokens per second of `pretrain`'s own loop against transformers.Trainer and a bare compiled PyTorch loop.

The three train the same architecture on the same random tokens in the same dtype, each in a process of its own, and
take turns: a few steps each, round after round, so that a machine whose speed drifts treats them alike. Reported are
the median step of each, and the median over rounds of the ratios.

    python benchmarks/train_throughput.py --model bench_b --dtype bfloat16

bare: the model of this project written as its user would without a framework: forward, `F.cross_entropy` on the
logits, backward, clipping, fused AdamW, with forward and loss under `torch.compile`.
hf: `transformers.Trainer` on GPT2LMHeadModel or LlamaForCausalLM of the same shape with its defaults (fused AdamW).
ours: `Trainer.fit` as the pretrain stage builds it, metrics written at every step, compile=true.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from contenders import Contender, ratios, report, turns

ROWS = {"bench_a": 16, "bench_b": 8}
VOCAB_SIZE = 8192
LEARNING_RATE = 3e-4


def build_config(model: str, dtype: str) -> Any:
    """The config of `llmtrain pretrain` for this comparison."""
    from llmtrain.config.compose import load_config

    length = {"bench_a": 256, "bench_b": 512}[model]
    return load_config(
        "pretrain",
        [
            f"model={model}", f"train.sequence_length={length}", "train.batch_tokens=4096", "train.steps=100000",
            f"optimizer.lr={LEARNING_RATE}", f"engine.precision={dtype}", "engine.compile=true",
        ],
    )  # fmt: skip


def make_tokens(config: Any, rows: int, step: int) -> Any:
    """The same random rows for everyone."""
    import torch

    generator = torch.Generator().manual_seed(step)
    return torch.randint(VOCAB_SIZE, (rows, config.train.sequence_length + 1), generator=generator)


def bare(config: Any, rows: int, dtype: str) -> None:
    """The bare compiled loop."""
    import torch
    import torch.nn.functional as F

    from llmtrain.models.heads import LanguageModel

    model = LanguageModel(config.model, VOCAB_SIZE).initialise(torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    @torch.compile
    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    for step, _ in enumerate(turns()):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = loss_of(make_tokens(config, rows, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def hf(config: Any, rows: int, dtype: str) -> None:
    """transformers.Trainer."""
    import tempfile

    import torch
    import transformers

    model = config.model
    shape = {"vocab_size": VOCAB_SIZE, "tie_word_embeddings": model.tied_embeddings}
    if model.positions == "learned":
        net = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            n_layer=model.num_layers, n_embd=model.hidden_size, n_head=model.num_heads,
            n_positions=model.max_sequence_length, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **shape))  # fmt: skip
    else:
        net = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            num_hidden_layers=model.num_layers, hidden_size=model.hidden_size, num_attention_heads=model.num_heads,
            num_key_value_heads=model.num_kv_heads, intermediate_size=model.ffn_hidden_size,
            max_position_embeddings=model.max_sequence_length, **shape))  # fmt: skip

    clock = turns()

    class Rows(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[dict[str, Any]]:
            step = 0
            while True:
                for row in make_tokens(config, rows, step)[:, 1:]:
                    yield {"input_ids": row, "labels": row}
                step += 1

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if next(clock, "end") == "end":
                sys.exit(0)

    arguments = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=rows, max_steps=100_000, learning_rate=LEARNING_RATE,
        adam_beta2=0.95, weight_decay=0.1, max_grad_norm=1.0, bf16=dtype == "bfloat16", use_cpu=True, report_to=[],
        logging_steps=1, save_strategy="no", disable_tqdm=True, optim="adamw_torch_fused",
    )  # fmt: skip
    transformers.utils.logging.set_verbosity_error()
    trainer = transformers.Trainer(model=net, args=arguments, train_dataset=Rows(), callbacks=[Turns()])
    trainer.log = lambda *_, **__: None  # it would print into our channel  # type: ignore[method-assign]
    trainer.train()


def ours(config: Any, rows: int, dtype: str) -> None:
    """The loop of the pretrain stage."""
    import tempfile

    import torch

    from llmtrain.data.mixture import Phase, PhasedMixture
    from llmtrain.engine.distributed import join
    from llmtrain.models.heads import LanguageModel
    from llmtrain.objectives.next_token import NextToken, TokenBatch
    from llmtrain.stages.assembly import Plan, Run

    clock = turns()

    class Batches:
        def __call__(self, step: int) -> TokenBatch:
            if next(clock, "end") == "end":
                sys.exit(0)
            tokens = make_tokens(config, rows, step)[:, 1:]
            mask = torch.ones_like(tokens, dtype=torch.bool)
            mask[:, 0] = False
            return TokenBatch(tokens=tokens, loss_mask=mask, source=torch.zeros(rows, dtype=torch.int64))

        def counts(self, step: int) -> dict[str, float]:
            return {}

    model = LanguageModel(config.model, VOCAB_SIZE).initialise(torch.Generator().manual_seed(0))
    run = Run(config, Path(tempfile.mkdtemp()), join("cpu"), time.monotonic())
    plan = Plan(PhasedMixture([Phase(0, {"random": 1.0})]), 100_000, rows, {}, {})
    run.fit(
        model=model, trained=model, batches=Batches(), objective=NextToken(), tokenizer=None, plan=plan,
        fixed_shapes=True,
    )  # fmt: skip


def compare(model: str, dtype: str, rounds: int, steps: int) -> dict[str, Any]:
    """Let the three take turns; the first turn (compilation, first touches) is not counted."""
    contenders = {}
    for name in ("ours", "bare", "hf"):
        contenders[name] = Contender([__file__, "--model", model, "--dtype", dtype, "--contender", name])
        contenders[name].turn(3)
    medians: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        order = list(contenders)
        for name in order if number % 2 == 0 else order[::-1]:
            medians[name].append(statistics.median(contenders[name].turn(steps)))
    for contender in contenders.values():
        contender.end()
    result: dict[str, Any] = {"model": model, "dtype": dtype, "rounds": rounds, "steps": steps}
    for name, values in medians.items():
        result[f"{name}_tokens_per_second"] = round(4096 / statistics.median(values))
    for name in ("hf", "bare"):
        result[f"ours_over_{name}"] = ratios(medians[name], medians["ours"], 3)
    return result


def main() -> None:
    """Parse the arguments; run one contender, or compare all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=ROWS, default="bench_b")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--contender", choices=("ours", "bare", "hf"), help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="append the result to this JSON-lines file")
    arguments = parser.parse_args()
    if arguments.contender:
        contender = {"ours": ours, "bare": bare, "hf": hf}[arguments.contender]
        contender(build_config(arguments.model, arguments.dtype), ROWS[arguments.model], arguments.dtype)
        return
    result = compare(arguments.model, arguments.dtype, arguments.rounds, arguments.steps)
    report(result, arguments.output, "transformers")


if __name__ == "__main__":
    main()
