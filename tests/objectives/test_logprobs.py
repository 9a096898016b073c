"""Cross-entropy and log-probabilities in portions, against the plain way of computing them."""

import pytest
import torch
import torch.nn.functional as F

from llmtrain.objectives import logprobs
from llmtrain.objectives.logprobs import (
    cross_entropy_sum,
    cross_entropy_sum_and_hits,
    token_logprobs,
    token_logprobs_and_entropy,
)

ROWS, WIDTH, HIDDEN, VOCAB = 3, 10, 8, 23


PORTIONS = {
    "portions of 1, made again": (1, 0), "portions of 7, made again": (7 * VOCAB, 0),
    "portions of 7, kept": (7 * VOCAB, 2**23), "one portion, kept": (2**23, 2**23),
}  # fmt: skip


@pytest.fixture(params=PORTIONS.values(), ids=PORTIONS)
def _portions(request, monkeypatch):
    for elements, value in zip((logprobs.PORTION_ELEMENTS, logprobs.KEPT_ELEMENTS), request.param, strict=True):
        monkeypatch.setitem(elements, "cpu", value)


def tensors(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, HIDDEN, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(0, VOCAB, (ROWS, WIDTH), generator=generator)
    mask = torch.rand(ROWS, WIDTH, generator=generator) < 0.6
    mask[1] = False  # with small portions, some have nothing to count
    return hidden, weight, targets, mask


def plain_cross_entropy(hidden, weight, targets, mask, z_loss=0.0):
    logits = F.linear(hidden, weight).float()
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    return ((nll + z_loss * logits.logsumexp(-1).square()) * mask).sum(), nll * mask


@pytest.mark.usefixtures("_portions")
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_cross_entropy_and_its_gradients(z_loss):
    hidden, weight, targets, mask = tensors(torch.float32)
    total, nll = cross_entropy_sum(hidden, weight, targets, mask, z_loss=z_loss)
    wanted, wanted_nll = plain_cross_entropy(hidden, weight, targets, mask, z_loss)
    torch.testing.assert_close(total, wanted)
    torch.testing.assert_close(nll, wanted_nll)
    assert not nll.requires_grad
    found = torch.autograd.grad(total / 3, (hidden, weight))
    for gradient, reference in zip(found, torch.autograd.grad(wanted / 3, (hidden, weight)), strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_portions")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_entropy_and_gradients(temperature):
    hidden, weight, targets, mask = tensors(torch.float32)
    found, entropy = token_logprobs_and_entropy(hidden, weight, targets, mask, temperature=temperature)
    table = F.log_softmax(F.linear(hidden, weight) / temperature, dim=-1)
    wanted = table.gather(-1, targets[..., None])[..., 0] * mask
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(entropy, -(table.exp() * table).sum(-1) * mask)
    weights = torch.arange(found.numel(), dtype=torch.float32).view(
        found.shape
    )  # each token's gradient counts differently
    gradients = torch.autograd.grad((found * weights).sum(), (hidden, weight))
    references = torch.autograd.grad((wanted * weights).sum(), (hidden, weight))
    for gradient, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("_portions")
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_capped_cross_entropy_and_its_gradients(z_loss):
    hidden, weight, targets, mask = tensors(torch.float32)
    total, nll = cross_entropy_sum(hidden, weight, targets, mask, z_loss=z_loss, softcap=3.0)
    wide = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    logits = 3.0 * torch.tanh(F.linear(*wide) / 3.0)
    wanted_nll = (logits.logsumexp(-1) - logits.gather(-1, targets[..., None])[..., 0]) * mask
    wanted = wanted_nll.sum() + (z_loss * logits.logsumexp(-1).square() * mask).sum()
    torch.testing.assert_close(nll.double(), wanted_nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total.double(), wanted, rtol=1e-5, atol=1e-5)
    found, references = torch.autograd.grad(total, (hidden, weight)), torch.autograd.grad(wanted, wide)
    for gradient, reference in zip(found, references, strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_portions")
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("trained", ["all", "bias alone"])
def test_cross_entropy_with_a_bias_and_its_gradients(softcap, trained):
    hidden, weight, targets, mask = tensors(torch.float32)
    bias = torch.randn(len(weight), generator=torch.Generator().manual_seed(3)).requires_grad_()
    leaves = [hidden, weight, bias] if trained == "all" else [bias]
    given = [each if trained == "all" else each.detach() for each in (hidden, weight)]
    total, nll = cross_entropy_sum(*given, targets, mask, z_loss=0.1, softcap=softcap, bias=bias)
    wide = [each.detach().double().requires_grad_() for each in (hidden, weight, bias)]
    logits = F.linear(*wide)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    wanted_nll = (logits.logsumexp(-1) - logits.gather(-1, targets[..., None])[..., 0]) * mask
    wanted = wanted_nll.sum() + (0.1 * logits.logsumexp(-1).square() * mask).sum()
    torch.testing.assert_close(nll.double(), wanted_nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total.double(), wanted, rtol=1e-5, atol=1e-5)
    found, references = torch.autograd.grad(total, leaves), torch.autograd.grad(wanted, wide)
    for gradient, reference in zip(found, references[-len(leaves) :], strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_portions")
def test_capped_logprobs_entropy_and_gradients():
    hidden, weight, targets, mask = tensors(torch.float32)
    found, entropy = token_logprobs_and_entropy(hidden, weight, targets, mask, temperature=0.7, softcap=3.0)
    wide = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    table = F.log_softmax(3.0 * torch.tanh(F.linear(*wide) / 3.0) / 0.7, dim=-1)
    wanted = table.gather(-1, targets[..., None])[..., 0] * mask
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(table.exp() * table).sum(-1) * mask, rtol=1e-5, atol=1e-5)
    weights = torch.arange(found.numel()).view(found.shape)
    gradients = torch.autograd.grad((found * weights).sum(), (hidden, weight))
    for gradient, reference in zip(gradients, torch.autograd.grad((wanted * weights).sum(), wide), strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-5, atol=1e-4)


def test_logprobs_without_mask_are_those_of_all_positions():
    hidden, weight, targets, mask = tensors(torch.float32)
    everything = token_logprobs(hidden, weight, targets)
    assert (everything < 0).all()
    torch.testing.assert_close(token_logprobs(hidden, weight, targets, mask), everything * mask)


@pytest.mark.usefixtures("_portions")
def test_nothing_to_predict():
    hidden, weight, targets, mask = tensors(torch.float32)
    total, _ = cross_entropy_sum(hidden, weight, targets, torch.zeros_like(mask))
    total.backward()
    assert total == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()
    hidden.grad = weight.grad = None
    token_logprobs(hidden, weight, targets, torch.zeros_like(mask)).sum().backward()
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_masked_positions_may_hold_anything():
    hidden, weight, targets, mask = tensors(torch.float32)
    total, _ = cross_entropy_sum(hidden, weight, targets, mask)
    spoilt = torch.where(mask[..., None], hidden, float("nan"))
    again, _ = cross_entropy_sum(spoilt, weight, targets, mask)
    assert torch.equal(total, again)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_inputs_get_no_gradient(frozen):
    hidden, weight, targets, mask = tensors(torch.float32)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    for loss in (
        cross_entropy_sum(hidden, weight, targets, mask)[0],
        token_logprobs(hidden, weight, targets, mask).sum(),
    ):
        hidden.grad = weight.grad = None
        loss.backward()
        assert (hidden.grad is None) == (frozen == "hidden")
        assert (weight.grad is None) == (frozen == "weight")


def test_without_gradients_no_gradient_is_computed():
    hidden, weight, targets, mask = tensors(torch.float32)
    wanted = cross_entropy_sum(hidden, weight, targets, mask)[0]
    with torch.no_grad():
        total, _ = cross_entropy_sum(hidden, weight, targets, mask)
    assert not total.requires_grad
    assert torch.equal(total, wanted.detach())


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_products_are_bfloat16_and_losses_float32(hidden_dtype):
    hidden, weight, targets, mask = tensors(torch.float32)
    states = hidden.detach().to(hidden_dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        total, nll = cross_entropy_sum(states, weight, targets, mask)
        logprobs_found = token_logprobs(states, weight, targets, mask)
        wanted, _ = plain_cross_entropy(states, weight, targets, mask)
    assert total.dtype == nll.dtype == logprobs_found.dtype == torch.float32
    assert torch.equal(total.detach(), -logprobs_found.sum().detach()) or torch.allclose(total, -logprobs_found.sum())
    torch.testing.assert_close(total, wanted, rtol=1e-5, atol=1e-5)  # the same bfloat16 logits
    exact, _ = plain_cross_entropy(states.float(), weight, targets, mask)
    assert not torch.equal(total, exact)  # bfloat16 was really used
    references = torch.autograd.grad(exact, (states, weight))
    for loss in (total, -logprobs_found.sum()):
        found = torch.autograd.grad(loss, (states, weight))
        for gradient, reference in zip(found, references, strict=True):
            assert gradient.dtype == reference.dtype
            error = (gradient.float() - reference.float()).norm() / reference.float().norm()
            assert error < 0.01


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_graph_breaks(backend, autocast, monkeypatch):
    monkeypatch.setitem(logprobs.PORTION_ELEMENTS, "cpu", 7 * VOCAB)
    hidden, weight, targets, mask = tensors(torch.float32)
    torch.compiler.reset()

    def losses(hidden, weight):
        total, nll = cross_entropy_sum(hidden, weight, targets, mask, z_loss=0.1)
        found, entropy = token_logprobs_and_entropy(hidden, weight, targets, mask, temperature=0.7)
        return total + found.sum(), nll, entropy

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        wanted = losses(hidden, weight)
        found = torch.compile(losses, fullgraph=True, backend=backend)(hidden, weight)
        with torch.no_grad():
            evaluated = torch.compile(losses, fullgraph=True, backend=backend)(hidden, weight)
    tolerance = {"rtol": 2e-2, "atol": 2e-1} if autocast else {"rtol": 1e-5, "atol": 1e-4}
    for one, other, third in zip(found, wanted, evaluated, strict=True):
        torch.testing.assert_close(one, other, **tolerance)
        torch.testing.assert_close(third, other, **tolerance)
    for gradient, reference in zip(
        torch.autograd.grad(found[0], (hidden, weight)), torch.autograd.grad(wanted[0], (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(gradient, reference, **tolerance)


@pytest.mark.usefixtures("_portions")
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("epsilon", [0.1, 0.6])
def test_label_smoothing_is_that_of_torch(epsilon, z_loss):
    hidden, weight, targets, mask = tensors(torch.float32)
    total, nll = cross_entropy_sum(hidden, weight, targets, mask, z_loss=z_loss, label_smoothing=epsilon)
    wide = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    logits = F.linear(*wide)[mask]
    wanted = F.cross_entropy(logits, targets[mask], label_smoothing=epsilon, reduction="sum")
    wanted = wanted + z_loss * logits.logsumexp(-1).square().sum()
    torch.testing.assert_close(total.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(nll, cross_entropy_sum(hidden, weight, targets, mask)[1])  # the metric is without it
    found, references = torch.autograd.grad(total, (hidden, weight)), torch.autograd.grad(wanted, wide)
    for gradient, reference in zip(found, references, strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_portions")
def test_label_smoothing_of_capped_logits_with_a_bias():
    hidden, weight, targets, mask = tensors(torch.float32)
    bias = torch.linspace(-2, 2, VOCAB).requires_grad_()
    total, _ = cross_entropy_sum(hidden, weight, targets, mask, label_smoothing=0.2, softcap=3.0, bias=bias)
    wide = [each.detach().double().requires_grad_() for each in (hidden, weight, bias)]
    logits = 3.0 * torch.tanh(F.linear(*wide) / 3.0)[mask]
    wanted = F.cross_entropy(logits, targets[mask], label_smoothing=0.2, reduction="sum")
    torch.testing.assert_close(total.double(), wanted, rtol=1e-5, atol=1e-5)
    found, references = torch.autograd.grad(total, (hidden, weight, bias)), torch.autograd.grad(wanted, wide)
    for gradient, reference in zip(found, references, strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("_portions")
def test_hits_are_targets_that_no_token_is_likelier_than():
    hidden, weight, targets, mask = tensors(torch.float32)
    likeliest = F.linear(hidden, weight).argmax(-1)
    targets = torch.where(torch.arange(WIDTH) % 2 == 0, likeliest, targets)
    *_, hits = cross_entropy_sum_and_hits(hidden, weight, targets, mask)
    assert torch.equal(hits, ((targets == likeliest) & mask).float())
    assert 0 < hits.sum() < mask.sum()
    assert not hits.requires_grad
