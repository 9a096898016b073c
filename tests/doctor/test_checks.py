"""The checks of `llmtrain doctor`: they pass here, and each notices the fault that it is there for."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmtrain.doctor import losses, sampling, training
from llmtrain.doctor.checks import CHECKS
from llmtrain.doctor.measurement import Check, Measurement, Skipped
from llmtrain.engine import trainer
from llmtrain.engine.snapshots import Piece
from llmtrain.generation import estimators
from llmtrain.models.cache import KVCache
from llmtrain.models.document_attention import Documents
from llmtrain.models.heads import LanguageModel

CPU = torch.device("cpu")
SLOW = (training.compiling,)


@pytest.mark.parametrize(
    "check", [pytest.param(each, marks=pytest.mark.slow) if each in SLOW else each for each in CHECKS]
)
def test_it_passes_here(check: Check) -> None:
    try:
        found = check(CPU)
    except Skipped as reason:
        pytest.skip(str(reason))
    assert [each for each in found if not each.passed] == []
    assert found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("check", CHECKS)
def test_it_passes_on_a_gpu(check: Check) -> None:
    assert [each for each in check(torch.device("cuda")) if not each.passed] == []


def test_what_is_not_finite_never_passes() -> None:
    assert Measurement("x", 1.0, 1.0).passed
    assert not Measurement("x", 1.0, 1.0 + 1e-15).passed
    assert Measurement("x", 1.0, 1.1, 0.2).passed
    assert not Measurement("x", 0.0, float("nan"), 1.0).passed


def off(found: list[Measurement]) -> str:
    """What the measurements that do not pass are of."""
    return "; ".join(each.what for each in found if not each.passed)


def unbiased(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    mean = values.mean()
    return (values - mean) / values.std() + (0.0 if shift_mean else mean)


def test_another_variance_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "whiten", unbiased)
    assert off(losses.whitening(CPU)) == (
        "whitening: difference from the published matrix; whitening: variance of shifted values"
    )


def test_advantages_with_another_discount_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = losses.gae
    monkeypatch.setattr(losses, "gae", lambda *rows, gamma, lam: right(*rows, gamma=gamma, lam=lam - 0.001))
    assert "GAE: difference from a float64 loop" in off(losses.advantages(CPU))


def test_a_loss_that_forgets_a_token_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = losses.cross_entropy_sum

    def forgetful(hidden: Tensor, head: Tensor, targets: Tensor, mask: Tensor) -> Any:
        mask = mask.clone()
        mask[0, -1] = False
        return right(hidden, head, targets, mask)

    monkeypatch.setattr(losses, "cross_entropy_sum", forgetful)
    assert "cross-entropy: ratio" in off(losses.cross_entropy(CPU))


def test_rollouts_read_at_another_temperature_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = estimators.policy_and_values
    monkeypatch.setattr(estimators, "policy_and_values", lambda model, tokens, mask, _: right(model, tokens, mask, 1.0))
    found = off(losses.first_ppo_update(CPU))
    for quantity in ("log-probabilities", "ratio", "KL to the policy that sampled", "clip fraction"):
        assert f"PPO, first update: {quantity}" in found


def test_another_reference_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(model: nn.Module) -> nn.Module:
        other = copy.deepcopy(model)
        with torch.no_grad():
            next(other.parameters()).mul_(1.001)
        return other

    monkeypatch.setattr(losses, "copy", type("other", (), {"deepcopy": staticmethod(moved)}))
    assert off(losses.first_dpo_step(CPU)).startswith("DPO, first step: loss (ln 2); DPO, first step: margin")
    assert "PPO, first rollout: KL to the reference" in off(losses.first_ppo_update(CPU))


def test_documents_that_see_each_other_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Documents.of
    monkeypatch.setattr(
        Documents, "of", lambda numbers, *rest, **named: right(torch.zeros_like(numbers), *rest, **named)
    )
    assert off(training.packing(CPU)) == ("packed rows: loss, ratio to separate ones; packed rows: gradient, off by")


def test_micro_batches_that_are_averaged_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each micro-batch divided by its own tokens, as it is easily done."""

    def mean(model: nn.Module, batch: Any) -> Any:
        loss, metrics = right(model, batch)
        return loss / objective.weight(batch) * 50, metrics

    objective = training.NextToken()
    right = objective.__call__
    updates = trainer.Trainer.updates
    monkeypatch.setattr(trainer.Trainer, "updates", lambda self: dataclasses.replace(updates(self), loss_of=mean))
    found = off(training.accumulation(CPU))
    assert "micro-batches of 1" in found
    assert "micro-batches of 3" in found


@pytest.mark.parametrize(
    ("broken", "what"),
    [("save_model", "model folder: tensors that differ"), ("training_state", "checkpoint: tensors that differ")],
)
def test_weights_that_change_on_the_way_are_noticed(broken: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.bfloat16().float() if value.is_floating_point() else value for name, value in state.items()}

    def coarse(pieces: list[Piece]) -> list[Piece]:
        values = rounded({piece.name: piece.values for piece in pieces})
        return [dataclasses.replace(piece, values=values[piece.name]) for piece in pieces]

    if broken == "save_model":
        right: Callable[..., Any] = training.save_model
        monkeypatch.setattr(
            training, "save_model", lambda folder, model: right(folder, model, state=rounded(model.state_dict()))
        )
    else:
        save = training.checkpoints.save
        monkeypatch.setattr(
            training.checkpoints,
            "save",
            lambda root, step, pieces, *rest, **more: save(root, step, coarse(pieces), *rest, **more),
        )
    assert what in off(training.saving(CPU))


def test_a_gradient_lost_in_bfloat16_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = training.gradients
    calls: list[int] = []

    def second_is_noise(model: nn.Module) -> dict[str, Tensor]:
        calls.append(1)
        found = right(model)
        return {name: torch.randn_like(value) for name, value in found.items()} if len(calls) == 2 else found

    monkeypatch.setattr(training, "gradients", second_is_noise)
    assert off(training.bfloat16(CPU)) == "bfloat16: gradient, cosine to float32"


def test_without_a_compiler_it_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Skipped, match="no C\\+\\+ compiler"):
        training.compiling(CPU)


def test_a_compiler_that_computes_something_else_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(objective: Any, **options: Any) -> Any:
        return lambda model, batch: (objective(model, batch)[0] * 1.001, {})

    monkeypatch.setattr(training, "has_compiler", lambda device: True)
    monkeypatch.setattr(torch, "compile", wrong)
    assert "compiled: loss, ratio to eager" in off(training.compiling(CPU))


def test_a_cache_in_the_wrong_place_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = KVCache.begin
    monkeypatch.setattr(
        KVCache, "begin", lambda self, tokens, *rest: right(self, tokens, *rest) + (tokens.shape[1] == 1)
    )
    assert "generation: tokens that differ without the cache" in off(sampling.decoding(CPU))


def test_a_sample_that_depends_on_its_batch_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = sampling.generate

    def by_place(model: LanguageModel, prompts: list[list[int]], **options: Any) -> Any:
        return right(model, prompts, **(options | ({"seeds": range(len(prompts))} if "seeds" in options else {})))

    monkeypatch.setattr(sampling, "generate", by_place)
    assert "generation: samples that differ when drawn alone" in off(sampling.decoding(CPU))
