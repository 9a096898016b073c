"""Estimates of the KL divergence, its adaptive coefficient, and the limit that ends a rollout's updates."""

import pytest
import torch

from llmtrain.objectives.kl import AdaptiveKL, KLStop, kl_k1, kl_k3


def test_kl_estimators_are_unbiased():
    """Their mean under π is KL(π ‖ reference), here computed exactly over a small vocabulary."""
    policy, reference = (
        torch.randn(2, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ).log_softmax(-1)
    exact = float((policy.exp() * (policy - reference)).sum())
    for estimator in (kl_k1, kl_k3):
        assert float((policy.exp() * estimator(policy, reference)).sum()) == pytest.approx(exact, rel=1e-9)
    assert (kl_k3(policy, reference) >= 0).all()


# --- the adaptive coefficient ---


def test_adaptive_coefficient_follows_the_clipped_error():
    kl = AdaptiveKL(0.15, target=6.0, horizon=10_000)
    kl.update(torch.tensor(6.6), 512)  # 10 % too high
    assert kl.coefficient.item() == pytest.approx(0.15 * (1 + 0.1 * 512 / 10_000), rel=1e-6)
    before = kl.coefficient.item()
    kl.update(torch.tensor(600.0), 512)
    assert kl.coefficient.item() == pytest.approx(before * (1 + 0.2 * 512 / 10_000), rel=1e-6)
    before = kl.coefficient.item()
    kl.update(torch.tensor(0.0), 512)
    assert kl.coefficient.item() == pytest.approx(before * (1 - 0.2 * 512 / 10_000), rel=1e-6)
    other = AdaptiveKL(0.15, target=6.0)
    other.load_state_dict(kl.state_dict())
    assert torch.equal(other.coefficient, kl.coefficient)


def test_fixed_coefficient_stays():
    kl = AdaptiveKL(0.05)
    kl.update(torch.tensor(100.0), 512)
    assert kl.coefficient.item() == pytest.approx(0.05)


# --- the limit ---


def test_the_limit_is_held_against_the_mean_over_processes():
    def of_two(own: torch.Tensor) -> torch.Tensor:
        return own + torch.tensor([3.0, 10.0], dtype=torch.float64)  # the other process: 0.3 nats on each of 10 tokens

    stop = KLStop(0.2, of_two)
    assert not stop.is_reached()
    stop.add(torch.tensor(0.5), torch.tensor(10))
    assert not stop.is_reached()  # 3.5 / 20
    stop.add(torch.tensor(1.5), torch.tensor(10))
    assert stop.is_reached()  # 4.5 / 20
    stop.begin()
    assert not stop.is_reached()
