"""Rollouts: sampled answers as a batch that is good for several updates.

Shapes: B rows, S tokens of the longest row, T = S − 1. A quantity [B, T] at position t belongs to the choice of
tokens[:, t + 1]: `logprobs[:, t]` is that token's log-probability, `values[:, t]` the value of the state before it.
Padding stands on the right; the mask of a row is one unbroken range of positions.

A group is all answers to one prompt: `group_rows` rows that stand side by side, always in the same update and on the
same process.
"""

import dataclasses
from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor

from llmtrain.config.errors import ConfigError
from llmtrain.config.seeds import derive_seed
from llmtrain.objectives.batch import Batch, Metrics
from llmtrain.objectives.kl import KLStop
from llmtrain.objectives.routing import Stack, before_the_last


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout(Batch):
    """Prompts and sampled answers: the groups of `rows_of_process`, in that order."""

    tokens: Tensor
    """[B, S] int64: prompt, answer, padding."""
    response_mask: Tensor
    """[B, S] bool: the sampled tokens, end token included."""
    epochs: int = 1
    """Passes over the rollout."""
    minibatches: int = 1
    """Updates in each pass."""
    group_rows: int = 1
    """Answers to each prompt."""
    first_slot: int
    """Number of this process's first slot: the first of its `rows_of_process`."""
    seed: int
    """With `step`: the key of the shuffling."""
    step: int
    """The training step that this is the rollout of."""
    kl_stop: KLStop | None = None
    """Ends the updates early. The objective tells it how far the policy has moved."""
    kl: Tensor | None = None
    """[B] float32, nats: the log-ratio of the sampling policy to the reference, summed over the answer. None: there is
    no reference, or nothing was read before the update, which then tells the metric `align/kl`."""
    sampler_logprobs: Tensor | None = None
    """[B, T] float32: log-probabilities of the sampled tokens by other kernels than the policy's, which sampled them;
    zero outside the answer. None: the policy's own kernels have."""
    importance_limit: float | None = None
    """Largest weight of a choice that other kernels have sampled. None: each counts alike."""
    measured: Metrics = dataclasses.field(default_factory=dict)
    """What is known of the rollout before it is trained on: rewards, KL."""

    def counted_tokens(self) -> dict[Stack, Tensor]:
        """What the sampled tokens are predicted from, [B, S] bool."""
        return {"decoder": before_the_last(self.response_mask)}

    def metrics(self) -> Metrics:
        """The rollout's rewards, KL and lengths."""
        return self.measured

    def updates(self) -> Iterator[Self]:
        """`minibatches` updates for each of the `epochs` passes; every pass holds each row once."""
        if self.kl_stop:
            self.kl_stop.begin()
        for rows in self.update_rows():
            if self.kl_stop and self.kl_stop.is_reached():
                return
            yield self[rows]

    def num_updates(self) -> int:
        """Those of all passes."""
        return self.epochs * self.minibatches

    def update_rows(self) -> Iterator[Tensor]:
        """The positions in this rollout of each update's rows, [B / minibatches] int64, by slot."""
        slots = len(self) // (self.minibatches * self.group_rows)
        within = torch.arange(self.group_rows)
        for epoch in range(self.epochs):
            lines = torch.stack([self._order(epoch, self.first_slot + slot) for slot in range(slots)], dim=1)
            groups = lines * slots + torch.arange(slots)
            yield from (groups[..., None] * self.group_rows + within).flatten(1).to(self.tokens.device)

    def _order(self, epoch: int, slot: int) -> Tensor:
        """Which of a slot's groups goes into which minibatch."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "minibatch", self.step, epoch, slot))
        return torch.randperm(self.minibatches, generator=generator)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trajectory(Rollout):
    """A rollout with an advantage and a return for each token: what PPO learns from."""

    logprobs: Tensor
    """[B, T] float32, of the policy that sampled; zero outside the answer, as below."""
    values: Tensor
    """[B, T] float32, of the value model when the answers were sampled."""
    advantages: Tensor
    """[B, T] float32."""
    returns: Tensor
    """[B, T] float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgedAnswers(Rollout):
    """A rollout with one advantage for each answer: what GRPO, RLOO and REINFORCE learn from."""

    advantages: Tensor
    """[B] float32."""
    logprobs: Tensor | None
    """[B, T] float32, of the policy that sampled; zero outside the answer, as below. None: there is a single update, so
    that policy is the one that is trained."""
    reference_logprobs: Tensor | None = None
    """[B, T] float32, zero outside the answer. None: the loss asks for no reference."""

    learned: Tensor | None = None
    """[B] bool: whether anything is learned of an answer. None: of all."""

    def learned_mask(self) -> Tensor:
        """The choices that are learned from, [B, T] bool."""
        mask = self.response_mask[:, 1:]
        return mask if self.learned is None else mask & self.learned[:, None]

    def old_logprobs(self, logprobs: Tensor) -> Tensor:
        """Those of the policy that sampled, [B, T], given what the objective has just read of the trained one."""
        return logprobs.detach() if self.logprobs is None else self.logprobs


def rows_of_process(rank: int, world: int, rows: int, minibatches: int, group_rows: int = 1) -> Tensor:
    """Numbers, among all `rows` of a rollout, of the rows that a process holds, ascending.

    The groups (of one row each, unless told otherwise) are laid out as a table of `minibatches` lines and
    groups / minibatches slots; group g stands in slot g mod slots. A process holds whole slots, a contiguous range of
    them. A minibatch takes one group from each slot, by a permutation drawn for that slot alone; so it holds the same
    rows however many processes share them, and every process has the same part in it.

    Raises:
        ConfigError: if the rows cannot be laid out in groups and minibatches, or the slots not be shared out.
    """
    groups, rest = divmod(rows, group_rows)
    if rest:
        raise ConfigError(
            f"train.batch_rows={rows} cannot be split into groups of method.samples_per_prompt={group_rows} rows; "
            "choose a multiple"
        )
    slots, rest = divmod(groups, minibatches)
    if rest:
        raise ConfigError(
            f"train.batch_rows={rows} cannot be split into method.minibatches={minibatches} equal parts; "
            "choose a multiple"
        )
    if slots % world:
        raise ConfigError(
            f"{slots} rows in each minibatch (train.batch_rows={rows} / method.minibatches={minibatches}) cannot be "
            f"shared out evenly to {world} processes; choose a multiple of {world}"
        )
    table = torch.arange(rows).view(minibatches, slots, group_rows)
    return table[:, slots_of_process(rank, world, slots)].flatten()


def slots_of_process(rank: int, world: int, slots: int) -> slice:
    """The range of slots that a process holds."""
    return slice(rank * slots // world, (rank + 1) * slots // world)
