"""Sampling: the cache changes nothing, and neither do the rows beside one."""

import torch

from llmtrain.doctor.measurement import Measurement
from llmtrain.doctor.subject import language_model, prompts
from llmtrain.generation.sampler import generate
from llmtrain.models.heads import LanguageModel

NEW_TOKENS = 16


def decoding(device: torch.device) -> list[Measurement]:
    """Greedy answers are those without a cache; a sample is the same alone and among others."""
    model, asked = language_model(device), prompts(9, seed=1)
    greedy = generate(model, asked, max_new_tokens=NEW_TOKENS, stop_tokens=set(), temperature=0)
    plain = [without_cache(model, prompt) for prompt in asked]
    seeds = [100 + row for row in range(len(asked))]
    together = generate(model, asked, max_new_tokens=NEW_TOKENS, stop_tokens=set(), seeds=seeds)
    alone = [
        generate(model, [prompt], max_new_tokens=NEW_TOKENS, stop_tokens=set(), seeds=[seed])[0]
        for prompt, seed in zip(asked, seeds, strict=True)
    ]
    return [
        Measurement("generation: tokens that differ without the cache", 0.0, count_different(greedy, plain)),
        Measurement("generation: samples that differ when drawn alone", 0.0, count_different(together, alone)),
    ]


@torch.no_grad()
def without_cache(model: LanguageModel, prompt: list[int]) -> list[int]:
    """The likeliest tokens, each from a pass over everything before it."""
    tokens = list(prompt)
    for _ in range(NEW_TOKENS):
        tokens.append(int(model(torch.tensor([tokens], device=model.head_weight.device))[0, -1].argmax()))
    return tokens[len(prompt) :]


def count_different(found: list[list[int]], expected: list[list[int]]) -> float:
    """Tokens that are not the expected ones."""
    pairs = [pair for row in zip(found, expected, strict=True) for pair in zip(*row, strict=True)]
    return float(sum(one != other for one, other in pairs))
