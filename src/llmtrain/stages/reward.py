"""`llmtrain reward`: a Bradley-Terry reward model from preference pairs.

It starts from the policy that it will judge, with a new scalar head. When it has been trained, the mean and standard
deviation of its scores over the training answers are stored with the weights; whoever uses it gets scores of mean 0
and standard deviation 1, so that one KL coefficient means the same with every reward model.
"""

import torch
from torch import nn

from llmtrain.config.schema import RewardConfig
from llmtrain.data.batches import PairBatches, collate_pairs
from llmtrain.data.tokenizers import load_tokenizer
from llmtrain.engine.distributed import bare, spread
from llmtrain.models.heads import ScalarModel
from llmtrain.objectives.pairs import PairBatch, answer_scores
from llmtrain.objectives.reward import BradleyTerry
from llmtrain.stages import assembly, handover
from llmtrain.stages.assembly import Run
from llmtrain.stages.evaluators import evaluate_objective, held_out_batches
from llmtrain.stages.pairs import build_pairs
from llmtrain.stages.planning import row_digests

# The scores of this many training answers give their mean and standard deviation.
REFERENCE_PAIRS = 512


def run(config: RewardConfig) -> None:
    """Train, or go on training."""
    assembly.start(stage, config)


def stage(config: RewardConfig) -> None:
    """Build, build, build, fit."""
    run = Run.open(config)
    folder = assembly.parent(config)
    tokenizer = load_tokenizer(handover.model_folder(folder))
    policy = assembly.load_policy(folder)
    length = assembly.fitting_length(config, policy)
    rows, held_out = build_pairs(run, policy, tokenizer, length)
    trained = ScalarModel.from_language_model(policy, torch.Generator().manual_seed(config.seed))
    model = spread(trained, run.layout, config.engine.sharding)

    said = row_digests(config.data, rows)
    plan = run.plan(config.data, {name: len(each) for name, each in rows.items()}, said)
    batches = PairBatches(
        rows, plan.order(config.seed), max_length=length,
        pad_id=tokenizer.pad_id, rank=run.layout.rank, world=run.layout.world,
    )  # fmt: skip
    run.say(f"{plan.steps} steps over {sum(map(len, rows.values())):,} pairs in {len(rows)} sources")

    measure = evaluate_objective(
        bare(model), BradleyTerry(), held_out_batches(held_out, collate_pairs, tokenizer.pad_id), run.layout.device,
        ["loss", "accuracy", "margin"], names={"accuracy": "pair_accuracy"},
    )  # fmt: skip
    run.fit(
        model=model, trained=trained, batches=batches, objective=BradleyTerry(), tokenizer=tokenizer, plan=plan,
        evaluators=[measure],
    )  # fmt: skip
    reference = held_out_batches(
        {name: each[:REFERENCE_PAIRS] for name, each in rows.items()}, collate_pairs, tokenizer.pad_id
    )
    with run.autocast():
        store_statistics(trained, bare(model), reference, run.layout.device)
    run.finish(trained, tokenizer, data=said, plan=plan)


@torch.no_grad()
def store_statistics(trained: ScalarModel, model: nn.Module, batches: list[PairBatch], device: torch.device) -> None:
    """Set `score_mean` and `score_std` to those of the raw scores of both answers of some pairs."""
    model.eval()
    scores = []
    for batch in batches:
        tokens, mask = batch.to(device).rows()
        scores.append(answer_scores(model(tokens), mask).double())
    every = torch.cat(scores)
    trained.score_mean.fill_(every.mean())
    trained.score_std.fill_(every.std(correction=0).clamp(min=1e-6))
