"""Sampling answers from a language model, many prompts at a time."""

from collections.abc import Sequence

import torch

from llmtrain.config.errors import UserError
from llmtrain.config.schema import ModelConfig
from llmtrain.generation.batching import ContinuousBatch, Request
from llmtrain.generation.choice import Choice
from llmtrain.generation.decoder import Decoder, SourceDecoder
from llmtrain.models.heads import EncoderDecoder, LanguageModel


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_tokens: set[int],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seeds: Sequence[int] | None = None,
    batch_rows: int = 256,
    start_token: int | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, the stop token included where one was produced.

    `temperature` 0 takes the likeliest token; otherwise row i is sampled with uniforms from a generator seeded
    with `seeds[i]` (null: i), so its answer does not depend on the rows beside it. Nucleus (`top_p`): Holtzman et
    al. 2020 (arXiv 1904.09751, eq. 2); `top_k`: Fan et al. 2018 (arXiv 1805.04833). An answer also ends where the
    model's `max_sequence_length` is reached. The prompts of an encoder-decoder are its sources, and its answers begin
    behind `start_token`. At most `batch_rows` answers are computed side by side. Runs under
    autocast if that is on, and without dropout.

    Raises UserError for a model that writes nothing, for an empty prompt and for one that leaves no room for a new
    token.
    """
    seeds = range(len(prompts)) if seeds is None else seeds
    assert len(seeds) == len(prompts), "one seed for each prompt"
    _check(model.config, prompts)
    if not prompts:
        return []
    decoder = Decoder(model)
    if isinstance(model, EncoderDecoder):
        assert start_token is not None, "what answers begin behind"
        decoder = SourceDecoder(model, start_token)
    requests = [
        Request(tuple(prompt), seed, min(max_new_tokens, _room(model.config, prompt)))
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    choose = Choice(temperature, top_k, top_p)
    return ContinuousBatch(decoder, requests, choose, stop_tokens, batch_rows).run()


def _room(config: ModelConfig, prompt: Sequence[int]) -> int:
    """The longest answer that a prompt leaves room for: beside a source, a text has a length of its own."""
    before = 1 if config.architecture == "encoder_decoder" else len(prompt)
    return config.max_sequence_length - before


def _check(config: ModelConfig, prompts: Sequence[Sequence[int]]) -> None:
    if config.architecture == "encoder":
        raise UserError("the model is an encoder: it reads text and fills in what is masked, but writes none")
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {row} is empty: a model needs at least one token to go on from")
        if _room(config, prompt) < 1 or len(prompt) > config.max_sequence_length:
            is_source = config.architecture == "encoder_decoder"
            problem = "is more than the encoder reads" if is_source else "leaves no room for an answer"
            raise UserError(
                f"prompt {row} has {len(prompt)} tokens, which {problem}: the model's"
                f" max_sequence_length is {config.max_sequence_length}; shorten the prompt"
            )
