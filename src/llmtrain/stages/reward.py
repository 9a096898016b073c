"""`llmtrain reward`: a Bradley-Terry reward model from preference pairs and rankings.

It starts from the policy that it will judge, with a new scalar head. When it has been trained, the mean and standard
deviation of its scores over the training answers are stored with the weights; whoever uses it gets scores of mean 0
and standard deviation 1, so that one KL coefficient means the same with every reward model.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from llmtrain.config.schema import RewardConfig
from llmtrain.data.encoding import RankingRow
from llmtrain.data.rankings import RankingBatches, collate_rankings
from llmtrain.data.tokenizers import load_tokenizer
from llmtrain.engine.distributed import bare, spread
from llmtrain.models.heads import ScalarModel
from llmtrain.objectives.batch import Batch, Metrics
from llmtrain.objectives.pairs import answer_scores
from llmtrain.objectives.rankings import RankingBatch, ranking_scores
from llmtrain.objectives.reward import BradleyTerry, calibration_error, correlation
from llmtrain.stages import assembly, handover, starts
from llmtrain.stages.assembly import Run
from llmtrain.stages.evaluators import Values, held_out_batches, means_of
from llmtrain.stages.pairs import build_rankings
from llmtrain.stages.planning import row_digests

# The scores of the answers of at most so many training rows of each source give mean and standard deviation.
REFERENCE_ROWS = 512


def run(config: RewardConfig) -> None:
    """Train, or go on training."""
    assembly.start(stage, config)


def stage(config: RewardConfig) -> None:
    """Build, build, build, fit."""
    run = Run.open(config)
    folder = handover.parent(config)
    tokenizer = load_tokenizer(handover.model_folder(folder))
    policy = starts.load_decoder(config)
    length = starts.fitting_length(config, policy)
    rows, held_out = build_rankings(run, policy, tokenizer, length)
    trained = ScalarModel.from_language_model(policy, torch.Generator().manual_seed(config.seed))
    model = spread(run.adapt(trained), run.layout)

    said = row_digests(config.data, rows)
    plan = run.plan(config.data, {name: len(each) for name, each in rows.items()}, said)
    batches = RankingBatches(
        rows, plan.order(config.seed), max_length=length,
        pad_id=tokenizer.pad_id, rank=run.layout.data_rank, world=run.layout.data_world,
    )  # fmt: skip
    run.say(f"{plan.steps} steps over {described(rows)} in {len(rows)} sources")
    objective = BradleyTerry(config.objective.margin_weight, config.objective.centring_weight)
    measured = held_out_batches(held_out, collate_rankings, tokenizer.pad_id)
    run.fit(
        model=model, trained=trained, batches=batches, objective=objective, tokenizer=tokenizer, plan=plan,
        evaluators=[evaluate_rankings(bare(model), objective, measured, list(held_out), run.layout.device)],
    )  # fmt: skip
    reference = held_out_batches(
        {name: spread_out(each, REFERENCE_ROWS) for name, each in rows.items()}, collate_rankings, tokenizer.pad_id
    )
    with run.autocast():
        store_statistics(trained, bare(model), reference, run.layout.device)
    run.finish(trained, tokenizer, data=said, plan=plan)


def spread_out(rows: Sequence[RankingRow], most: int) -> Sequence[RankingRow]:
    """At most so many rows, as far apart as can be: a file may be sorted."""
    return rows[:: max(1, -(-len(rows) // most))]


def described(rows: Mapping[str, Sequence[RankingRow]]) -> str:
    """How many pairs there are, and rankings where these are more than pairs."""
    every = [row for each in rows.values() for row in each]
    pairs = sum(len(row.better) for row in every)
    return f"{pairs:,} pairs" if pairs == len(every) else f"{pairs:,} pairs of {len(every):,} rankings"


def evaluate_rankings(
    model: nn.Module, objective: BradleyTerry, batches: Sequence[Batch], sources: Sequence[str], device: torch.device
) -> Callable[[], Values]:
    """An evaluator of a reward model on held-out rankings; `sources` are the names by number.

    `eval/loss`, `eval/pair_accuracy` and `eval/margin` are over all rankings. Over the pairs of each source:
    `eval/<source>/pair_accuracy` and `eval/<source>/calibration_error`; over its answers `eval/<source>/
    length_correlation` of score and tokens, which tells of a model that likes length.
    """

    def measure() -> Values:
        found: list[Metrics] = []
        leads, scored, lengths = (defaultdict[str, list[Tensor]](list) for _ in range(3))
        for batch in batches:
            batch = batch.to(device)
            assert isinstance(batch, RankingBatch)
            scores = ranking_scores(model, batch)
            found.append(objective.loss(scores, batch)[1])
            name, there = sources[int(batch.source[0])], batch.there.T
            leads[name].append((scores[:, :, None] - scores[:, None, :])[batch.better].cpu())
            scored[name].append(scores[there].cpu())
            lengths[name].append(batch.mask.sum(dim=2)[there].cpu())
        means = means_of(found, ["loss", "accuracy", "margin"])
        values = {f"eval/{'pair_accuracy' if name == 'accuracy' else name}": mean for name, mean in means.items()}
        for name in leads:
            lead = torch.cat(leads[name])
            values[f"eval/{name}/pair_accuracy"] = float((lead > 0).double().mean())
            values[f"eval/{name}/calibration_error"] = calibration_error(lead)
            found_correlation = correlation(torch.cat(scored[name]), torch.cat(lengths[name]))
            if found_correlation is not None:
                values[f"eval/{name}/length_correlation"] = found_correlation
        return values

    return measure


@torch.no_grad()
def store_statistics(trained: ScalarModel, model: nn.Module, batches: Sequence[Batch], device: torch.device) -> None:
    """Set `score_mean` and `score_std` to those of the raw scores of all answers of some rankings."""
    model.eval()
    scores = []
    for batch in batches:
        assert isinstance(batch, RankingBatch)
        tokens, mask = batch.to(device).rows()
        scores.append(answer_scores(model(tokens), mask).double())
    every = torch.cat(scores)
    trained.score_mean.fill_(every.mean())
    trained.score_std.fill_(every.std(correction=0).clamp(min=1e-6))
