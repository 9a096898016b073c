"""The same global batch gives the same gradient, however it is cut into micro-batches and processes.

One run of two processes goes through all cases; process 0 also computes the plain gradient of the whole batch.
"""

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmtrain.config.schema import (
    CheckpointConfig,
    CpoConfig,
    DpoConfig,
    EngineConfig,
    EvalConfig,
    ExpertsConfig,
    HingeConfig,
    IpoConfig,
    ModelConfig,
    MupInitConfig,
    OrpoConfig,
    PpoConfig,
    RobustConfig,
    SampledAnswersConfig,
    SimpoConfig,
    TrackerConfig,
)
from llmtrain.data.batches import share
from llmtrain.data.encoding import PromptRow
from llmtrain.engine.distributed import Layout, arrange, bare, join, leave, spread, total
from llmtrain.engine.launching import launch
from llmtrain.engine.speed import Speed
from llmtrain.engine.steps import nothing_adapts
from llmtrain.engine.tracking import Tracker
from llmtrain.engine.trainer import Trainer
from llmtrain.generation.engines import OwnEngine
from llmtrain.generation.estimators import AnswerEstimator, PpoEstimator
from llmtrain.generation.rollouts import Rollouts
from llmtrain.generation.selection import best_and_worst, best_answers
from llmtrain.models.experts import expert_layers
from llmtrain.models.heads import ActorCritic, LanguageModel, ScalarModel, SharedActorCritic, make_model
from llmtrain.models.mup import at_width
from llmtrain.objectives.advantages import batch_advantages, group_advantages, leave_one_out_advantages
from llmtrain.objectives.batch import Batch
from llmtrain.objectives.kl import AdaptiveKL
from llmtrain.objectives.kto import AnswerBatch, Kto, mismatched_ratios
from llmtrain.objectives.masked import MaskedBatch, MaskedTokens
from llmtrain.objectives.next_token import NextToken, TokenBatch
from llmtrain.objectives.pairs import PairBatch, answer_logprobs
from llmtrain.objectives.policy_gradient import Grpo, Reinforce, policy_logprobs
from llmtrain.objectives.ppo import Ppo, policy_and_values
from llmtrain.objectives.preference import OnTheFly
from llmtrain.objectives.rankings import RankingBatch
from llmtrain.objectives.reward import BradleyTerry
from llmtrain.objectives.routing import Routed
from llmtrain.objectives.sequence_to_sequence import SequencePairBatch, SequenceToSequence
from llmtrain.objectives.trajectories import JudgedAnswers, Rollout, Trajectory, rows_of_process
from llmtrain.rewards.models import LearnedReward
from llmtrain.rewards.sums import WeightedSum
from llmtrain.stages.kto import Baseline
from llmtrain.stages.preference import build_objective

VOCAB, ROWS, WIDTH = 61, 8, 32
LENGTHS = [32, 3, 17, 2, 5, 31, 4, 9]
MICRO_BATCHES = (1, 2, 4, None)
LAYOUTS = ("1", "2 ddp", "2 fsdp")
PREFERENCE = {
    "dpo": DpoConfig(sft_weight=0.2), "length_normalised": DpoConfig(length_normalised=True), "ipo": IpoConfig(),
    "hinge": HingeConfig(), "robust": RobustConfig(), "orpo": OrpoConfig(), "simpo": SimpoConfig(), "cpo": CpoConfig(),
}  # fmt: skip
TEXT = ("next_token", "sft", "packed", "prefix", "masked", "two segments", "sequence to sequence")
OBJECTIVES = (
    *TEXT, "mup", "bradley_terry", "rankings", *PREFERENCE, "kto", "ppo", "shared ppo", "grpo",
    "token grpo", "reinforce",
    *(f"experts {name}" for name in ("next_token", "sft", "packed", "rankings", "dpo", "kto", "ppo", "grpo")),
    *(f"experts {name}" for name in ("masked", "two segments", "sequence to sequence")),
)  # fmt: skip
METHODS = ("ppo", "shared ppo", "grpo", "rloo", "reinforce", "online_dpo", "rejection_sampling")
GROUPED = ("grpo", "rloo", "online_dpo", "rejection_sampling")
CONFIG = ModelConfig(num_layers=2, hidden_size=32, num_heads=2, num_kv_heads=1, max_sequence_length=64)
MUP = dataclasses.replace(CONFIG, init=MupInitConfig(base_hidden_size=8, base_head_dim=4))
EXPERTS = dataclasses.replace(
    CONFIG, experts=ExpertsConfig(
        num_experts=4, shared_experts=1, ffn_hidden_size=32, first_layer=1, capacity_factor=0.9,
        capacity_group_tokens=8, balance_loss=0.3, z_loss=0.1, balance_bias_rate=0.2,
    ),
)  # fmt: skip
ENCODER = dataclasses.replace(CONFIG, architecture="encoder", mlm_head=True)
ARCHITECTURES = {
    "masked": ENCODER, "two segments": dataclasses.replace(ENCODER, pooler=True, num_segments=2),
    "sequence to sequence": dataclasses.replace(CONFIG, architecture="encoder_decoder", positions="relative"),
}  # fmt: skip
ALONE = Layout(rank=0, world=1, device=torch.device("cpu"))
PPO = PpoConfig(epochs=2, minibatches=2, max_new_tokens=12)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every figure of the run of two processes."""
    path = tmp_path_factory.mktemp("gradients") / "figures.json"
    launch(measure, (path,), 2)
    figures: dict[str, Any] = json.loads(path.read_text())
    return figures


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_is_that_of_the_whole_batch(objective: str, layout: str, measured: dict[str, Any]) -> None:
    for micro in MICRO_BATCHES:
        assert measured["gradients"][f"{objective}/{layout}/{micro}"] <= 1e-5, f"micro-batches of {micro}"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_a_rollout_does_not_depend_on_the_processes(layout: str, method: str, measured: dict[str, Any]) -> None:
    found = measured["rollout"][f"{method}/{layout}"]
    assert found.pop("same rows")
    assert found.pop("largest difference") < 1e-5


@pytest.mark.parametrize("method", ["ppo", "shared ppo", "grpo", "rloo", "reinforce"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_first_update_of_a_rollout_has_ratio_one_and_no_kl(layout: str, method: str, measured: dict[str, Any]) -> None:
    for micro in MICRO_BATCHES:
        figures = measured["first update"][f"{method}/{layout}/{micro}"]
        assert figures == {
            "ratio": 1.0, "ratio_max": 1.0, "ratio_min": 1.0, "approx_kl": 0.0, "clip_fraction": 0.0,
            "largest logprob difference": 0.0,
        }  # fmt: skip


def measure(path: Path) -> None:
    """In each of two processes: all cases; process 0 writes the figures."""
    everywhere = places(join("cpu", threads=1))
    gradients, rollout, first = {}, {}, {}
    for name in OBJECTIVES:
        expected = plain_gradients(name)
        for place, where in everywhere:
            for micro in MICRO_BATCHES:
                found = trained_gradients(name, place, micro)
                gradients[f"{name}/{where}/{micro}"] = max(map(relative_error, found, expected))
    for name in METHODS:
        for place, where in everywhere:
            rollout[f"{name}/{where}"] = rollout_differences(name, place)
            for micro in MICRO_BATCHES if "_" not in name else ():
                first[f"{name}/{where}/{micro}"] = first_update(name, place, micro)
    if everywhere[-1][0].is_main:
        path.write_text(json.dumps({"gradients": gradients, "rollout": rollout, "first update": first}))
    leave()


def places(layout: Layout) -> list[tuple[Layout, str]]:
    """Alone (both processes do the same), replicated, sharded."""
    return [(ALONE, "1"), *((arrange(layout, EngineConfig(sharding=each)), f"2 {each}") for each in ("ddp", "fsdp"))]


def language_model(seed: int, config: ModelConfig = CONFIG) -> LanguageModel:
    model = make_model(config, VOCAB).initialise(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in model.parameters():  # away from the start, where answers are all alike
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    return model


def actor_critic(config: ModelConfig) -> ActorCritic:
    value = ScalarModel.from_language_model(language_model(3, config), torch.Generator().manual_seed(4))
    value.score_mean.fill_(0.3)
    value.score_std.fill_(0.7)
    return ActorCritic(language_model(1, config), value)


def shared_actor_critic() -> SharedActorCritic:
    trained = SharedActorCritic(language_model(1))
    nn.init.normal_(trained.value.weight, generator=torch.Generator().manual_seed(4))
    return trained


def build(name: str) -> tuple[nn.Module, Any]:
    """A model and its objective."""
    kind = name.removeprefix("experts ")
    return build_of(kind, CONFIG if kind == name else EXPERTS)


def build_of(name: str, config: ModelConfig) -> tuple[nn.Module, Any]:
    """A model of this architecture, and the objective of this name."""
    if name.endswith("ppo"):
        return (actor_critic(config) if name == "ppo" else shared_actor_critic()), Ppo()
    if name.endswith("grpo"):
        return language_model(1, config), Grpo(loss_average="token" if name == "token grpo" else "sequence")
    if name in ("rloo", "reinforce"):
        return language_model(1), Reinforce()
    if name == "mup":
        return language_model(1, at_width(MUP)), NextToken(z_loss=1e-3)
    if name in ("bradley_terry", "rankings"):
        objective = BradleyTerry(margin_weight=0.5, centring_weight=0.1) if name == "rankings" else BradleyTerry()
        return ScalarModel.from_language_model(language_model(1, config), torch.Generator().manual_seed(2)), objective
    if name in PREFERENCE:
        method = PREFERENCE[name]
        reference = OnTheFly(language_model(2).eval()) if method.reference else None
        return language_model(1, config), build_objective(method, reference)
    if name == "kto":
        return language_model(1, config), Kto(beta=0.5, undesirable_weight=1.5)
    kind = {"sequence to sequence": SequenceToSequence, "masked": MaskedTokens, "two segments": MaskedTokens}
    objective = kind.get(name, NextToken)(z_loss=1e-3, label_smoothing=0.1 if name in ARCHITECTURES else 0.0)
    architecture = dataclasses.replace(ARCHITECTURES.get(name, config), experts=config.experts)
    return language_model(1, architecture), objective


def routed(model: nn.Module, objective: Any, layout: Layout) -> Any:
    """The objective with the auxiliary losses of the model's experts, if it has any."""
    layers = expert_layers(model)
    return Routed(objective, layers, partial(total, layout=layout), layout.device) if layers else objective


def global_batch(name: str) -> Batch:
    """Eight rows of very different lengths; nearly all that is to be learnt stands in a few of them."""
    name = name.removeprefix("experts ")
    draw = torch.Generator().manual_seed(7)
    lengths = torch.tensor(LENGTHS)
    inside = torch.arange(WIDTH) < lengths[:, None]
    tokens, others = (torch.randint(1, VOCAB, (ROWS, WIDTH), generator=draw) * inside for _ in range(2))
    mask = inside & (
        torch.arange(WIDTH) >= (1 if name in ("next_token", "mup") else (lengths[:, None] // 2).clamp(min=1))
    )
    source = torch.arange(ROWS) % 2
    if (
        name == "packed"
    ):  # each row full, of documents of its own lengths; row by row as many tokens as above are learnt
        borders = torch.rand(ROWS, WIDTH, generator=draw) < 0.2
        borders[:, 0] = False
        documents, mask = borders.cumsum(dim=1).int(), mask & ~borders
        return TokenBatch(tokens=tokens, loss_mask=mask, source=source, documents=documents)
    if name in ("next_token", "mup", "sft"):
        return TokenBatch(tokens=tokens, loss_mask=mask, source=source)
    if name == "prefix":
        prefix = torch.arange(WIDTH) < (lengths[:, None] // 2).clamp(min=1)
        return TokenBatch(tokens=tokens, loss_mask=mask & ~prefix, source=source, prefix=prefix)
    if name in ("masked", "two segments"):
        return masked_batch(tokens, others, inside, source, name == "two segments")
    if name == "sequence to sequence":
        shorter = (lengths.flip(0) // 2).clamp(min=1)
        targets, counts = others[:, : WIDTH // 2], torch.arange(WIDTH // 2) < shorter[:, None]
        return SequencePairBatch(
            inputs=tokens, tokens=targets.roll(1, dims=1), targets=targets, loss_mask=counts, source=source,
            input_lengths=lengths,
        )  # fmt: skip
    if name.endswith(("grpo", "reinforce")):
        # the two rows of a group begin alike, as far as the second one's answer; some prompts outlast the first row
        answers_begin = mask.long().argmax(dim=1, keepdim=True)
        alike = (torch.arange(WIDTH) < answers_begin) & (torch.arange(ROWS) % 2 == 1)[:, None]
        tokens = torch.where(alike, tokens.roll(1, dims=0), tokens)
        logprobs, reference = torch.randn(2, ROWS, WIDTH - 1, generator=draw) * mask[:, 1:]
        return JudgedAnswers(
            tokens=tokens, response_mask=mask, logprobs=(logprobs - 4) * mask[:, 1:],
            reference_logprobs=(reference - 4) * mask[:, 1:], advantages=torch.randn(ROWS, generator=draw),
            group_rows=2, epochs=2, minibatches=2, first_slot=0, seed=5, step=3,
        )  # fmt: skip
    if name.endswith("ppo"):
        logprobs, values, advantages, returns = torch.randn(4, ROWS, WIDTH - 1, generator=draw) * mask[:, 1:]
        return Trajectory(
            tokens=tokens, response_mask=mask, logprobs=logprobs - 4, values=values, advantages=advantages,
            returns=returns, epochs=2, minibatches=2, first_slot=0, seed=5, step=3,
        )  # fmt: skip
    if name == "kto":
        return AnswerBatch(
            answers=tokens, mismatched=others, answers_mask=mask, mismatched_mask=mask, desirable=source == 0,
            source=source,
        )  # fmt: skip
    if name == "bradley_terry":
        return ranking_batch([tokens, others], [mask, mask], [2] * ROWS, source)
    if name == "rankings":  # of two to four answers
        return ranking_batch(
            [tokens, others, tokens.flip(0), others.flip(0)],
            [mask, mask, *[mask.flip(0)] * 2],
            [2, 4, 3, 2, 4, 2, 3, 4],
            source,
        )
    return PairBatch(chosen=tokens, rejected=others, chosen_mask=mask, rejected_mask=mask, source=source)


def masked_batch(tokens: Tensor, others: Tensor, inside: Tensor, source: Tensor, labels: bool) -> MaskedBatch:
    """A seventh of each row predicted, padding apart."""
    places = torch.arange(0, WIDTH, 7).repeat(ROWS, 1)
    return MaskedBatch(
        tokens=tokens, places=places, targets=others.gather(1, places), loss_mask=inside.gather(1, places),
        source=source, documents=(~inside).int(), segments=(torch.arange(WIDTH) > 9).long().repeat(ROWS, 1) if labels
        else None, lengths=inside.sum(dim=1), is_other=(torch.arange(ROWS) % 3 == 0).long() if labels else None,
    )  # fmt: skip


def ranking_batch(answers: list[Tensor], masks: list[Tensor], counts: list[int], source: Tensor) -> RankingBatch:
    """Rankings of the first `counts` of these answers [B, S], each better than the next."""
    tokens, mask = torch.stack(answers, dim=1), torch.stack(masks, dim=1)
    size = len(answers)
    there = torch.arange(size) < torch.tensor(counts)[:, None]
    better = torch.ones(size, size, dtype=torch.bool).triu(1) & there[:, :, None] & there[:, None, :]
    margins = torch.arange(1.0, ROWS + 1)[:, None, None] * better
    return RankingBatch(tokens=tokens, mask=mask & there[:, :, None], better=better, margins=margins, source=source)


def own_rows(batch: Batch, layout: Layout) -> Batch:
    """A process's part of the global batch, as the batch sources cut it."""
    if isinstance(batch, Rollout):
        mine = batch[rows_of_process(layout.data_rank, layout.data_world, ROWS, batch.minibatches, batch.group_rows)]
        slots = ROWS // batch.group_rows // batch.minibatches
        return dataclasses.replace(mine, first_slot=layout.data_rank * slots // layout.data_world)
    return batch[share(ROWS, layout.data_rank, layout.data_world)]


def plain_gradients(name: str) -> list[dict[str, Tensor]]:
    """The gradient of each update of the whole batch, by no part of the engine, in double precision."""
    model, objective = build(name)
    model.double()
    batch = global_batch(name)
    if getattr(objective, "reference", None):
        objective.reference.model.double()
    if isinstance(batch, AnswerBatch):
        with torch.no_grad():
            reference = answer_logprobs(language_model(9).double(), *batch.rows()).view(2, -1).T
        batch = dataclasses.replace(batch, reference=reference)
        assert mismatched_ratios(model, batch).mean() > 0, "a baseline that is cut off shows nothing"
    found, objective = [], routed(model, objective, ALONE)
    for update in batch.updates():
        model.zero_grad()
        (objective(Separately(model), update)[0] / objective.weight(update)).sum().backward()
        found.append({key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None})
        if isinstance(objective, Routed):
            objective.after_update()
    found[-1] |= biases(model)
    return found


def biases(model: nn.Module) -> dict[str, Tensor]:
    """What routers have adapted to, by name; what they had before the last update shows in its gradient."""
    return {key: value.clone() for key, value in model.named_buffers() if key.endswith("router.bias")}


class Separately(nn.Module):
    """A model that computes every position of every row, whatever they share."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, same_as: Tensor | None = None, **options: Any) -> Any:
        return self.model(tokens, **options)


class Recorder(torch.optim.SGD):
    """An optimizer that notes the gradients and changes nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.0)
        self.model = bare(model)
        self.seen: list[dict[str, Tensor]] = []

    def step(self, closure: Any = None) -> None:
        whole = {
            name: value.grad.full_tensor() if hasattr(value.grad, "full_tensor") else value.grad
            for name, value in self.model.named_parameters() if value.grad is not None
        }  # fmt: skip
        self.seen.append({name: value.clone() for name, value in whole.items()})


class Fixed:
    """A batch source of one batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __call__(self, step: int) -> Batch:
        return self.batch

    def counts(self, step: int) -> dict[str, float]:
        return {}


def trainer(model: nn.Module, batches: Any, objective: Any, layout: Layout, micro: int | None) -> tuple[Any, Recorder]:
    optimizer = Recorder(model)
    made = Trainer(
        folder=Path(), layout=layout, model=model, batches=batches, objective=objective, optimizer=optimizer,
        learning_rate=lambda step: 0.0, steps=1, seed=0, tracker=quiet_tracker(), checkpoint=CheckpointConfig(),
        eval=EvalConfig(), tracking=TrackerConfig(), extra=lambda step: lambda folder: None, autocast=no_autocast,
        micro_batch_rows=micro, max_grad_norm=None, after_update=getattr(objective, "after_update", nothing_adapts),
        speed=Speed(layout.device, 1.0, 1.0),
    )  # fmt: skip
    return made, optimizer


def quiet_tracker() -> Tracker:
    return Tracker(Path(), TrackerConfig(), steps=1, is_main=False, run="", run_config={})


def no_autocast() -> torch.autocast:
    return torch.autocast("cpu", enabled=False)


def trained_gradients(name: str, layout: Layout, micro: int | None) -> list[dict[str, Tensor]]:
    """The gradients that the trainer hands to the optimizer."""
    trained, objective = build(name)
    model = spread(trained, layout)
    batches: Any = Fixed(own_rows(global_batch(name), layout))
    if name.endswith("kto"):
        batches = Baseline(
            batches=batches, counts=batches.counts, model=model, reference=language_model(9).eval(), layout=layout,
            micro_batch_rows=micro, autocast=no_autocast,
        )  # fmt: skip
    objective = routed(trained, objective, layout)
    made, optimizer = trainer(model, batches, objective, layout, micro)
    made.updates()(0, made.batches(0))
    optimizer.seen[-1] |= biases(trained)
    return optimizer.seen


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest, over the parameters, of |found - expected| / |expected|."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - each).norm() / each.norm()) for name, each in expected.items())


def prompts(step: int, replacement: int = 0) -> list[PromptRow]:
    """Eight prompts of different lengths, others for each replacement."""
    rows = [[(7 * row + place + replacement) % (VOCAB - 1) + 1 for place in range(2 + 3 * row)] for row in range(ROWS)]
    return [PromptRow(tokens, "", None) for tokens in rows]


prompts.counts = lambda step: {}  # type: ignore[attr-defined]


def rollouts(name: str, layout: Layout, micro: int | None) -> tuple[nn.Module, Rollouts]:
    """A method's batch source, and what it trains."""
    trained, reduce = build(name)[0], partial(total, layout=layout)
    model = spread(trained, layout)
    model.train()
    read = {"model": model, "reference": language_model(9).eval(), "micro_batch_rows": micro, "autocast": no_autocast}
    with_values = partial(PpoEstimator, settings=PPO, kl=AdaptiveKL(0.1, 1.0, 100), kl_stop=None, layout=layout, **read)
    several = partial(AnswerEstimator, temperature=1.0, epochs=2, minibatches=2, **read)
    learn_from: dict[str, Any] = {
        "ppo": with_values, "shared ppo": with_values, "grpo": partial(
            several, advantages=partial(group_advantages, group_rows=2, scale="batch", reduce=reduce), kl_in_loss=True
        ),
        "rloo": partial(several, advantages=partial(leave_one_out_advantages, group_rows=2), kl_in_reward=0.1),
        "reinforce": partial(several, advantages=partial(batch_advantages, reduce=reduce), kl_in_reward=0.1),
        "online_dpo": lambda: best_and_worst, "rejection_sampling": lambda: partial(best_answers, minimum_reward=-1.0),
    }  # fmt: skip
    scores = ScalarModel.from_language_model(language_model(6), torch.Generator().manual_seed(8)).eval()
    rewards = {"model": LearnedReward(scores, pad_id=0, micro_batch_rows=micro), "short": short}
    weights = {"model": 0.0, "short": 1.0} if name == "grpo" else {"model": 1.0, "short": 0.5}
    return model, Rollouts(
        engine=OwnEngine(getattr(trained, "policy", trained)), prompts=prompts, reward=WeightedSum(rewards, weights),
        learn_from=learn_from[name](), decode=str, stop_tokens=frozenset(range(1, 8)), pad_id=0,
        settings=SampledAnswersConfig(max_new_tokens=12), batch_rows=ROWS, group_rows=2 if name in GROUPED else 1,
        minibatches=1 if name in ("online_dpo", "rejection_sampling") else 2, replacements=2 * (name == "grpo"),
        seed=11, layout=layout, autocast=no_autocast,
    )  # fmt: skip


def short(answers: Any) -> list[float]:
    """A rule that gives many groups the same reward."""
    return [float(len(answer.tokens) < 6) for answer in answers]


def rollout_differences(name: str, layout: Layout) -> dict[str, Any]:
    """A rollout against that of a single process: whether it has the same rows, how far apart the numbers are."""
    whole = rollouts(name, ALONE, None)[1](4)
    source = rollouts(name, layout, 2)[1]
    mine = source(4)
    if isinstance(whole, Rollout):
        rows = rows_of_process(layout.data_rank, layout.data_world, ROWS, source.minibatches, source.group_rows)
    else:
        rows = torch.arange(len(whole)).chunk(layout.data_world)[layout.data_rank]
    expected, same, largest = whole[rows], len(mine) == len(rows), 0.0
    for field in dataclasses.fields(mine):
        one, other = getattr(mine, field.name), getattr(expected, field.name)
        if isinstance(one, Tensor) and one.dim() == 2:  # each is padded to its own longest row
            width = min(one.shape[1], other.shape[1])
            one, other = one[:, :width], other[:, :width]
        if isinstance(one, Tensor) and one.is_floating_point():
            largest = max(largest, float((one - other).abs().max()))
        elif isinstance(one, Tensor):
            same = same and torch.equal(one, other)
    return {"same rows": same, "largest difference": largest}


def first_update(name: str, layout: Layout, micro: int | None) -> dict[str, float]:
    """What the first update of a rollout sees, in training mode with gradients."""
    model, make = rollouts(name, layout, micro)
    objective, update = build(name)[1], next(make(4).updates())
    metrics: dict[str, list[float]] = {
        "ratio": [], "ratio_max": [], "ratio_min": [], "approx_kl": [], "clip_fraction": []
    }  # fmt: skip
    largest = 0.0
    for part in update.micro_batches(micro):
        loss, found = objective(model, part)
        loss.backward()
        for key, values in metrics.items():
            values.append(float(found[key][0] / found[key][1]))
        how = (model, part.tokens, part.response_mask, 1.0)
        logprobs = (policy_and_values(*how) if name.endswith("ppo") else policy_logprobs(*how, part.group_rows))[0]
        largest = max(largest, float((logprobs - part.logprobs).abs().max()))
    worst = {
        key: max(values, key=lambda value: abs(value - key.startswith("ratio"))) for key, values in metrics.items()
    }
    return worst | {"largest logprob difference": largest}


if __name__ == "__main__":  # the figures themselves: python -m tests.invariance.test_gradients
    launch(measure, (Path("figures.json"),), 2)
    print(json.dumps(json.loads(Path("figures.json").read_text()), indent=1))
