"""Preference optimisation: a policy learns from pairs of answers directly, without a reward model.

Each method is a loss of two scores, those of the chosen and the rejected answer. What a score is:

    log-ratio         log π(answer) − log π_reference(answer)     dpo, ipo, hinge, robust
    log-probability   log π(answer)                               cpo
    its mean          log π(answer) / tokens of the answer        simpo, orpo

Log-ratios may be divided by the tokens of the answer too. Shapes: B pairs, S tokens of the longest row.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.objectives.batch import Metrics
from llmtrain.objectives.pairs import PairBatch, answer_lengths, answer_logprobs, num_pairs, over_pairs

# The largest mean log-probability whose odds are taken: float32 rounds a surer answer's to 0, whose odds are infinite.
SUREST = -1e-6


def dpo_loss(chosen_ratios: Tensor, rejected_ratios: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Loss of each pair, [B], from the log-ratios log π(answer) − log π_reference(answer), [B] each.

    Rafailov et al. 2023 (arXiv 2305.18290), equation 7; with label smoothing ε the conservative form of Mitchell 2023
    ("A note on DPO with noisy preferences", equation 3): (1 − ε) times the loss plus ε times that of the flipped pair.
    """
    margin = beta * (chosen_ratios - rejected_ratios)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def ipo_loss(chosen_ratios: Tensor, rejected_ratios: Tensor, *, beta: float) -> Tensor:
    """(difference of the log-ratios − 1 / 2β)², [B], from the log-ratios, [B] each.

    Azar et al. 2023 (arXiv 2310.12036), equation 17, whose τ is β here. There the log-ratios are sums over tokens;
    `trl` takes means, which the paper's authors told it is what their experiments did.
    """
    return (chosen_ratios - rejected_ratios - 1 / (2 * beta)).square()


def hinge_loss(chosen_ratios: Tensor, rejected_ratios: Tensor, *, beta: float) -> Tensor:
    """max(0, 1 − β · difference of the log-ratios), [B], from the log-ratios, [B] each.

    The calibration loss of SLiC-HF (Zhao et al. 2023, arXiv 2305.10425, equation 1), which compares log-probabilities,
    on log-ratios, as Liu et al. 2023 (arXiv 2309.06657, RSO) and `trl` have it.
    """
    return torch.relu(1 - beta * (chosen_ratios - rejected_ratios))


def robust_loss(chosen_ratios: Tensor, rejected_ratios: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """Loss of each pair, [B], whose mean over flips of a share ε of the labels is DPO's loss of the right labels.

    Chowdhury et al. 2024 (arXiv 2403.00409), section 3: ((1 − ε) loss − ε loss of the flipped pair) / (1 − 2ε), from
    the log-ratios, [B] each. It falls without bound as their difference grows.
    """
    margin = beta * (chosen_ratios - rejected_ratios)
    unscaled = -(1 - label_smoothing) * F.logsigmoid(margin) + label_smoothing * F.logsigmoid(-margin)
    return unscaled / (1 - 2 * label_smoothing)


def orpo_loss(chosen_means: Tensor, rejected_means: Tensor, *, odds_ratio_weight: float) -> Tensor:
    """−λ log σ(log odds of the chosen − log odds of the rejected answer), [B], from mean log-probabilities, [B] each.

    Hong et al. 2024 (arXiv 2403.07691), equations 4 and 7; the odds of an answer are p / (1 − p), where log p is its
    mean log-probability. The other term of equation 6, the next-token loss, is on the answer's tokens; the paper's own
    code and `trl` count those of the prompt too.
    """
    return -odds_ratio_weight * F.logsigmoid(_log_odds(chosen_means) - _log_odds(rejected_means))


def _log_odds(logprobs: Tensor) -> Tensor:
    """log p − log(1 − p), from log p; each of the two forms of log(1 − p) is exact on its side of p = 1/2."""
    surest = logprobs.clamp(max=SUREST)
    probable = surest > -0.6931
    above = torch.log(-torch.expm1(torch.where(probable, surest, -0.6931)))
    below = torch.log1p(-torch.exp(torch.where(probable, -0.6931, surest)))
    return surest - torch.where(probable, above, below)


def simpo_loss(chosen_means: Tensor, rejected_means: Tensor, *, beta: float, gamma: float) -> Tensor:
    """−log σ(β · difference − γ), [B], from mean log-probabilities, [B] each.

    Meng et al. 2024 (arXiv 2405.14734), equation 6.
    """
    return -F.logsigmoid(beta * (chosen_means - rejected_means) - gamma)


def cpo_loss(chosen_logprobs: Tensor, rejected_logprobs: Tensor, *, beta: float) -> Tensor:
    """−log σ(β · difference), [B], from log-probabilities, [B] each: DPO's loss with a uniform reference.

    Xu et al. 2024 (arXiv 2401.08417), equation 3; its other term, the next-token loss, is a mean over the answer's
    tokens, as in the paper's own code.
    """
    return dpo_loss(chosen_logprobs, rejected_logprobs, beta=beta)


# The loss of each method. Their keyword arguments are keys of the method in the config.
LOSSES: dict[str, Callable[..., Tensor]] = {
    "dpo": dpo_loss,
    "ipo": ipo_loss,
    "hinge": hinge_loss,
    "robust": robust_loss,
    "orpo": orpo_loss,
    "simpo": simpo_loss,
    "cpo": cpo_loss,
}


# A batch → the reference's log-probabilities of its rows, [2·B].
Reference = Callable[[PairBatch], Tensor]


class OnTheFly:
    """The reference's log-probabilities, from a second model in memory."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def __call__(self, batch: PairBatch) -> Tensor:
        """Those of the batch's rows, [2·B]."""
        return answer_logprobs(self.model, *batch.rows())


def precomputed(batch: PairBatch) -> Tensor:
    """The reference's log-probabilities of a batch's rows, [2·B], which the batch brings with it."""
    assert batch.reference is not None
    return batch.reference.T.flatten()


class Preference:
    """A loss of the scores of two answers, averaged over pairs.

    The score of an answer is its log-probability, the sum over its tokens; less that of the `reference`, where there
    is one; divided by its tokens with `length_normalised`. `beta` times the score is what is reported as its reward.
    With `sft_weight`, that weight times the mean over the tokens of the chosen answer of −log p is added for each
    pair, so the weight of a batch stays its pairs.
    """

    def __init__(
        self, loss: Callable[[Tensor, Tensor], Tensor], reference: Reference | None = None, *, beta: float = 1.0,
        length_normalised: bool = False, sft_weight: float = 0.0,
    ) -> None:  # fmt: skip
        self.loss, self.reference = loss, reference
        self.beta, self.length_normalised, self.sft_weight = beta, length_normalised, sft_weight

    def weight(self, batch: PairBatch) -> Tensor:
        """Number of pairs."""
        return num_pairs(batch)

    def __call__(self, model: nn.Module, batch: PairBatch) -> tuple[Tensor, Metrics]:
        """The summed loss.

        Metrics: loss (all that is minimised), and over the pairs of which something is learned accuracy (a tie is
        wrong), margin and rewards (β times the scores), sft_loss, and with a reference log_ratio (to it, mean over both
        answers: how far the policy has moved on them).
        """
        tokens, mask = batch.rows()
        logprobs = answer_logprobs(model, tokens, mask)
        ratios = logprobs if self.reference is None else logprobs - self.reference(batch)
        scores = ratios / answer_lengths(mask) if self.length_normalised else ratios
        chosen, rejected = scores.chunk(2)
        sft = -logprobs.chunk(2)[0] / answer_lengths(batch.chosen_mask)
        losses = self.loss(chosen, rejected)
        if self.sft_weight:
            losses = losses + self.sft_weight * sft
        learned = batch.chosen_mask.any(dim=1)
        metrics = over_pairs(loss=losses) | over_pairs(
            learned,
            accuracy=chosen > rejected,
            margin=self.beta * (chosen - rejected),
            chosen_reward=self.beta * chosen,
            rejected_reward=self.beta * rejected,
            sft_loss=sft,
        )
        if self.reference is not None:
            chosen_ratios, rejected_ratios = ratios.chunk(2)
            metrics |= over_pairs(learned, log_ratio=(chosen_ratios + rejected_ratios) / 2)
        return losses.sum(), metrics
