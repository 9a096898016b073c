"""Sampling answers from a language model, many prompts at a time.

Shapes: B rows of one batch, P longest prompt, N new tokens, V vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.config.errors import UserError
from llmtrain.config.schema import ModelConfig
from llmtrain.models.attention import KVCache
from llmtrain.models.heads import LanguageModel

# Finished rows are dropped once they are this share of the batch: dropping copies the cache, so it must pay.
DROP_SHARE = 0.25


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
) -> list[list[int]]:
    """The new tokens of each prompt, the stop token included where one was produced.

    `temperature` 0 takes the likeliest token; otherwise row i is sampled with uniforms from a generator seeded
    with `seeds[i]` (null: i), so its answer does not depend on the rows beside it, up to rounding. Nucleus
    (`top_p`): Holtzman et al. 2020 (arXiv 1904.09751, eq. 2); `top_k`: Fan et al. 2018 (arXiv 1805.04833). An
    answer also ends where the model's `max_sequence_length` is reached. Prompts are taken `batch_rows` at a time, in
    order of length. Runs under autocast if that is on; the model is in eval mode meanwhile.

    Raises UserError for an empty prompt and for one that leaves no room for a new token.
    """
    _check(model.config, prompts)
    seeds = range(len(prompts)) if seeds is None else seeds
    assert len(seeds) == len(prompts), "one seed for each prompt"
    choose = Choice(temperature, top_k, top_p)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    answers: list[list[int]] = [[] for _ in prompts]
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_rows):
            rows = order[start : start + batch_rows]
            batch = _Batch(model, [prompts[row] for row in rows], [seeds[row] for row in rows], max_new_tokens)
            for row, answer in zip(rows, batch.run(choose, stop_tokens), strict=True):
                answers[row] = answer
    finally:
        model.train(was_training)
    return answers


class Choice:
    """Picks a token for each row from its logits and a uniform number in [0, 1)."""

    def __init__(self, temperature: float, top_k: int | None, top_p: float | None) -> None:
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = None if top_p == 1.0 else top_p

    def __call__(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Tokens [B] for logits [B, V] and uniforms [B]."""
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        return invert_cdf(self.probabilities(logits), uniforms)

    def probabilities(self, logits: Tensor) -> Tensor:
        """What is sampled from, [B, V] float32: tempered, then cut to the top k, then to the nucleus."""
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            weakest = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < weakest, float("-inf"))
        probabilities = logits.softmax(dim=-1)
        if self.top_p is None:
            return probabilities
        descending, tokens = probabilities.sort(dim=-1, descending=True)
        # A token stays if those before it fall short of p: the first one always does.
        outside = descending.cumsum(dim=-1) - descending >= self.top_p
        return torch.zeros_like(probabilities).scatter_(-1, tokens, descending.masked_fill(outside, 0.0))


def invert_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The tokens [B] at which the cumulated probabilities [B, V] first exceed the uniforms [B] x their sum."""
    cumulated = probabilities.cumsum(dim=-1)
    # A float32 uniform is at most 1 - 2**-24, and that times the sum still rounds to less than the sum: there is
    # always a token, and one whose own probability is not 0.
    return torch.searchsorted(cumulated, uniforms[:, None] * cumulated[:, -1:], right=True)[:, 0]


class _Batch:
    """One batch of prompts on its way. The attributes below hold the rows that still run; `produced` holds all."""

    def __init__(
        self, model: LanguageModel, prompts: list[Sequence[int]], seeds: list[int], max_new_tokens: int
    ) -> None:
        device = model.head_weight.device
        lengths = [len(prompt) for prompt in prompts]
        longest, room = max(lengths), model.config.max_sequence_length
        steps = min(max_new_tokens, room - min(lengths))
        padded = [[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts]
        self.model = model
        self.prompts = torch.tensor(padded, device=device)  # [B, P]
        self.lengths = torch.tensor(lengths, device=device)
        self.limits = (room - self.lengths).clamp(max=max_new_tokens)  # longest answer of each row
        self.uniforms = _uniforms(seeds, max_new_tokens).to(device)  # [B, N]
        self.rows = torch.arange(len(prompts), device=device)  # where in `produced` they belong
        self.produced = torch.full((len(prompts), steps), -1, device=device)  # -1: not computed
        self.cache = KVCache(model.config, lengths, longest + steps, dtype=_working_dtype(model), device=device)

    def run(self, choose: Choice, stop_tokens: set[int]) -> list[list[int]]:
        """The answers of all rows, in their order."""
        stops = torch.tensor(sorted(stop_tokens), dtype=torch.long, device=self.rows.device)
        limits = self.limits.tolist()
        finished = torch.zeros_like(self.rows, dtype=torch.bool)
        logits = self.model(self.prompts, read=self._read_last, cache=self.cache)
        for step in range(self.produced.shape[1]):
            tokens = choose(logits, self.uniforms[:, step])
            self.produced[self.rows, step] = tokens
            finished = finished | torch.isin(tokens, stops) | (self.limits == step + 1)
            finished_count = int(finished.sum())
            if finished_count == len(finished):
                break
            if finished_count >= DROP_SHARE * len(finished):
                running = (~finished).nonzero()[:, 0]
                self._keep(running)
                tokens, finished = tokens[running], finished[running]
            logits = self.model(tokens[:, None], cache=self.cache)[:, 0]
        return [_cut(row, limit, stop_tokens) for row, limit in zip(self.produced.tolist(), limits, strict=True)]

    def _read_last(self, hidden: Tensor, head_weight: Tensor) -> Tensor:
        """Logits [B, V] at the last position of each prompt: the only ones that are read."""
        return F.linear(hidden[self.rows, self.lengths - 1], head_weight)

    def _keep(self, rows: Tensor) -> None:
        self.rows, self.limits, self.uniforms = self.rows[rows], self.limits[rows], self.uniforms[rows]
        self.cache.select(rows)


def _uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """Numbers in [0, 1), [len(seeds), count], each row from a generator with its own seed."""
    generator = torch.Generator()
    return torch.stack([torch.rand(count, generator=generator.manual_seed(seed)) for seed in seeds])


def _working_dtype(model: LanguageModel) -> torch.dtype:
    """What matrix products give: autocast's dtype if it is on, else that of the weights."""
    device_type = model.head_weight.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return model.head_weight.dtype


def _cut(tokens: list[int], limit: int, stop_tokens: set[int]) -> list[int]:
    """The tokens up to the first stop token, or `limit` of them: a finished row runs on until it is dropped."""
    end = next((index + 1 for index, token in enumerate(tokens) if token in stop_tokens), limit)
    return tokens[: min(end, limit)]


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
