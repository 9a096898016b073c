"""`llmtrain align` with a method that learns from pairs of answers."""

import inspect
from functools import partial

from llmtrain.config.schema import AlignConfig, PairMethod
from llmtrain.data.batches import PairBatches, collate_pairs
from llmtrain.data.tokenizers import Tokenizer
from llmtrain.engine.distributed import bare, spread
from llmtrain.generation.engines import Replica
from llmtrain.models.heads import LanguageModel
from llmtrain.objectives.preference import LOSSES, OnTheFly, Preference, Reference, precomputed
from llmtrain.stages import starts
from llmtrain.stages.assembly import Run
from llmtrain.stages.evaluators import build_problems, evaluate_objective, held_out_batches
from llmtrain.stages.pairs import build_pairs
from llmtrain.stages.planning import row_digests
from llmtrain.stages.reference import Precomputed


def align(run: Run[AlignConfig], method: PairMethod, policy: LanguageModel, tokenizer: Tokenizer) -> None:
    """Pairs in, no sampling; a reference beside the policy where the method asks for one."""
    config, length = run.config, starts.fitting_length(run.config, policy)
    rows, held_out = build_pairs(run, policy, tokenizer, length)
    reference: Reference | None = None
    if method.reference == "precomputed":
        known = Precomputed(run, policy, collate_pairs, tokenizer.pad_id)
        rows, held_out, reference = known(rows), known(held_out), precomputed
    model = spread(run.adapt(policy), run.layout)
    if method.reference == "on_the_fly":
        reference = OnTheFly(starts.load_reference(run, model))
    objective = build_objective(method, reference)
    said = row_digests(config.data, rows)
    plan = run.plan(config.data, {name: len(each) for name, each in rows.items()}, said)
    batches = PairBatches(
        rows, plan.order(config.seed), max_length=length,
        pad_id=tokenizer.pad_id, rank=run.layout.data_rank, world=run.layout.data_world,
    )  # fmt: skip
    run.say(f"{method.name}: {plan.steps} steps over {sum(map(len, rows.values())):,} pairs in {len(rows)} sources")
    measure = evaluate_objective(
        bare(model), objective, held_out_batches(held_out, collate_pairs, tokenizer.pad_id), run.layout.device,
        ["loss", "accuracy", "margin", *(["log_ratio"] if reference else [])], names={"accuracy": "pair_accuracy"},
    )  # fmt: skip
    problems = build_problems(config, tokenizer, Replica(policy), run.cache)
    run.write_samples("before", problems.samples)
    run.fit(
        model=model, trained=policy, batches=batches, objective=objective, tokenizer=tokenizer, plan=plan,
        evaluators=[measure, *problems.evaluators],
    )  # fmt: skip
    run.write_samples("after", problems.samples)
    run.finish(policy, tokenizer, data=said, plan=plan)


def build_objective(method: PairMethod, reference: Reference | None) -> Preference:
    """A method's objective: the keyword arguments of its loss are the method's keys of the same names."""
    loss = LOSSES[method.name]
    parameters = inspect.signature(loss).parameters.values()
    options = {each.name: getattr(method, each.name) for each in parameters if each.kind is each.KEYWORD_ONLY}
    return Preference(
        partial(loss, **options), reference, beta=method.beta,
        length_normalised=method.length_normalised, sft_weight=method.sft_weight,
    )  # fmt: skip
