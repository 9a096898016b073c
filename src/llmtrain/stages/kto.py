"""`llmtrain align method=kto`: a policy learns from answers of which each is good or not.

The loss holds a log-ratio against an estimate of the KL divergence, the mean over all mismatched answers of the step's
batch. That mean is taken before the step's update, over all micro-batches and processes, so neither changes it.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from llmtrain.config.schema import AlignConfig, KtoConfig
from llmtrain.data.batches import AnswerBatches, collate_answers
from llmtrain.data.encoding import AnswerRow, load_judged, with_mismatches
from llmtrain.data.records import Split
from llmtrain.data.tokenizers import Tokenizer
from llmtrain.engine.distributed import Layout, bare, spread, total
from llmtrain.generation.engines import Replica
from llmtrain.models.heads import LanguageModel
from llmtrain.objectives.kto import AnswerBatch, Kto, mismatched_ratios
from llmtrain.objectives.pairs import answer_logprobs
from llmtrain.stages import starts
from llmtrain.stages.assembly import Run
from llmtrain.stages.evaluators import build_problems, evaluate_objective, held_out_batches
from llmtrain.stages.planning import row_digests
from llmtrain.stages.reference import Precomputed


def align(run: Run[AlignConfig], method: KtoConfig, policy: LanguageModel, tokenizer: Tokenizer) -> None:
    """Judged answers in, no sampling."""
    config, length = run.config, starts.fitting_length(run.config, policy)
    rows, held_out = (build_answers(run, tokenizer, split, length) for split in ("train", "validation"))
    reference = None
    if method.reference == "precomputed":
        known = Precomputed(run, policy, collate_answers, tokenizer.pad_id)
        rows, held_out = known(rows), known(held_out)
    model = spread(run.adapt(policy), run.layout)
    if method.reference == "on_the_fly":
        reference = starts.load_reference(run, model)
    said = row_digests(config.data, rows)
    plan = run.plan(config.data, {name: len(each) for name, each in rows.items()}, said)
    answers = AnswerBatches(
        rows, plan.order(config.seed), max_length=length,
        pad_id=tokenizer.pad_id, rank=run.layout.data_rank, world=run.layout.data_world,
    )  # fmt: skip
    baseline = Baseline(
        batches=answers, counts=answers.counts, model=model, reference=reference, layout=run.layout,
        micro_batch_rows=config.train.given_micro_batch_rows, autocast=run.autocast,
    )  # fmt: skip
    good = sum(row.desirable for each in rows.values() for row in each)
    number = sum(map(len, rows.values()))
    run.say(f"kto: {plan.steps} steps over {number:,} answers, {good:,} of them good, in {len(rows)} sources")
    objective = Kto(
        beta=method.beta, desirable_weight=method.desirable_weight, undesirable_weight=method.undesirable_weight
    )
    held_out_answers = held_out_batches(held_out, collate_answers, tokenizer.pad_id)
    measure = evaluate_objective(
        bare(model), objective, [baseline.with_reference(batch) for batch in held_out_answers], run.layout.device,
        ["loss", "accuracy", "log_ratio"], names={"accuracy": "answer_accuracy"},
    )  # fmt: skip
    problems = build_problems(config, tokenizer, Replica(policy), run.cache)
    run.write_samples("before", problems.samples)
    run.fit(
        model=model, trained=policy, batches=baseline, objective=objective, tokenizer=tokenizer, plan=plan,
        evaluators=[measure, *problems.evaluators],
    )  # fmt: skip
    run.write_samples("after", problems.samples)
    run.finish(policy, tokenizer, data=said, plan=plan)


def build_answers(
    run: Run[AlignConfig], tokenizer: Tokenizer, split: Split, length: int
) -> dict[str, list[AnswerRow]]:  # fmt: skip
    """Judged answers by source, each beside a mismatched one."""
    config = run.config
    judged = run.main_first(
        lambda: load_judged(
            config.data, tokenizer, split=split, max_length=length, cache_dir=run.cache,
            limit=config.eval.max_rows if split == "validation" else None,
        )
    )  # fmt: skip
    return with_mismatches(judged, length, split)


@dataclasses.dataclass(kw_only=True)
class Baseline:
    """KTO's batch source: the answers of a step, with the baseline of the policy as it stands."""

    batches: Callable[[int], AnswerBatch]
    counts: Callable[[int], dict[str, float]]
    """Step → what the steps before it have consumed, by source."""
    model: nn.Module
    """The policy as spread over the processes."""
    reference: nn.Module | None
    """None where the batches know its log-probabilities."""
    layout: Layout
    micro_batch_rows: int | None
    autocast: Callable[[], torch.autocast]

    @torch.no_grad()
    def __call__(self, step: int) -> AnswerBatch:
        """This process's answers of the step."""
        batch = self.with_reference(self.batches(step))
        with self.autocast():
            ratios = [mismatched_ratios(self.model, part) for part in batch.micro_batches(self.micro_batch_rows)]
        every = torch.cat(ratios)
        mean = total(every.sum(), self.layout) / total(every.new_tensor(float(len(every))), self.layout)
        return dataclasses.replace(batch, baseline=mean.clamp(min=0).expand(len(every)))

    @torch.no_grad()
    def with_reference(self, batch: AnswerBatch) -> AnswerBatch:
        """The batch on this process's device, with the reference's log-probabilities."""
        batch = batch.to(self.layout.device)
        if self.reference is None:
            return batch
        with self.autocast():
            found = [
                answer_logprobs(self.reference, *part.rows()).view(2, -1).T
                for part in batch.micro_batches(self.micro_batch_rows)
            ]
        return dataclasses.replace(batch, reference=torch.cat(found))
