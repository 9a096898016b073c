"""Tokens per second of `pretrain`'s own loop against transformers.Trainer and a bare compiled PyTorch loop.

The three train the same architecture on the same random tokens in the same dtype, each in a process of its own, and
take turns: a few steps each, round after round, so that a machine whose speed drifts treats them alike. Reported are
the median step of each, and the median over rounds of the ratios.

    python benchmarks/train_throughput.py --model bench_b --dtype bfloat16
    python benchmarks/train_throughput.py --model llama_1b --device cuda --micro-batch-rows 4 --output FILE

bare: the model of this project written as its user would without a framework: forward, `F.cross_entropy` on the
logits, backward, clipping, fused AdamW, with forward and loss under `torch.compile`.
hf: `transformers.Trainer` on GPT2LMHeadModel or LlamaForCausalLM of the same shape with its defaults (fused AdamW);
on a GPU with torch_compile, as it is fastest there.
ours: `Trainer.fit` as the pretrain stage builds it, metrics written at every step, compile=true.

On a GPU they come one after another, since one memory does not hold three of a large model. MFU: the floating-point
operations of forward and backward (6 for each weight in a product and token, and attention's) over what a large matrix
product reaches on the same device in the same dtype.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from contenders import Contender, ratios, report, turns

LEARNING_RATE = 3e-4
CONTENDERS = ("ours", "bare", "hf")


class Size(NamedTuple):
    """Of a step."""

    length: int
    rows: int
    vocab_size: int


SIZES = {
    "bench_a": Size(256, 16, 8192),
    "bench_b": Size(512, 8, 8192),
    # for GPUs
    "llama_100m": Size(2048, 64, 32768),
    "llama_1b": Size(4096, 16, 32768),
    "llama3_2_3b": Size(4096, 8, 32768),
}


def build_config(arguments: argparse.Namespace) -> Any:
    """The config of `llmtrain pretrain` for this comparison."""
    from llmtrain.config.compose import load_config

    size = SIZES[arguments.model]
    return load_config(
        "pretrain",
        [
            f"model={arguments.model}", f"train.sequence_length={size.length}", "train.steps=100000",
            f"train.batch_tokens={size.length * size.rows}", f"optimizer.lr={LEARNING_RATE}",
            f"train.micro_batch_rows={arguments.micro_batch_rows or 'null'}", f"engine.device={arguments.device}",
            f"engine.precision={arguments.dtype}", "engine.compile=true",
        ],
    )  # fmt: skip


def make_tokens(size: Size, step: int) -> Any:
    """The same random rows for everyone."""
    import torch

    generator = torch.Generator().manual_seed(step)
    return torch.randint(size.vocab_size, (size.rows, size.length + 1), generator=generator)


def bare(config: Any, size: Size) -> None:
    """The bare compiled loop."""
    import torch
    import torch.nn.functional as F

    from llmtrain.models.heads import LanguageModel

    device, micro = config.engine.device, config.train.micro_batch_rows or size.rows
    model = LanguageModel(config.model, size.vocab_size).initialise(torch.Generator().manual_seed(0)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    @torch.compile
    def loss_of(tokens: torch.Tensor) -> torch.Tensor:
        logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    for step, _ in enumerate(turns(_wait_for(device))):
        for tokens in make_tokens(size, step).to(device).split(micro):
            with torch.autocast(device, dtype=torch.bfloat16, enabled=config.engine.precision == "bfloat16"):
                loss = loss_of(tokens)
            (loss * (len(tokens) / size.rows)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _wait_for(device: str) -> Any:
    """What waits for the device's work; nothing on a processor."""
    import torch

    return torch.cuda.synchronize if device == "cuda" else int


def hf(config: Any, size: Size) -> None:
    """transformers.Trainer."""
    import tempfile

    import torch
    import transformers

    model, on_gpu, micro = config.model, config.engine.device == "cuda", config.train.micro_batch_rows or size.rows
    shape = {"vocab_size": size.vocab_size, "tie_word_embeddings": model.tied_embeddings}
    if model.positions == "learned":
        net = transformers.GPT2LMHeadModel(transformers.GPT2Config(
            n_layer=model.num_layers, n_embd=model.hidden_size, n_head=model.num_heads,
            n_positions=model.max_sequence_length, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **shape))  # fmt: skip
    else:
        net = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            num_hidden_layers=model.num_layers, hidden_size=model.hidden_size, num_attention_heads=model.num_heads,
            num_key_value_heads=model.num_kv_heads, intermediate_size=model.ffn_hidden_size,
            max_position_embeddings=model.max_sequence_length, **shape))  # fmt: skip

    clock = turns(_wait_for(config.engine.device))

    class Rows(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Iterator[dict[str, Any]]:
            step = 0
            while True:
                for row in make_tokens(size, step)[:, 1:]:
                    yield {"input_ids": row, "labels": row}
                step += 1

    class Turns(transformers.TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if next(clock, "end") == "end":
                sys.exit(0)

    arguments = transformers.TrainingArguments(
        output_dir=tempfile.mkdtemp(), max_steps=100_000,
        per_device_train_batch_size=micro, gradient_accumulation_steps=size.rows // micro,
        learning_rate=LEARNING_RATE, adam_beta2=0.95, weight_decay=0.1, max_grad_norm=1.0,
        bf16=config.engine.precision == "bfloat16", use_cpu=not on_gpu, torch_compile=on_gpu, report_to=[],
        logging_steps=1, save_strategy="no", disable_tqdm=True, optim="adamw_torch_fused",
    )  # fmt: skip
    transformers.utils.logging.set_verbosity_error()
    trainer = transformers.Trainer(model=net, args=arguments, train_dataset=Rows(), callbacks=[Turns()])
    trainer.log = lambda *_, **__: None  # it would print into our channel  # type: ignore[method-assign]
    trainer.train()


def ours(config: Any, size: Size) -> None:
    """The loop of the pretrain stage."""
    import tempfile

    import torch

    from llmtrain.data.mixture import Phase, PhasedMixture
    from llmtrain.engine.distributed import join
    from llmtrain.models.heads import LanguageModel
    from llmtrain.objectives.next_token import NextToken, TokenBatch
    from llmtrain.stages.assembly import Plan, Run

    clock = turns(_wait_for(config.engine.device))

    class Batches:
        def __call__(self, step: int) -> TokenBatch:
            if next(clock, "end") == "end":
                sys.exit(0)
            tokens = make_tokens(size, step)[:, 1:]
            mask = torch.ones_like(tokens, dtype=torch.bool)
            mask[:, 0] = False
            return TokenBatch(tokens=tokens, loss_mask=mask, source=torch.zeros(size.rows, dtype=torch.int64))

        def counts(self, step: int) -> dict[str, float]:
            return {}

    model = LanguageModel(config.model, size.vocab_size).initialise(torch.Generator().manual_seed(0))
    run = Run(config, Path(tempfile.mkdtemp()), join(config.engine.device), time.monotonic())
    model.to(run.layout.device)
    plan = Plan(PhasedMixture([Phase(0, {"random": 1.0})]), 100_000, size.rows, {"random": 1}, {"random": ""})
    run.fit(
        model=model, trained=model, batches=Batches(), objective=NextToken(), tokenizer=None, plan=plan,
        fixed_shapes=True,
    )  # fmt: skip


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Let the three take turns; the first turn (compilation, first touches) is not counted."""
    settings = {name: getattr(arguments, name) for name in ("model", "dtype", "device", "micro_batch_rows")}
    keys = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items() if value is not None]
    rounds, steps = arguments.rounds, arguments.steps

    def begin(name: str) -> Contender:
        contender = Contender([__file__, *keys, "--contender", name])
        contender.turn(3)
        return contender

    medians: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    if arguments.device == "cuda":
        for name in CONTENDERS:
            contender = begin(name)
            medians[name] = [statistics.median(contender.turn(steps)) for _ in range(rounds)]
            contender.end()
    else:
        contenders = {name: begin(name) for name in CONTENDERS}
        for number in range(rounds):
            for name in CONTENDERS if number % 2 == 0 else CONTENDERS[::-1]:
                medians[name].append(statistics.median(contenders[name].turn(steps)))
        for contender in contenders.values():
            contender.end()
    result: dict[str, Any] = settings | {"rounds": rounds, "steps": steps}
    size, reached = SIZES[arguments.model], peak(arguments)
    for name, values in medians.items():
        rate = size.length * size.rows / statistics.median(values)
        result |= {f"{name}_tokens_per_second": round(rate), f"{name}_mfu": round(rate * flops(arguments) / reached, 3)}
    for name in ("hf", "bare"):
        result[f"ours_over_{name}"] = ratios(medians[name], medians["ours"], 3)
    return result


def peak(arguments: argparse.Namespace) -> float:
    """FLOP/s of a large matrix product in this dtype, alone on the device."""
    import torch

    from llmtrain.engine.speed import matmul_peak

    return matmul_peak(torch.device(arguments.device), getattr(torch, arguments.dtype))


def flops(arguments: argparse.Namespace) -> float:
    """Of forward and backward, for each token."""
    from llmtrain.models.heads import LanguageModel
    from llmtrain.models.meta import on_meta

    size = SIZES[arguments.model]
    with on_meta():
        model = LanguageModel(build_config(arguments).model, size.vocab_size)
    return model.flops_per_token(size.length)


def main() -> None:
    """Parse the arguments; run one contender, or compare all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="bench_b")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--micro-batch-rows", type=int, help="rows in one pass of all three; unset: all of a step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="append the result to this JSON-lines file")
    arguments = parser.parse_args()
    if arguments.contender:
        contender = {"ours": ours, "bare": bare, "hf": hf}[arguments.contender]
        contender(build_config(arguments), SIZES[arguments.model])
        return
    report(compare(arguments), arguments.output, "transformers")


if __name__ == "__main__":
    main()
