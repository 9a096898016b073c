"""Rollouts: the policy answers prompts, the answers are scored, and what PPO learns from is computed.

One rollout is the batch of one step: it is sampled at the start of the step, used for all of the step's updates and
forgotten. A row's draws come from a generator keyed by (seed, step, row), so a rollout depends neither on how its rows
are batched nor on how many processes share them.

    prompts → sample → log-probabilities and values → score, KL penalty → whitened rewards → GAE → Trajectory

Shapes: B rows of this process, S tokens of the longest row; quantities per token [B, S-1] belong to tokens[:, 1:].
"""

import dataclasses
from collections.abc import Callable, Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from llmtrain.config.schema import PpoConfig
from llmtrain.config.seeds import derive_seed
from llmtrain.engine.distributed import Layout, full_state, is_sharded, total
from llmtrain.generation.sampler import generate
from llmtrain.models.heads import LanguageModel, ScalarModel
from llmtrain.objectives.batch import Metrics
from llmtrain.objectives.logprobs import token_logprobs
from llmtrain.objectives.pairs import answer_scores
from llmtrain.objectives.policy_gradient import (
    AdaptiveKL,
    Trajectory,
    gae,
    kl_k1,
    policy_and_values,
    rows_of_process,
    slots_of_process,
    token_rewards,
    whiten,
)  # fmt: skip

# Rows are padded to a multiple of this, so that few widths occur.
WIDTH_MULTIPLE = 8


class Replica:
    """A model to sample from: the trained one itself, or, where its weights are sharded, a whole copy kept up to date.

    Rows end at different lengths on different processes, so sampling must not wait for the other processes' weights.
    """

    def __init__(self, part: LanguageModel) -> None:
        self.part = part
        self.copy: LanguageModel | None = None

    def __call__(self) -> LanguageModel:
        """The model with the weights of now. Where sharded, all processes must call this together."""
        if not is_sharded(self.part):
            return self.part
        if self.copy is None:
            self.copy = LanguageModel(self.part.config, self.part.vocab_size)
            self.copy.to(next(self.part.parameters()).device)
        self.copy.load_state_dict(full_state(self.part))
        return self.copy.eval()


@dataclasses.dataclass(kw_only=True)
class Rollouts:
    """PPO's batch source: the Trajectory of a step, sampled from the policy as it stands."""

    model: nn.Module
    """The actor-critic as spread over the processes."""
    policy: LanguageModel
    """Its policy, to sample from."""
    reference: LanguageModel
    reward_model: ScalarModel
    prompts: Callable[[int], Sequence[Sequence[int]]]
    """Step → prompts of the whole batch, over all processes."""
    counts: Callable[[int], dict[str, float]]
    """Step → what the steps before it have consumed, by source."""
    stop_tokens: frozenset[int]
    pad_id: int
    settings: PpoConfig
    batch_rows: int
    micro_batch_rows: int | None
    kl: AdaptiveKL
    seed: int
    layout: Layout
    autocast: Callable[[], torch.autocast]

    def __post_init__(self) -> None:
        rank, world, minibatches = self.layout.rank, self.layout.world, self.settings.minibatches
        self.replica = Replica(self.policy)
        self.rows = rows_of_process(rank, world, self.batch_rows, minibatches).tolist()
        self.first_slot = slots_of_process(rank, world, self.batch_rows // minibatches).start

    @torch.no_grad()
    def __call__(self, step: int) -> Trajectory:
        """Sample and score this process's rows of the step."""
        everyone = self.prompts(step)
        prompts = [list(everyone[row]) for row in self.rows]
        seeds = [derive_seed(self.seed, "rollout", step, row) for row in self.rows]
        with self.autocast():
            answers = generate(
                self.replica(), prompts, max_new_tokens=self.settings.max_new_tokens, stop_tokens=set(self.stop_tokens),
                temperature=self.settings.temperature, seeds=seeds,
            )  # fmt: skip
            batch = self._pack(prompts, answers, step)
            batch, reference = self._read(batch)
            scores = self._scores(batch)
        finished = torch.tensor([answer[-1] in self.stop_tokens for answer in answers], device=scores.device)
        return self._judge(batch, reference, scores, finished)

    def _pack(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], step: int) -> Trajectory:
        """Prompts and answers side by side, right-padded; everything else still zero."""
        rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
        width = -(-max(map(len, rows)) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        tokens = torch.full((len(rows), width), self.pad_id)
        mask = torch.zeros(tokens.shape, dtype=torch.bool)
        for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            tokens[number, : len(row)] = torch.tensor(row)
            mask[number, len(prompt) : len(row)] = True
        nothing = torch.zeros(len(rows), width - 1)
        return Trajectory(
            tokens=tokens, response_mask=mask, logprobs=nothing, values=nothing, advantages=nothing, returns=nothing,
            epochs=self.settings.epochs, minibatches=self.settings.minibatches, first_slot=self.first_slot,
            seed=self.seed, step=step,
        ).to(self.layout.device)  # fmt: skip

    def _read(self, batch: Trajectory) -> tuple[Trajectory, Tensor]:
        """The batch with the policy's log-probabilities and values, and the reference's log-probabilities [B, T].

        Read in the very portions that the first epoch trains on, so that the ratio of its first update is exactly 1.
        """
        logprobs, values, reference = (torch.zeros_like(batch.logprobs) for _ in range(3))
        temperature = self.settings.temperature
        for minibatch in islice(batch.update_rows(), batch.minibatches):
            for rows in minibatch.split(self.micro_batch_rows or len(minibatch)):
                tokens, mask = batch.tokens[rows], batch.response_mask[rows]
                logprobs[rows], _, values[rows] = policy_and_values(self.model, tokens, mask, temperature)
                reference[rows] = answer_token_logprobs(self.reference, tokens, mask, temperature)
        return dataclasses.replace(batch, logprobs=logprobs, values=values), reference

    def _scores(self, batch: Trajectory) -> Tensor:
        """The reward model's normalised score of each answer, [B]."""
        portions = batch.micro_batches(self.micro_batch_rows)
        scores = [answer_scores(self.reward_model(part.tokens), part.response_mask) for part in portions]
        return self.reward_model.normalised(torch.cat(scores).float())

    def _judge(self, batch: Trajectory, reference: Tensor, scores: Tensor, finished: Tensor) -> Trajectory:
        """Rewards, advantages and returns, with statistics over the whole rollout of all processes."""
        settings, mask = self.settings, batch.response_mask[:, 1:]
        penalised = scores - settings.missing_eos_penalty * (~finished).float()
        rewards = token_rewards(penalised, batch.logprobs, reference, mask, self.kl.coefficient)
        if settings.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False, reduce=self._reduce)
        advantages, returns = gae(rewards, batch.values, mask, gamma=settings.gamma, lam=settings.gae_lambda)
        if settings.whiten_advantages:
            advantages = whiten(advantages, mask, reduce=self._reduce)
        kl = torch.where(mask, kl_k1(batch.logprobs, reference), 0.0).sum(dim=1)
        per_answer = {
            "align/reward": scores, "align/kl": kl, "align/answer_tokens": mask.sum(dim=1).float(),
            "align/unfinished": (~finished).float(),
        }  # fmt: skip
        count = scores.new_tensor(float(len(scores)))
        measured: Metrics = {name: (value.sum(), count) for name, value in per_answer.items()}
        measured["align/kl_coefficient"] = (self.kl.coefficient * count, count)
        error = torch.where(mask, (returns - batch.values).square(), 0.0).sum()
        measured["align/value_error"] = (error, mask.sum().float())
        self.kl.update(self._reduce(kl.sum()) / self.batch_rows, self.batch_rows)
        return dataclasses.replace(batch, advantages=advantages, returns=returns, measured=measured)

    def _reduce(self, value: Tensor) -> Tensor:
        return total(value, self.layout)


def answer_token_logprobs(model: nn.Module, tokens: Tensor, response_mask: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [B, T] of the sampled tokens, zero outside the answer; read as the policy's are."""

    def read(hidden: Tensor, head_weight: Tensor) -> Tensor:
        return token_logprobs(hidden[:, :-1], head_weight, tokens[:, 1:], response_mask[:, 1:], temperature=temperature)

    logprobs: Tensor = model(tokens, read=read)
    return logprobs
