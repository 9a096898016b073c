"""`llmtrain align` with a method that learns from pairs of answers."""

from llmtrain.config.schema import AlignConfig, DpoConfig
from llmtrain.data.batches import PairBatches, collate_pairs
from llmtrain.data.tokenizers import Tokenizer
from llmtrain.engine.distributed import bare, spread
from llmtrain.generation.rollouts import Replica
from llmtrain.models.heads import LanguageModel
from llmtrain.objectives.preference import Dpo
from llmtrain.stages import assembly
from llmtrain.stages.assembly import Run
from llmtrain.stages.evaluators import build_problems, evaluate_objective, held_out_batches
from llmtrain.stages.pairs import build_pairs
from llmtrain.stages.planning import row_digests


def dpo(
    run: Run[AlignConfig], method: DpoConfig, policy: LanguageModel, reference: LanguageModel, tokenizer: Tokenizer
) -> None:
    """Direct preference optimisation: pairs in, no sampling."""
    config, length = run.config, assembly.fitting_length(run.config, policy)
    rows, held_out = build_pairs(run, reference, tokenizer, length)
    model = spread(policy, run.layout, config.engine.sharding)
    objective = Dpo(reference, method.beta, method.label_smoothing, method.sft_weight)
    said = row_digests(config.data, rows)
    plan = run.plan(config.data, {name: len(each) for name, each in rows.items()}, said)
    batches = PairBatches(
        rows, plan.order(config.seed), max_length=length,
        pad_id=tokenizer.pad_id, rank=run.layout.rank, world=run.layout.world,
    )  # fmt: skip
    run.say(f"dpo: {plan.steps} steps over {sum(map(len, rows.values())):,} pairs in {len(rows)} sources")
    measure = evaluate_objective(
        bare(model), objective, held_out_batches(held_out, collate_pairs, tokenizer.pad_id), run.layout.device,
        ["loss", "accuracy", "margin", "kl"], names={"accuracy": "pair_accuracy"},
    )  # fmt: skip
    problems = build_problems(config, tokenizer, Replica(policy), run.cache)
    run.write_samples("before", problems.samples)
    run.fit(
        model=model, trained=policy, batches=batches, objective=objective, tokenizer=tokenizer, plan=plan,
        evaluators=[measure, *problems.evaluators],
    )  # fmt: skip
    run.write_samples("after", problems.samples)
    run.finish(policy, tokenizer, data=said, plan=plan)
