"""What is measured before, during and after a stage; each evaluator returns `eval/...` numbers.

Every process measures the same rows, so that the numbers do not depend on how many there are.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from llmtrain.config.schema import AlignConfig, SampledAnswersConfig, SftConfig
from llmtrain.config.seeds import derive_seed
from llmtrain.data.encoding import PromptRow, encoded_prompt
from llmtrain.data.rows import read_problems
from llmtrain.data.tokenizers import Tokenizer
from llmtrain.engine.steps import Objective
from llmtrain.generation.engines import Replica, sampling_from
from llmtrain.generation.rollouts import answer, changes_scores, final_rewards
from llmtrain.generation.sampler import generate
from llmtrain.generation.selection import best_rows
from llmtrain.models.heads import LanguageModel
from llmtrain.objectives.batch import Batch, Metrics
from llmtrain.rewards.answers import Answer
from llmtrain.rewards.rules import is_right
from llmtrain.rewards.sums import WeightedSum

Collated = TypeVar("Collated", bound=Batch)
Values = dict[str, float]


def evaluate_objective(
    model: nn.Module, objective: Objective, batches: Sequence[Batch], device: torch.device, metrics: Sequence[str],
    names: Mapping[str, str] = MappingProxyType({}),
) -> Callable[[], Values]:  # fmt: skip
    """An evaluator of some of the objective's metrics on held-out rows, as `eval/<metric>` or what `names` calls it."""

    def measure() -> Values:
        means = means_of((objective(model, batch.to(device))[1] for batch in batches), metrics)
        return {f"eval/{names.get(name, name)}": value for name, value in means.items()}

    return measure


def means_of(found: Iterable[Metrics], metrics: Sequence[str]) -> Values:
    """The means of some metrics over batches."""
    sums = {name: [0.0, 0.0] for name in metrics}
    for batch in found:
        for name, total in sums.items():
            total[0] += float(batch[name][0])
            total[1] += float(batch[name][1])
    return {name: value / weight for name, (value, weight) in sums.items() if weight}


def held_out_batches(
    rows: Mapping[str, Sequence[Any]], collate: Callable[..., Collated], pad_id: int, batch_rows: int = 64
) -> list[Collated]:
    """Held-out rows of all sources in batches, each padded to its longest row."""
    batches = []
    for number, each in enumerate(rows.values()):
        for start in range(0, len(each), batch_rows):
            portion = each[start : start + batch_rows]
            width = max(len(side.tokens) for row in portion for side in row.sides)
            batches.append(collate(portion, [number] * len(portion), pad_id, width))
    return batches


class Domain(NamedTuple):
    """Held-out text of one source."""

    batches: Sequence[Batch]
    num_bytes: int
    """Bytes that the predicted tokens stand for."""
    unigram_bits_per_byte: float
    """What a unigram model of the source's training tokens needs."""


def evaluate_bits_per_byte(
    model: nn.Module, objective: Objective, domains: Mapping[str, Domain], device: torch.device,
    metrics: Sequence[str] = (),
) -> Callable[[], Values]:  # fmt: skip
    """Compression of held-out text per domain, in bits per byte, so that tokenizers can be compared.

    The objective's loss is to be nats of the predicted tokens; of its `metrics`, the means are given as well.
    """

    def measure() -> Values:
        values: Values = {}
        for name, domain in domains.items():
            found = [objective(model, batch.to(device)) for batch in domain.batches]
            nats = sum(float(loss) for loss, _ in found)
            values[f"eval/{name}/bits_per_byte"] = nats / math.log(2) / domain.num_bytes
            values[f"eval/{name}/unigram_bits_per_byte"] = domain.unigram_bits_per_byte
            means = means_of((each for _, each in found), metrics)
            values |= {f"eval/{name}/{metric}": value for metric, value in means.items()}
        return values

    return measure


def unigram_bits(counts: Tensor, tokens: Tensor) -> float:
    """Bits that a unigram model with add-one smoothing needs for `tokens` [N]; `counts` [V]: of its training text."""
    logprobs = torch.log2((counts.double() + 1) / (counts.double().sum() + len(counts)))
    return -float(logprobs[tokens.flatten()].sum())


def build_problems(config: SftConfig | AlignConfig, tokenizer: Tokenizer, model: Replica, cache: Path) -> "Problems":
    """The held-out problems of `eval.problems`; none where it is not set."""
    rows: list[PromptRow] = []
    if config.eval.problems:
        length, longest = model.part.config.max_sequence_length, config.eval.max_new_tokens
        # an answer stands behind its prompt, where that is no source of its own
        is_source = model.part.config.architecture == "encoder_decoder"
        room = min(config.train.sequence_length, length if is_source else max(length - longest, length // 2))
        found = read_problems(config.eval.problems, config.eval.max_problems, cache)
        encoded = [encoded_prompt(tokenizer, problem, room, "cut") for problem in found]
        rows = [row for row in encoded if row is not None]
    return Problems(model, tokenizer, rows, config.eval.max_new_tokens)


class Problems:
    """Held-out problems with one right answer, answered greedily."""

    def __init__(
        self,
        model: Callable[[], LanguageModel],
        tokenizer: Tokenizer,
        problems: Sequence[PromptRow],
        max_new_tokens: int,
    ) -> None:
        self.model, self.tokenizer, self.problems, self.max_new_tokens = model, tokenizer, problems, max_new_tokens
        self.given: list[str] = []

    @property
    def evaluators(self) -> list[Callable[[], Values]]:
        """Itself, where there are problems."""
        return [self] if self.problems else []

    def __call__(self) -> Values:
        """The share of problems whose answer is right (`eval/exact_match`)."""
        tokens = generate(
            self.model(), [problem.tokens for problem in self.problems], max_new_tokens=self.max_new_tokens,
            stop_tokens=set(self.tokenizer.stop_ids), temperature=0.0, start_token=self.tokenizer.pad_id,
        )  # fmt: skip
        self.given = [self.tokenizer.decode(answer) for answer in tokens]
        right = [
            is_right(given, problem.answer or "") for given, problem in zip(self.given, self.problems, strict=True)
        ]
        return {"eval/exact_match": sum(right) / len(right)}

    def samples(self, count: int = 8) -> list[dict[str, str]]:
        """The first problems with the answers given last."""
        if not self.given and self.problems:
            self()
        rows = list(zip(self.problems, self.given, strict=True))[:count]
        return [{"prompt": each.text, "answer": given, "expected": each.answer or ""} for each, given in rows]


class BestOf:
    """Problems, or held-out prompts, answered several times, of which the best answer counts: best-of-n.

    What a policy and a reward come to without any training; a method that trains should do better than that of the
    model it starts from. Temperature and length are those of the method's rollouts.
    """

    def __init__(
        self, model: Callable[[], LanguageModel], tokenizer: Tokenizer, prompts: Sequence[PromptRow],
        reward: WeightedSum, settings: SampledAnswersConfig, count: int, seed: int,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.prompts = model, tokenizer, prompts
        self.reward, self.settings, self.count, self.seed = reward, settings, count, seed

    def __call__(self) -> Values:
        """The mean score of the best, `eval/best_of_<n>/reward`, and `eval/best_of_<n>/exact_match` where all prompts
        have a right answer."""
        rows, model = self.prompts, self.model()
        size = max(1, PORTION // self.count)
        best = [each for at in range(0, len(rows), size) for each in self._best(model, rows[at : at + size], at)]
        name, total = f"eval/best_of_{self.count}", float(len(best))
        values = {f"{name}/reward": sum(score for _, score in best) / total}
        if all(row.answer is not None for row in rows):
            right = [is_right(given, row.answer or "") for (given, _), row in zip(best, rows, strict=True)]
            values[f"{name}/exact_match"] = sum(right) / total
        return values

    def _best(self, model: LanguageModel, rows: Sequence[PromptRow], first: int) -> list[tuple[str, float]]:
        """The answer to each prompt that is best by final reward, and its score, which is of the kind of `eval/reward`;
        `first` is the number of the first prompt."""
        numbers = range(first * self.count, (first + len(rows)) * self.count)
        answers = answer(
            sampling_from(model), [row for row in rows for _ in range(self.count)], self.settings,
            stop_tokens=self.tokenizer.stop_ids, decode=self.tokenizer.decode,
            seeds=[derive_seed(self.seed, "best of", number) for number in numbers],
        )  # fmt: skip
        scores = self.reward(answers)
        best = best_rows(final_rewards(scores, answers, self.settings), self.count)
        return [(answers[row].text, scores[row]) for row in best.tolist()]


class HeldOutPrompts:
    """Held-out prompts, answered as in rollouts and judged: what a policy has learned for its reward, and beside it.

    Each prompt has draws of its own, the same at every measurement.
    """

    def __init__(
        self, model: Callable[[], LanguageModel], tokenizer: Tokenizer, prompts: Sequence[PromptRow],
        reward: WeightedSum, settings: SampledAnswersConfig, seed: int,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.prompts = model, tokenizer, prompts
        self.reward, self.settings, self.seed = reward, settings, seed

    @property
    def score(self) -> str:
        """The metric that ranks policies: what they learn from, so that one that never ends is not preferred."""
        return "eval/final_reward" if changes_scores(self.settings) else "eval/reward"

    def __call__(self) -> Values:
        """Means over answers: `eval/reward`, its parts as `eval/<name>/reward`, `eval/final_reward` where scores are
        clipped or an end token may be missed, `eval/answer_tokens` and the share that was cut off, `eval/unfinished`.
        """
        model, found = self.model(), defaultdict[str, list[float]](list)
        for first in range(0, len(self.prompts), PORTION):
            answers = self._answers(model, first, PORTION)
            components = self.reward.components(answers)
            scores = self.reward.total(components)
            found["eval/reward"] += scores
            if changes_scores(self.settings):
                found["eval/final_reward"] += final_rewards(scores, answers, self.settings).tolist()
            for name, values in components.items():
                found[f"eval/{name}/reward"] += values
            found["eval/answer_tokens"] += [float(len(each.tokens)) for each in answers]
            found["eval/unfinished"] += [float(not each.finished) for each in answers]
        return {name: sum(values) / len(values) for name, values in found.items()}

    def samples(self, count: int = 8) -> list[dict[str, str]]:
        """The first prompts, as the model reads them, and its answers of now."""
        answers = self._answers(self.model(), 0, count)
        asked = [self.tokenizer.decode(each.prompt_tokens, skip_special=False) for each in answers]
        return [{"prompt": prompt, "answer": each.text} for prompt, each in zip(asked, answers, strict=True)]

    def _answers(self, model: LanguageModel, first: int, count: int) -> list[Answer]:
        rows = self.prompts[first : first + count]
        seeds = [derive_seed(self.seed, "held-out prompt", first + number) for number in range(len(rows))]
        return answer(
            sampling_from(model), rows, self.settings, stop_tokens=self.tokenizer.stop_ids,
            decode=self.tokenizer.decode, seeds=seeds,
        )  # fmt: skip


PORTION = 256  # answers that are sampled and judged together
