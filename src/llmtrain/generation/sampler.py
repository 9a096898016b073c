"""Sampling answers: the interface, and the sampler that runs a model of this project itself."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from llmtrain.config.errors import UserError
from llmtrain.config.schema import ModelConfig
from llmtrain.generation.batching import ContinuousBatch, Request
from llmtrain.generation.choice import Choice
from llmtrain.generation.decoder import Decoder
from llmtrain.models.heads import LanguageModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are drawn.

    `temperature` 0 takes the likeliest token. Nucleus (`top_p`): Holtzman et al. 2020 (arXiv 1904.09751, eq. 2);
    `top_k`: Fan et al. 2018 (arXiv 1805.04833).
    """

    max_new_tokens: int
    stop_tokens: frozenset[int]
    """An answer ends with the first of these."""
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None


class Sampler(Protocol):
    """Answers prompts with the policy's weights of now: what a rollout needs, whatever engine does it."""

    def __call__(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], settings: Sampling) -> list[list[int]]:
        """The new tokens of each prompt, the stop token included where one was produced.

        Row i is drawn from a generator seeded with `seeds[i]`, so that its answer does not depend on other rows.
        """


class ModelSampler:
    """Samples from a LanguageModel, at most `batch_rows` answers at a time.

    Row i is drawn with uniforms from a generator of its own. An answer also ends where the model's
    `max_sequence_length` is reached. Runs under autocast if that is on, and without dropout.

    `model` gives the model with the weights of now: it is asked once for each call.
    """

    def __init__(self, model: Callable[[], LanguageModel], *, batch_rows: int = 256) -> None:
        self.model = model
        self.batch_rows = batch_rows

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], settings: Sampling) -> list[list[int]]:
        """As `Sampler`. Raises UserError for an empty prompt and for one that leaves no room for a new token."""
        assert len(seeds) == len(prompts), "one seed for each prompt"
        if not prompts:
            return []
        model = self.model()
        _check(model.config, prompts)
        room = model.config.max_sequence_length
        requests = [
            Request(tuple(prompt), seed, min(settings.max_new_tokens, room - len(prompt)))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        choose = Choice(settings.temperature, settings.top_k, settings.top_p)
        return ContinuousBatch(Decoder(model), requests, choose, settings.stop_tokens, self.batch_rows).run()


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
) -> list[list[int]]:
    """The new tokens of each prompt, as `ModelSampler` gives them; without `seeds`, row i has seed i."""
    settings = Sampling(
        max_new_tokens=max_new_tokens, stop_tokens=frozenset(stop_tokens), temperature=temperature, top_k=top_k,
        top_p=top_p,
    )  # fmt: skip
    seeds = range(len(prompts)) if seeds is None else seeds
    return ModelSampler(lambda: model, batch_rows=batch_rows)(prompts, seeds, settings)


def _check(config: ModelConfig, prompts: Sequence[Sequence[int]]) -> None:
    room = config.max_sequence_length
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {row} is empty: a model needs at least one token to go on from")
        if len(prompt) >= room:
            raise UserError(
                f"prompt {row} has {len(prompt)} tokens, which leaves no room for an answer: the model's"
                f" max_sequence_length is {room}; shorten the prompt"
            )
