"""Generated tokens per second of `generate` against transformers.generate with a dynamic and a static cache.

All of them answer the same prompts with the same model, one after the other in one process, round after round in
turning order, so that a machine whose speed drifts treats them alike; the first turn of each, on as many prompts as
rows, is not counted. Reported are the median speed of each and the median over rounds of the ratios. Answers are greedy
and end at stop tokens; only the tokens up to there count.

    python benchmarks/generation.py --model bench_b --dtype float32 --batch 32

Prompts are 8 to 128 random tokens, answers at most `--new-tokens`. transformers gets the prompts in order of length,
left-padded, `--batch` at a time; ours computes as many rows side by side and gives a finished one to the next prompt.
With `--batch 1` there is one prompt of 64 tokens at a time and no stop token. The models are random, with weights so
large that their answers vary; one token in 64 is a stop token, so that answers are of mixed lengths. In float32 both
give the same answers, but for a tie now and then (`same_answers`); in bfloat16 transformers has bfloat16 weights, and
ours float32 weights under autocast, as in a rollout.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from contenders import ratios, report

VOCAB_SIZE = 8192
INIT_STD = 0.1

Answers = list[list[int]]


def make_prompts(count: int, batch: int) -> Answers:
    """Prompts of random tokens."""
    import torch

    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(8, 129, (count,), generator=generator).tolist() if batch > 1 else [64] * count
    return [torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def make_contenders(
    name: str, dtype: str, batch: int, new_tokens: int, stops: set[int]
) -> dict[str, Callable[[Answers], Answers]]:
    """Each answers prompts, up to and including a stop token."""
    import torch
    import transformers

    from llmtrain.config.compose import load_config
    from llmtrain.generation.sampler import generate
    from llmtrain.models.formats import save_model
    from llmtrain.models.heads import LanguageModel

    config = dataclasses.replace(load_config("pretrain", [f"model={name}"]).model, init_std=INIT_STD)
    model = LanguageModel(config, VOCAB_SIZE).initialise(torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), model, extra_config={"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0})
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    theirs.generation_config = transformers.GenerationConfig(
        max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, eos_token_id=sorted(stops) or None
    )

    def ours(prompts: Answers) -> Answers:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            return generate(
                model, prompts, max_new_tokens=new_tokens, stop_tokens=stops, temperature=0, batch_rows=batch
            )

    def transformers_with(cache: str) -> Callable[[Answers], Answers]:
        def answer(prompts: Answers) -> Answers:
            order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
            answers: Answers = [[] for _ in prompts]
            for start in range(0, len(order), batch):
                rows = order[start : start + batch]
                longest = max(len(prompts[row]) for row in rows)
                padded = torch.tensor([[0] * (longest - len(prompts[row])) + prompts[row] for row in rows])
                mask = torch.tensor([[0] * (longest - len(prompts[row])) + [1] * len(prompts[row]) for row in rows])
                found = theirs.generate(padded, attention_mask=mask, cache_implementation=cache)[:, longest:]
                for row, tokens in zip(rows, found.tolist(), strict=True):
                    end = next((index + 1 for index, token in enumerate(tokens) if token in stops), len(tokens))
                    answers[row] = tokens[:end]
            return answers

        return answer

    return {"ours": ours, "dynamic": transformers_with("dynamic"), "static": transformers_with("static")}


def compare(model: str, dtype: str, batch: int, count: int, new_tokens: int, rounds: int) -> dict[str, Any]:
    """Let them take turns."""
    from llmtrain.engine.memory import keep_freed_memory

    keep_freed_memory()  # as in a run; all of them have it
    prompts, stops = make_prompts(count, batch), set(range(VOCAB_SIZE // 64)) if batch > 1 else set()
    contenders = make_contenders(model, dtype, batch, new_tokens, stops)
    for answer in contenders.values():
        answer(prompts[:batch])
    answers: dict[str, Answers] = {}
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        order = list(contenders)
        for name in order if number % 2 == 0 else order[::-1]:
            start = time.perf_counter()
            answers[name] = contenders[name](prompts)
            speeds[name].append(sum(map(len, answers[name])) / (time.perf_counter() - start))
    lengths = [len(answer) for answer in answers["ours"]]
    same = sum(one == other for one, other in zip(answers["ours"], answers["dynamic"], strict=True))
    result: dict[str, Any] = {
        "model": model, "dtype": dtype, "batch": batch, "prompts": count, "new_tokens": new_tokens, "rounds": rounds,
        "answer_tokens": {"mean": round(statistics.mean(lengths), 1), "lowest": min(lengths), "highest": max(lengths)},
        "same_answers": same / count,
    }  # fmt: skip
    for name, values in speeds.items():
        result[f"{name}_tokens_per_second"] = round(statistics.median(values), 1)
    for name in ("dynamic", "static"):
        result[f"ours_over_{name}"] = ratios(speeds["ours"], speeds[name], 2)
    return result


def main() -> None:
    """Parse the arguments and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("bench_a", "bench_b"), default="bench_b")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--batch", type=int, default=32, help="rows computed side by side")
    parser.add_argument("--prompts", type=int, help="number of prompts; without it four for each row")
    parser.add_argument("--new-tokens", type=int, default=128, help="longest answer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="append the result to this JSON-lines file")
    arguments = parser.parse_args()
    import transformers

    transformers.utils.logging.set_verbosity_error()
    count = arguments.prompts or 4 * arguments.batch
    result = compare(arguments.model, arguments.dtype, arguments.batch, count, arguments.new_tokens, arguments.rounds)
    report(result, arguments.output, "transformers")


if __name__ == "__main__":
    main()
