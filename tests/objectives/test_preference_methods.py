"""Every preference method: known values at the start, and the loss and gradient of trl 1.16 on the same batch.

The largest differences seen, relative to the loss and to the largest entry of the gradient (float32, one x86 core):

                              loss     gradient
    dpo                       0        5e-7
    dpo, label smoothing      0        3e-7
    dpo, length-normalised    0        6e-7
    ipo                       7e-8     7e-7
    hinge                     0        3e-7
    hinge with an SFT term    0        6e-7
    robust                    2e-7     3e-7
    orpo                      8e-8     3e-7
    simpo                     0        5e-7
    simpo with an SFT term    0        7e-7
    cpo                       7e-8     3e-7
    kto                       1e-7     3e-7

Where trl differs, what is the same is compared: it has no conservative DPO on pairs, but its `aot`, which sorts the
pairs of a batch, is just that for one pair. Its next-token losses are means over all tokens of a batch, ours over those
of each pair: equal for chosen answers of one length. ORPO's counts the prompt as well: equal for prompts of one token.
"""

import copy
import inspect
import math

import pytest
import torch
from tests.objectives.test_preference import PAIRS, Readable, arguments, compare, llama, pair_batch

from llmtrain.config.schema import (
    CpoConfig,
    DpoConfig,
    HingeConfig,
    IpoConfig,
    KtoConfig,
    OrpoConfig,
    RobustConfig,
    SimpoConfig,
)
from llmtrain.objectives.kto import AnswerBatch, Kto, mismatched_ratios
from llmtrain.objectives.pairs import PairBatch, answer_logprobs
from llmtrain.objectives.preference import LOSSES, OnTheFly, orpo_loss, precomputed, robust_loss
from llmtrain.stages.preference import build_objective

SAME_LENGTHS = [
    {"prompt": "a", "chosen": " c d e f", "rejected": " g"},
    {"prompt": "c", "chosen": " a f f a", "rejected": " b d g e a"},
    {"prompt": "f", "chosen": " b b e d", "rejected": " a g"},
]
JUDGED = [
    {"prompt": "a b", "completion": " c d e f", "label": True},
    {"prompt": "c", "completion": " b d g e a", "label": False},
    {"prompt": "f e d", "completion": " b b", "label": True},
    {"prompt": "g", "completion": " a g f", "label": True},
]


@pytest.fixture
def batch(kit) -> PairBatch:
    chosen, chosen_mask = kit.ragged_rows(rows=8, width=12, seed=1)
    rejected, rejected_mask = kit.ragged_rows(rows=8, width=12, seed=2)
    return PairBatch(chosen, rejected, chosen_mask, rejected_mask, torch.zeros(8, dtype=torch.int64))


def answers(kit, **known) -> AnswerBatch:
    own, own_mask = kit.ragged_rows(rows=8, width=12, seed=1)
    mismatched, mismatched_mask = kit.ragged_rows(rows=8, width=12, seed=2)
    desirable = torch.tensor([True, True, False, True, False, False, True, True])
    return AnswerBatch(
        own, mismatched, own_mask, mismatched_mask, desirable, torch.zeros(8, dtype=torch.int64), **known
    )


def mean(metrics, name: str) -> float:
    total, weight = metrics[name]
    return float(total / weight)


# --- known values ---


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        (DpoConfig(), math.log(2)),
        (DpoConfig(label_smoothing=0.1), math.log(2)),
        (DpoConfig(length_normalised=True), math.log(2)),
        (IpoConfig(beta=0.3), (1 / 0.6) ** 2),
        (IpoConfig(beta=0.3, length_normalised=False), (1 / 0.6) ** 2),
        (HingeConfig(), 1.0),
        (RobustConfig(), math.log(2)),
    ],
)
def test_loss_where_the_policy_is_the_reference(kit, batch, method, expected):
    model = kit.language_model(0)
    loss, metrics = build_objective(method, OnTheFly(copy.deepcopy(model)))(model, batch)
    assert loss.item() / 8 == pytest.approx(expected, rel=1e-6)
    for name in ("accuracy", "margin", "chosen_reward", "rejected_reward", "log_ratio"):
        assert mean(metrics, name) == 0.0


def test_methods_without_a_reference_report_no_divergence(kit, batch):
    for method in (OrpoConfig(), SimpoConfig(), CpoConfig()):
        loss, metrics = build_objective(method, None)(kit.language_model(0), batch)
        assert loss.isfinite()
        assert "log_ratio" not in metrics
        assert {"accuracy", "margin", "sft_loss"} < metrics.keys()


def test_every_argument_of_a_loss_is_a_key_of_its_method():
    methods = (DpoConfig, IpoConfig, HingeConfig, RobustConfig, OrpoConfig, SimpoConfig, CpoConfig)
    assert LOSSES.keys() == {method.name for method in methods}
    for method in methods:
        keywords = {
            name
            for name, each in inspect.signature(LOSSES[method.name]).parameters.items()
            if each.kind is each.KEYWORD_ONLY
        }
        shared = {"name", "beta", "reference", "length_normalised", "sft_weight"}
        assert method.__dataclass_fields__.keys() - shared == keywords - shared


def test_robust_loss_of_flipped_labels_is_that_of_the_right_ones_on_average():
    chosen, rejected = torch.tensor([2.0, -1.0, 0.3]), torch.tensor([-1.0, 0.5, 0.2])
    options = {"beta": 0.7, "label_smoothing": 0.2}
    seen = 0.8 * robust_loss(chosen, rejected, **options) + 0.2 * robust_loss(rejected, chosen, **options)
    torch.testing.assert_close(seen, LOSSES["dpo"](chosen, rejected, beta=0.7))


def test_odds_are_exact_for_sure_and_unlikely_answers_and_finite_at_certainty():
    logprobs = torch.tensor([-1e-3, -0.1, -0.69, -0.7, -3.0, -40.0])
    exact = logprobs.double() - torch.log1p(-logprobs.double().exp())
    found = orpo_loss(torch.tensor(-1.0), logprobs, odds_ratio_weight=1.0)
    ours = torch.nn.functional.softplus(exact - (-1.0 - math.log1p(-math.exp(-1.0))))
    torch.testing.assert_close(found, ours.float(), rtol=1e-5, atol=1e-7)
    certain = torch.zeros(1, requires_grad=True)
    loss = orpo_loss(torch.tensor([-1.0]), certain, odds_ratio_weight=0.1)
    loss.backward()
    assert loss.isfinite()
    assert certain.grad.isfinite()


def test_stored_reference_gives_the_loss_of_the_model(kit, batch):
    model, reference = kit.language_model(0), kit.language_model(1)
    with torch.no_grad():
        known = answer_logprobs(reference, *batch.rows()).view(2, -1).T
    stored = PairBatch(
        batch.chosen, batch.rejected, batch.chosen_mask, batch.rejected_mask, batch.source, reference=known
    )
    for method in (DpoConfig(), IpoConfig(), HingeConfig(), RobustConfig()):
        expected = build_objective(method, OnTheFly(reference))(model, batch)[0]
        assert torch.equal(build_objective(method, precomputed)(model, stored)[0], expected)
        parts = [build_objective(method, precomputed)(model, part)[0] for part in stored.micro_batches(3)]
        torch.testing.assert_close(sum(parts), expected)


def test_kto_by_hand(kit):
    model = kit.language_model(0)
    batch = answers(kit, reference=torch.randn(8, 2, generator=torch.Generator().manual_seed(3)) - 30)
    ratios = answer_logprobs(model, batch.answers, batch.answers_mask).detach() - batch.reference[:, 0]
    baseline = max(0.0, mismatched_ratios(model, batch).mean().item())
    assert baseline > 0
    loss, metrics = Kto(beta=0.05, desirable_weight=0.8, undesirable_weight=1.3)(model, batch)
    expected = 0.0
    for ratio, good in zip(ratios.tolist(), batch.desirable.tolist(), strict=True):
        side, weight = (1, 0.8) if good else (-1, 1.3)
        expected += weight * (1 - 1 / (1 + math.exp(-0.05 * side * (ratio - baseline))))
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert mean(metrics, "kl_baseline") == pytest.approx(baseline)
    assert mean(metrics, "chosen_reward") == pytest.approx(0.05 * ratios[batch.desirable].mean().item(), rel=1e-5)
    assert mean(metrics, "rejected_reward") == pytest.approx(0.05 * ratios[~batch.desirable].mean().item(), rel=1e-5)


def test_kto_baseline_of_the_step_is_used_and_not_below_zero(kit):
    model = kit.language_model(0)
    high = answers(kit, reference=torch.zeros(8, 2))  # the reference is sure, so the log-ratios are negative
    assert mean(Kto()(model, high)[1], "kl_baseline") == 0.0
    given = answers(kit, reference=torch.zeros(8, 2), baseline=torch.full((8,), 2.5))
    assert mean(Kto()(model, given)[1], "kl_baseline") == 2.5
    assert Kto()(model, given)[0] != Kto()(model, high)[0]


def test_kto_starts_at_a_half(kit):
    model = kit.language_model(0)
    batch = answers(kit)
    with torch.no_grad():
        known = answer_logprobs(model, *batch.rows()).view(2, -1).T
    loss, metrics = Kto()(model, answers(kit, reference=known))
    assert loss.item() / 8 == pytest.approx(0.5, rel=1e-6)
    assert mean(metrics, "accuracy") == 0.0  # ties are wrong


# --- trl ---


@pytest.mark.parametrize(
    ("method", "pairs", "options"),
    [
        pytest.param(DpoConfig(beta=0.3), 3, {"loss_type": ["sigmoid"]}, id="dpo"),
        pytest.param(
            DpoConfig(beta=0.3, label_smoothing=0.1), 1, {"loss_type": ["aot"], "label_smoothing": 0.1}, id="cdpo"
        ),
        pytest.param(
            DpoConfig(beta=0.3, length_normalised=True), 3, {"loss_type": ["sigmoid_norm"]}, id="length-normalised dpo"
        ),
        pytest.param(IpoConfig(beta=0.3), 3, {"loss_type": ["ipo"]}, id="ipo"),
        pytest.param(HingeConfig(beta=0.3), 3, {"loss_type": ["hinge"]}, id="hinge"),
        pytest.param(
            RobustConfig(beta=0.3, label_smoothing=0.2), 3, {"loss_type": ["robust"], "label_smoothing": 0.2},
            id="robust",
        ),
        pytest.param(
            HingeConfig(beta=0.3, sft_weight=0.25), 1, {"loss_type": ["hinge", "sft"], "loss_weights": [1.0, 0.25]},
            id="hinge with an sft term",
        ),
    ],
)  # fmt: skip
def test_loss_and_gradient_of_trl_with_a_reference(kit, trl, tokenizer, tmp_path, method, pairs, options):
    datasets = pytest.importorskip("datasets")
    policy, reference = llama("LlamaForCausalLM", 0), llama("LlamaForCausalLM", 1)
    ours, fixed = Readable(policy), Readable(reference)
    trainer = trl.DPOTrainer(
        model=policy, ref_model=reference, args=trl.DPOConfig(**arguments(tmp_path, pairs), beta=0.3, **options),
        train_dataset=datasets.Dataset.from_list(PAIRS[:pairs]), processing_class=tokenizer,
    )  # fmt: skip
    inputs = next(iter(trainer.get_train_dataloader()))
    batch = pair_batch(inputs["input_ids"], inputs["completion_mask"])
    compare(kit, build_objective(method, OnTheFly(fixed)), ours, trainer, inputs, batch)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        pytest.param(CpoConfig(beta=0.3, sft_weight=0.7), {"loss_type": "sigmoid", "cpo_alpha": 0.7}, id="cpo"),
        pytest.param(
            SimpoConfig(beta=2.0, gamma=0.6), {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 0.6}, id="simpo"
        ),
        pytest.param(
            SimpoConfig(beta=2.0, gamma=0.6, sft_weight=0.4),
            {"loss_type": "simpo", "cpo_alpha": 0.4, "simpo_gamma": 0.6}, id="simpo with an sft term",
        ),
        pytest.param(OrpoConfig(odds_ratio_weight=0.3), {}, id="orpo"),
    ],
)  # fmt: skip
def test_loss_and_gradient_of_trl_without_a_reference(kit, trl, tokenizer, tmp_path, method, options):
    datasets = pytest.importorskip("datasets")
    if method.name == "orpo":
        peer = pytest.importorskip("trl.experimental.orpo")
        make, config = peer.ORPOTrainer, peer.ORPOConfig(**arguments(tmp_path, 3), beta=method.odds_ratio_weight)
    else:
        peer = pytest.importorskip("trl.experimental.cpo")
        make, config = peer.CPOTrainer, peer.CPOConfig(**arguments(tmp_path, 3), beta=method.beta, **options)
    policy = llama("LlamaForCausalLM", 0)
    ours = Readable(policy)
    trainer = make(
        model=policy, args=config, train_dataset=datasets.Dataset.from_list(SAME_LENGTHS), processing_class=tokenizer
    )
    inputs = next(iter(trainer.get_train_dataloader()))
    rows = trainer.concatenated_inputs(inputs, padding_value=0)
    batch = pair_batch(rows["concatenated_input_ids"], rows["concatenated_labels"] != -100)
    lengths = batch.chosen_mask.sum(dim=1)
    assert lengths.min() == lengths.max() > 0
    assert not batch.chosen_mask[:, 0].any()
    compare(kit, build_objective(method, None), ours, trainer, inputs, batch)


@pytest.mark.parametrize(("seeds", "above_zero"), [((0, 1), True), ((1, 0), False)])
def test_kto_loss_and_gradient_of_trl(kit, trl, tokenizer, tmp_path, seeds, above_zero):
    datasets = pytest.importorskip("datasets")
    policy, reference = (llama("LlamaForCausalLM", seed) for seed in seeds)
    ours, fixed = Readable(policy), Readable(reference)
    method = KtoConfig(beta=0.3, desirable_weight=0.8, undesirable_weight=1.3)
    trainer = trl.KTOTrainer(
        model=policy, ref_model=reference,
        args=trl.KTOConfig(
            **arguments(tmp_path, len(JUDGED)), beta=method.beta, desirable_weight=method.desirable_weight,
            undesirable_weight=method.undesirable_weight,
        ),
        train_dataset=datasets.Dataset.from_list(JUDGED), processing_class=tokenizer,
    )  # fmt: skip
    inputs = next(iter(trainer.get_train_dataloader()))
    width = max(inputs["input_ids"].shape[1], inputs["KL_input_ids"].shape[1])
    own, mismatched, own_mask, mismatched_mask = (
        torch.nn.functional.pad(inputs[name], (0, width - inputs[name].shape[1]))
        for name in ("input_ids", "KL_input_ids", "completion_mask", "KL_completion_mask")
    )
    assert not torch.equal(own, mismatched)
    batch = AnswerBatch(
        own, mismatched, own_mask.bool(), mismatched_mask.bool(), inputs["label"].bool(), torch.zeros(len(JUDGED))
    )
    with torch.no_grad():
        known = answer_logprobs(fixed, *batch.rows()).view(2, -1).T
    batch = AnswerBatch(**{**batch._fields(), "reference": known})
    assert bool(mismatched_ratios(ours, batch).mean() > 0) is above_zero
    objective = Kto(
        beta=method.beta, desirable_weight=method.desirable_weight, undesirable_weight=method.undesirable_weight
    )
    compare(kit, objective, ours, trainer, inputs, batch)
