"""Rollouts: the policy answers prompts, the answers are judged, and what a method learns from is made of them.

One rollout is the batch of one step: it is sampled at the start of the step, used for all of the step's updates and
forgotten. A row's draws come from a generator keyed by (seed, step, row), so a rollout depends neither on how its rows
are batched nor on how many processes share them.

    prompts → sample → judge → SampledAnswers → what the method learns from (`estimators.py`, `selection.py`)

Shapes: B rows of this process, S tokens of the longest row, G answers to each prompt, which stand side by side.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from llmtrain.config.errors import UserError
from llmtrain.config.schema.reinforcement import SampledAnswersConfig
from llmtrain.config.seeds import derive_seed
from llmtrain.data.encoding import PromptRow
from llmtrain.engine.distributed import Layout
from llmtrain.generation.engines import Engine, Sample
from llmtrain.objectives.advantages import flat_groups
from llmtrain.objectives.batch import Batch, Metrics, Samples
from llmtrain.objectives.trajectories import Rollout, rows_of_process, slots_of_process
from llmtrain.rewards.answers import Answer
from llmtrain.rewards.sums import WeightedSum

# Rows are padded to a multiple of this, so that few widths occur.
WIDTH_MULTIPLE = 8
# Of a reward that is learned from: losses and deviations add up its squares over tokens in float32 (up to 3.4e38).
LARGEST_REWARD = 1e15
# Of longer texts, only the beginning and the end are shown to people.
SHOWN_CHARACTERS = 2000


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledAnswers(Batch):
    """The answers of a step on this process, with their rewards; the rows of `rows_of_process`, in that order."""

    tokens: Tensor
    """[B, S] int64: prompt, answer, padding on the right."""
    response_mask: Tensor
    """[B, S] bool: the sampled tokens, end token included."""
    scores: Tensor
    """[B] float32: as the reward gave them."""
    rewards: Tensor
    """[B] float32: scores, clipped, less the penalty for a missing end token."""
    finished: Tensor
    """[B] bool: whether the answer reached its end token."""
    group_rows: int
    first_slot: int
    seed: int
    step: int
    measured: Metrics
    """Scores, lengths, how many were cut off, how many groups have nothing to tell."""
    sampler_logprobs: Tensor | None = None
    """[B, S − 1] float32, as that of `Rollout`."""
    importance_limit: float | None = None


def answer(
    sample: Sample, prompts: Sequence[PromptRow], settings: SampledAnswersConfig, *,
    stop_tokens: frozenset[int], decode: Callable[[Sequence[int]], str], seeds: Sequence[int],
) -> list[Answer]:  # fmt: skip
    """An answer to each prompt, drawn with its seed, as a reward sees it."""
    sampled = sample(
        [prompt.tokens for prompt in prompts], max_new_tokens=settings.max_new_tokens, stop_tokens=stop_tokens,
        temperature=settings.temperature, seeds=seeds,
    )  # fmt: skip
    logprobs: Sequence[Sequence[float] | None] = sampled.logprobs or [None] * len(prompts)
    return [
        Answer(
            prompt_tokens=prompt.tokens, tokens=tokens, prompt=prompt.text, text=decode(tokens),
            expected=prompt.answer, finished=tokens[-1] in stop_tokens, logprobs=said,
        )
        for prompt, tokens, said in zip(prompts, sampled.tokens, logprobs, strict=True)
    ]  # fmt: skip


def final_rewards(scores: Sequence[float], answers: Sequence[Answer], settings: SampledAnswersConfig) -> Tensor:
    """Scores, clipped, less the penalty for a missing end token: [B] float32.

    Raises UserError for a score that is too large to learn from.
    """
    clip = settings.reward_clip
    found = torch.tensor(scores, dtype=torch.float32)
    found = found if clip is None else found.clamp(-clip, clip)
    beyond = found[found.abs() > LARGEST_REWARD]
    if len(beyond):
        raise UserError(
            f"the sum of an answer's rewards is {float(beyond[0]):g}, whose squares float32 cannot add up: expected "
            f"at most {LARGEST_REWARD:g}; lower the weights (rewards.<name>.weight, reward_model_weight), or set "
            "method.reward_clip"
        )
    return found - settings.missing_eos_penalty * torch.tensor([float(not each.finished) for each in answers])


def changes_scores(settings: SampledAnswersConfig) -> bool:
    """Whether final rewards may be other than scores."""
    return settings.reward_clip is not None or settings.missing_eos_penalty > 0


class Prompts(Protocol):
    """What is asked."""

    def __call__(self, step: int, replacement: int = 0) -> Sequence[PromptRow]:
        """The prompts of the step over all processes; or, one for each, what the n-th replacement asks instead."""

    def counts(self, step: int) -> dict[str, float]:
        """What the steps before have consumed, by source."""


class _Judged(NamedTuple):
    answer: Answer
    score: float
    parts: Mapping[str, float]
    replacement: int


@dataclasses.dataclass(kw_only=True)
class Rollouts:
    """The batch source of every method that samples: answers of the policy as it stands, made into a batch."""

    engine: Engine
    """Answers with the policy as it stands."""
    prompts: Prompts
    reward: WeightedSum
    learn_from: Callable[[SampledAnswers], Batch]
    """The method's own part."""
    decode: Callable[[Sequence[int]], str]
    """Ids → text without special tokens."""
    stop_tokens: frozenset[int]
    pad_id: int
    settings: SampledAnswersConfig
    batch_rows: int
    """Answers of a step over all processes."""
    group_rows: int = 1
    """Answers to each prompt."""
    minibatches: int = 1
    replacements: int = 0
    """How many times, at most, a prompt is replaced whose answers all have the same reward."""
    importance_limit: float | None = None
    """As that of `Rollout`."""
    shown_rows: int = 0
    """How many answers of a step, over all processes, people are shown."""
    seed: int
    layout: Layout
    autocast: Callable[[], torch.autocast]
    phase: ClassVar[str] = "rollouts"
    """What its time is counted as."""

    def __post_init__(self) -> None:
        rank, world, prompts = self.layout.data_rank, self.layout.data_world, self.batch_rows // self.group_rows
        rows = rows_of_process(rank, world, self.batch_rows, self.minibatches, self.group_rows)
        shown = shown_rows(self.batch_rows, self.shown_rows)
        self.shown = {row: place for place, row in enumerate(rows.tolist()) if row in shown}
        self.asked = (rows[:: self.group_rows] // self.group_rows).tolist()
        self.first_slot = slots_of_process(rank, world, prompts // self.minibatches).start

    def counts(self, step: int) -> dict[str, float]:
        """What the steps before this one have consumed, by source."""
        return self.prompts.counts(step)

    @torch.no_grad()
    def __call__(self, step: int) -> Batch:
        """Sample and judge this process's rows of the step."""
        with self.autocast(), self.engine() as sample:
            drawn = self._judged(sample, step, self.asked)
            judged = [*drawn]
            for replacement in range(1, self.replacements + 1):
                flat = flat_groups(self._rewards(judged), self.group_rows).nonzero()[:, 0].tolist()
                if not flat:
                    break
                others = self._judged(sample, step, [self.asked[place] for place in flat], replacement)
                for number, place in enumerate(flat):
                    judged[self._group(place)] = others[self._group(number)]
        batch = self.learn_from(self._packed(judged, drawn, step))
        return dataclasses.replace(batch, samples=self._samples(judged, batch)) if self.shown_rows else batch

    def _group(self, number: int) -> slice:
        return slice(number * self.group_rows, (number + 1) * self.group_rows)

    def _judged(self, sample: Sample, step: int, asked: Sequence[int], replacement: int = 0) -> list[_Judged]:
        """Answers to some prompts of the step, given by their numbers; a replacement has draws of its own."""
        everyone, again = self.prompts(step, replacement), (replacement,) if replacement else ()
        rows = [number * self.group_rows + place for number in asked for place in range(self.group_rows)]
        answers = answer(
            sample, [everyone[row // self.group_rows] for row in rows], self.settings, stop_tokens=self.stop_tokens,
            decode=self.decode, seeds=[derive_seed(self.seed, "rollout", step, row, *again) for row in rows],
        )  # fmt: skip
        components = self.reward.components(answers)
        parts = [dict(zip(components, values, strict=True)) for values in zip(*components.values(), strict=True)]
        scores = self.reward.total(components)
        return [_Judged(*each, replacement) for each in zip(answers, scores, parts, strict=True)]

    def _rewards(self, judged: Sequence[_Judged]) -> Tensor:
        return final_rewards(
            [each.score for each in judged], [each.answer for each in judged], self.settings
        ).to(self.layout.device)  # fmt: skip

    def _packed(self, judged: Sequence[_Judged], drawn: Sequence[_Judged], step: int) -> SampledAnswers:
        """Prompts and answers side by side, right-padded; `drawn` are those before any was replaced."""
        rows = [[*each.answer.prompt_tokens, *each.answer.tokens] for each in judged]
        width = -(-max(map(len, rows)) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        tokens = torch.full((len(rows), width), self.pad_id)
        mask = torch.zeros(tokens.shape, dtype=torch.bool)
        for number, (row, each) in enumerate(zip(rows, judged, strict=True)):
            tokens[number, : len(row)] = torch.tensor(row)
            mask[number, len(each.answer.prompt_tokens) : len(row)] = True
        rewards = self._rewards(judged)
        return SampledAnswers(
            tokens=tokens, response_mask=mask, scores=torch.tensor([each.score for each in judged]), rewards=rewards,
            finished=torch.tensor([each.answer.finished for each in judged]),
            group_rows=self.group_rows, first_slot=self.first_slot, seed=self.seed, step=step,
            measured=self._measured(judged, drawn, rewards), sampler_logprobs=sampler_logprobs(judged, width),
            importance_limit=self.importance_limit,
        ).to(self.layout.device)  # fmt: skip

    def _samples(self, judged: Sequence[_Judged], batch: Batch) -> Samples:
        """What people are shown; rewards are those of the metrics `align/reward` and `align/reward/<name>`."""
        kl = batch.kl if isinstance(batch, Rollout) else None  # what learns from pairs, or the best, has none
        samples = []
        for row, place in self.shown.items():
            answer, score, parts, _ = judged[place]
            samples.append(
                {
                    "row": row, "prompt": shortened(answer.prompt), "answer": shortened(answer.text),
                    "expected": None if answer.expected is None else shortened(answer.expected), "reward": score,
                    **{f"reward/{name}": value for name, value in parts.items()},
                    "tokens": len(answer.tokens), "finished": answer.finished,
                    "kl": None if kl is None else float(kl[place]),
                }
            )  # fmt: skip
        return samples

    def _measured(self, judged: Sequence[_Judged], drawn: Sequence[_Judged], rewards: Tensor) -> Metrics:
        """How good the policy is, by its answers to the prompts of the step; and what is learned from in their place.

        What replaces prompts that are too easy or too hard is in between, whatever the policy has become.
        """
        per_answer = {
            "align/reward": [each.score for each in drawn],
            "align/answer_tokens": [float(len(each.answer.tokens)) for each in drawn],
            "align/unfinished": [float(not each.answer.finished) for each in drawn],
        } | {f"align/reward/{name}": [each.parts[name] for each in drawn] for name in drawn[0].parts}
        measured: Metrics = {name: means(rewards.new_tensor(values)) for name, values in per_answer.items()}
        if self.group_rows > 1:
            measured["align/flat_groups"] = means(flat_groups(rewards, self.group_rows))
        if self.replacements:
            replaced = [float(each.replacement) for each in judged[:: self.group_rows]]
            measured["align/replacements"] = means(rewards.new_tensor(replaced))
        return measured


def sampler_logprobs(judged: Sequence[_Judged], width: int) -> Tensor | None:
    """The log-probabilities that an engine has told of its tokens, [B, width − 1]; None where none has."""
    logprobs = torch.zeros(len(judged), width - 1)
    for row, (answer, *_) in zip(logprobs, judged, strict=True):
        if answer.logprobs is None:
            return None
        first = len(answer.prompt_tokens) - 1
        row[first : first + len(answer.tokens)] = torch.tensor(answer.logprobs)
    return logprobs


def shown_rows(batch_rows: int, count: int) -> range:
    """Which rows of a step people are shown: the same in every step, as far apart as can be, so of many prompts."""
    count = min(batch_rows, count)
    return range(0, batch_rows // count * count, batch_rows // count) if count else range(0)


def shortened(text: str) -> str:
    """The text, or its beginning and its end, with the number of characters that were left out between them."""
    left_out, half = len(text) - SHOWN_CHARACTERS, SHOWN_CHARACTERS // 2
    return text if left_out <= 0 else f"{text[:half]} [... {left_out} characters ...] {text[-half:]}"


def means(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values [N] as (sum, number), for a metric that is their mean; float32 may hold each of them and not their sum."""
    return values.double().sum(), values.new_tensor(float(len(values)), dtype=torch.float32)
