"""Cross-entropy and log-probabilities straight from hidden states, without the whole [tokens, vocab] logits.

The head's logits are the largest tensor of a training step: in float32 they are 4·V bytes for each token, several times
over. Here they are made for a portion of the tokens, used and dropped. Products are taken in the autocast dtype;
everything between them (log-sum-exp, softmax, losses) is float32.

With a softcap c, the logits z become c tanh(z / c) (Gemma 2, arXiv 2408.00118, section 2).

Shapes: N tokens, H hidden size, V vocabulary; leading dimensions `...` such as [B, T].
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from llmtrain.kernels.cpu_product import times_transposed

# Elements of a portion's logits, by device: small enough not to matter, large enough that the products are efficient.
PORTION_ELEMENTS = {"cpu": 2**23, "cuda": 2**28}
# Up to so many elements, probabilities are kept for the backward pass instead of being made again.
KEPT_ELEMENTS = {"cpu": 2**25, "cuda": 2**28}


def cross_entropy_sum(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, mask: Tensor, *, z_loss: float = 0.0,
    label_smoothing: float = 0.0, softcap: float | None = None, bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sum over the masked positions of −log p(target) + z_loss · (log-sum-exp)², and −log p(target) of each.

    Logits are made once: the gradients are computed along with the loss and only scaled in the backward pass.

    Args:
        hidden: [..., H], after the final norm.
        head_weight: [V, H].
        targets: [...] int64, the token that each position predicts.
        mask: [...] bool, the positions that count.
        z_loss: weight of the squared log-normaliser (PaLM, arXiv 2204.02311, section 5).
        label_smoothing: ε; the sum has (1 − ε) · −log p(target) + ε · the mean of −log p over the vocabulary instead
            (Szegedy et al. 2016, arXiv 1512.00567, section 7).
        softcap: what bounds the logits; null leaves them.
        bias: [V], added to the logits before they are bounded.

    Returns:
        The sum (0-dim float32, differentiable) and the negative log-likelihoods ([...] float32, zero where not masked,
        not differentiable).
    """
    return cross_entropy_sum_and_hits(
        hidden, head_weight, targets, mask, z_loss=z_loss, label_smoothing=label_smoothing, softcap=softcap, bias=bias
    )[:2]


def cross_entropy_sum_and_hits(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, mask: Tensor, *, z_loss: float = 0.0,
    label_smoothing: float = 0.0, softcap: float | None = None, bias: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`cross_entropy_sum`, and 1 where no token is likelier than the target ([...] float32, zero where not masked)."""
    kept = _Kept(hidden, targets, mask)
    total, nll, hits = _CrossEntropySum.apply(
        kept.hidden, head_weight, kept.targets, kept.mask, z_loss, label_smoothing, softcap, _product_dtype(hidden),
        torch.is_grad_enabled(), bias,
    )  # fmt: skip
    return total, kept.spread(nll), kept.spread(hits)


def token_logprobs(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """Log-probability of each target, [...] float32, zero where not masked; logits are divided by `temperature`.

    Shapes as in `cross_entropy_sum`. The backward pass makes the logits again, unless they are few.
    """
    return _logprobs(hidden, head_weight, targets, mask, temperature, softcap, with_entropy=False)[0]


def token_logprobs_and_entropy(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, mask: Tensor | None = None, *, temperature: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`token_logprobs`, and the entropy in nats of the distribution at each position (not differentiable)."""
    return _logprobs(hidden, head_weight, targets, mask, temperature, softcap, with_entropy=True)


def _logprobs(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, mask: Tensor | None, temperature: float,
    softcap: float | None, *, with_entropy: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    kept = _Kept(hidden, targets, torch.ones_like(targets, dtype=torch.bool) if mask is None else mask)
    logprobs, entropy = _TokenLogprobs.apply(
        kept.hidden, head_weight, kept.targets, kept.mask, 1.0 / temperature, softcap, _product_dtype(hidden),
        with_entropy,
    )  # fmt: skip
    return kept.spread(logprobs), kept.spread(entropy)


class _Kept:
    """The positions that are worth computing: those in the mask, or all where shapes must be known beforehand."""

    def __init__(self, hidden: Tensor, targets: Tensor, mask: Tensor) -> None:
        self.shape = targets.shape
        self.hidden, self.targets, self.mask = hidden.flatten(0, -2), targets.flatten(), mask.flatten()
        self.rows: Tensor | None = None
        if not torch.compiler.is_compiling():
            self.rows = self.mask.nonzero().squeeze(-1)
            self.hidden, self.targets, self.mask = (x[self.rows] for x in (self.hidden, self.targets, self.mask))

    def spread(self, values: Tensor) -> Tensor:
        """Values [N] of the kept positions, back in their places; zero elsewhere."""
        if self.rows is not None:
            values = values.new_zeros(self.shape.numel()).index_put((self.rows,), values)
        return values.view(self.shape)


class _CrossEntropySum(torch.autograd.Function):
    """Loss and gradients in one pass over the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        targets: Tensor,
        mask: Tensor,
        z_loss: float,
        label_smoothing: float,
        softcap: float | None,
        dtype: torch.dtype,
        with_gradient: bool,
        bias: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        hidden_needed, weight_needed = (with_gradient and needed for needed in ctx.needs_input_grad[:2])
        bias_needed = with_gradient and ctx.needs_input_grad[-1]
        nll, penalty, hits = (torch.zeros_like(targets, dtype=torch.float32) for _ in range(3))
        hidden_grad = torch.empty_like(hidden) if hidden_needed else None
        weight_grad: Tensor | None = None
        bias_grad: Tensor | None = None
        weight = head_weight.to(dtype)
        for portion in _portions(hidden, weight):
            states, target, counts = hidden[portion].to(dtype), targets[portion, None], mask[portion]
            logits = times_transposed(states, weight)
            logits = logits if bias is None else logits + bias
            logits = logits if softcap is None else _capped(logits, softcap)
            probabilities, normaliser, chosen, is_largest = _read(logits, target)
            nll[portion] = torch.where(counts, normaliser - chosen, 0.0)
            penalty[portion] = torch.where(counts, z_loss * normaliser.square(), 0.0)
            hits[portion] = (counts & is_largest).float()
            if label_smoothing:  # ε times what the mean over the vocabulary costs more than the target
                mean_logit = logits.mean(dim=-1, dtype=torch.float32)
                penalty[portion] += torch.where(counts, label_smoothing * (chosen - mean_logit), 0.0)
            if hidden_needed or weight_needed or bias_needed:
                slope = torch.where(counts, 1.0 + 2.0 * z_loss * normaliser, 0.0)
                grad = _add_at(probabilities.mul_(slope[:, None]), target, (label_smoothing - 1.0) * counts)
                if label_smoothing:
                    grad = grad - (counts * (label_smoothing / weight.shape[0]))[:, None]
                grad = (grad if softcap is None else grad.mul_(_slope_of_cap(logits, softcap))).to(dtype)
            if hidden_grad is not None:
                hidden_grad[portion] = times_transposed(grad, weight.T)
            if weight_needed:
                weight_grad = _added(weight_grad, grad.T @ states, head_weight.dtype)
            if bias is not None and bias_needed:
                bias_grad = _added(bias_grad, grad.sum(dim=0, dtype=bias.dtype), bias.dtype)
        ctx.save_for_backward(hidden_grad, weight_grad, bias_grad)
        ctx.mark_non_differentiable(nll, hits)
        return nll.sum() + penalty.sum(), nll, hits

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        hidden, weight, bias = (None if grad is None else grad * grad_total.to(grad.dtype) for grad in saved)
        return hidden, weight, None, None, None, None, None, None, None, bias


class _TokenLogprobs(torch.autograd.Function):
    """Log-probabilities; the backward pass needs the probabilities, for only then is each token's gradient known.

    A few are kept, many are made again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        targets: Tensor,
        mask: Tensor,
        inverse_temperature: float,
        softcap: float | None,
        dtype: torch.dtype,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropy = (torch.zeros_like(targets, dtype=torch.float32) for _ in range(2))
        weight = head_weight.to(dtype)
        # the slope of a cap wants the logits themselves, which are made again then
        keep = softcap is None and hidden.shape[0] * weight.shape[0] <= KEPT_ELEMENTS[hidden.device.type]
        kept: list[Tensor] = []
        for portion in _portions(hidden, weight):
            logits = _tempered(hidden[portion].to(dtype), weight, inverse_temperature, softcap)
            probabilities, normaliser, chosen, _ = _read(logits, targets[portion, None])
            logprobs[portion] = torch.where(mask[portion], chosen - normaliser, 0.0)
            if with_entropy:
                mean_logit = logits.mul_(probabilities).sum(dim=-1)
                entropy[portion] = torch.where(mask[portion], normaliser - mean_logit, 0.0)
            if keep:
                kept.append(probabilities)
        ctx.save_for_backward(hidden, head_weight, targets, mask, *kept)
        ctx.inverse_temperature, ctx.softcap, ctx.dtype = inverse_temperature, softcap, dtype
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head_weight, targets, mask, *kept = ctx.saved_tensors
        hidden_needed, weight_needed = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden) if hidden_needed else None
        weight_grad: Tensor | None = None
        weight = head_weight.to(ctx.dtype)
        slopes = torch.where(mask, grad_logprobs * ctx.inverse_temperature, 0.0)
        for number, portion in enumerate(_portions(hidden, weight)):
            states, slope = hidden[portion].to(ctx.dtype), slopes[portion]
            if kept:  # overwritten: autograd itself refuses a second pass over them
                grad = kept[number].mul_(-slope[:, None])
            else:
                logits = _tempered(states, weight, ctx.inverse_temperature, ctx.softcap)
                grad = logits.softmax(dim=-1).mul_(-slope[:, None])
            grad = _add_at(grad, targets[portion, None], slope)
            if ctx.softcap is not None:
                grad = grad.mul_(_slope_of_cap(logits, ctx.softcap * ctx.inverse_temperature))
            grad = grad.to(ctx.dtype)
            if hidden_grad is not None:
                hidden_grad[portion] = times_transposed(grad, weight.T)
            if weight_needed:
                weight_grad = _added(weight_grad, grad.T @ states, head_weight.dtype)
        return hidden_grad, weight_grad, None, None, None, None, None, None


def _added(total: Tensor | None, summand: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum, in the given dtype, of what may not have begun; the total may be overwritten."""
    return summand.to(dtype) if total is None else total.add_(summand)


def _tempered(states: Tensor, weight: Tensor, inverse_temperature: float, softcap: float | None) -> Tensor:
    """The logits [n, V] of hidden states [n, H], float32, capped, then divided by the temperature."""
    logits = times_transposed(states, weight).float()
    logits = logits if softcap is None else _capped(logits, softcap)
    return logits if inverse_temperature == 1.0 else logits * inverse_temperature


def _portions(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """Ranges of tokens [N, H] whose logits are made together; at least one, even if it is empty."""
    size = max(PORTION_ELEMENTS[hidden.device.type] // weight.shape[0], 1)
    return (slice(start, start + size) for start in range(0, max(hidden.shape[0], 1), size))


def _read(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities [n, V], log-sum-exp [n] and the target's logit [n], float32, from logits [n, V] and targets [n, 1];
    and whether that logit is the largest [n].

    One softmax kernel is faster than log-sum-exp and exponentials; the normaliser follows from the largest logit,
    whose probability is at least 1 / V, so its logarithm loses nothing.
    """
    probabilities = logits.softmax(dim=-1, dtype=torch.float32)
    largest, chosen = logits.amax(dim=-1).float(), logits.gather(-1, target)[:, 0].float()
    return probabilities, largest - probabilities.amax(dim=-1).log(), chosen, chosen == largest


def _capped(logits: Tensor, softcap: float) -> Tensor:
    """c tanh(z / c), float32."""
    return softcap * torch.tanh(logits.float() / softcap)


def _slope_of_cap(capped: Tensor, softcap: float) -> Tensor:
    """The derivative of `_capped` where it has given these: 1 - tanh²; the same for values and c scaled alike."""
    return 1.0 - (capped / softcap).square()


def _add_at(matrix: Tensor, column: Tensor, values: Tensor) -> Tensor:
    """The matrix [n, V] with values [n] added at one column [n, 1] of each row; the matrix may be overwritten."""
    if torch.compiler.is_compiling():  # a scatter would have the matrix written and read once more; this is fused
        here = torch.arange(matrix.shape[-1], device=matrix.device) == column
        return matrix + torch.where(here, values[:, None], 0.0)
    return matrix.scatter_add_(-1, column, values[:, None])


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype in which autocast, where it is on, would take the head's matrix product."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
