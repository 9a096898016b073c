"""What routers of experts add to an objective: auxiliary losses, and a balance of load that adapts.

A layer's balance is judged row by row: the share of each expert is that of its row's tokens, as in the sequence-wise
loss of DeepSeek-V3 (arXiv 2412.19437, equations 17 to 20). A product of two means over the whole batch would not be a
sum over rows, so micro-batches and processes would change its gradient. The load over the whole batch of all processes
is what the adapting biases go by: they need no gradient.

Those tokens count that the objective looks at. In a decoder, they stand before the last that is learned in their row:
padding does not, nor does the last one, which predicts nothing, so that rows may share positions
(`shared_positions.py`). In an encoder they are all but padding. An encoder and the decoder beside it read different
texts, so each of the two stacks has tokens of its own, over which its auxiliary losses are means.

Shapes: B rows, T positions, E experts, K experts for each token.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.objectives.batch import Metrics

Stack = Literal["encoder", "decoder"]


@dataclasses.dataclass(frozen=True)
class Routing:
    """What a router made of its inputs, in one forward pass."""

    logits: Tensor
    """[B, T, E] float32."""
    probabilities: Tensor
    """[B, T, E] float32: the scores, divided by their sum over all experts."""
    chosen: Tensor
    """[B, T, K] int64: the experts of each token."""
    kept: Tensor | None = None
    """[B, T, K] bool: whether the expert had room for it. None: nothing was dropped."""

    def map(self, change: Callable[[Tensor], Tensor]) -> "Routing":
        """Each tensor changed alike."""
        kept = None if self.kept is None else change(self.kept)
        return Routing(change(self.logits), change(self.probabilities), change(self.chosen), kept)


class RoutedLayer(Protocol):
    """A layer with a router, as it is seen from here."""

    stack: Stack
    """Of which it is a layer."""
    num_experts: int
    balance_loss: float
    """Weight of this layer's `balance_loss_sum`."""
    z_loss: float
    """Weight of this layer's `z_loss_sum`."""
    routings: list[Routing] | None
    """Where the layer notes its routings while a gradient is wanted; None: it does not."""

    def adapt(self, load: Tensor) -> None:
        """Go by the load [E] of an update, over all processes."""


class Trained(Protocol):
    """A batch that says which tokens count."""

    def counted_tokens(self) -> dict[Stack, Tensor]:
        """[R, S] bool of each stack that reads it: of the rows that the model is trained on, in the order in which it
        sees them."""


def up_to_the_last(predicting: Tensor) -> Tensor:
    """[R, S] bool: the tokens of each row up to the last one that something is predicted from, itself included."""
    return predicting.flip(1).cumsum(1).flip(1) > 0


def before_the_last(learned: Tensor) -> Tensor:
    """[R, S] bool: the tokens of each row before the last that is learned, each from the one before it."""
    return F.pad(up_to_the_last(learned)[:, 1:], (0, 1))


def before_padding(tokens: Tensor, lengths: Tensor | None) -> Tensor:
    """[R, S] bool: the first `lengths` [R] of the tokens [R, S] in each row, or all of them."""
    if lengths is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    return torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]


def loads(routing: Routing, counted: Tensor) -> Tensor:
    """How often each expert was chosen in each row, [B, E], whether it had room or not; `counted` is [B, T] bool."""
    chosen = routing.chosen.flatten(1)  # [B, T K]
    each = counted.to(routing.probabilities.dtype).repeat_interleave(routing.chosen.shape[2], dim=1)
    return each.new_zeros(len(chosen), routing.probabilities.shape[2]).scatter_add(1, chosen, each)


def balance_loss_sum(routing: Routing, counted: Tensor) -> Tensor:
    """E Σ f P of each row, times its counted tokens, summed; f: share of the choices, P: mean probability, by expert.

    Fedus et al. 2021 (arXiv 2101.03961, equations 4 to 6), for one row. With K choices the shares still sum to 1, as
    in DeepSeek-V3, so an even load gives 1; Transformers' `load_balancing_loss_func` lets them sum to K.
    """
    load = loads(routing, counted)
    shares = load / load.sum(dim=1, keepdim=True).clamp(min=1)
    # the mean probability, times the row's tokens
    mass = (routing.probabilities * counted[:, :, None]).sum(dim=1)
    return routing.probabilities.shape[2] * (shares * mass).sum()


def z_loss_sum(routing: Routing, counted: Tensor) -> Tensor:
    """The squared log-sum-exp of each counted token's logits, summed.

    Zoph et al. 2022 (arXiv 2202.08906, equation 5).
    """
    return torch.where(counted, routing.logits.logsumexp(dim=-1).square(), 0.0).sum()


def balanced(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """Biases [E] a step further: up where the load [E] is below the mean, down where it is above.

    Wang et al. 2024 (arXiv 2408.15664, algorithm 1).
    """
    return bias + rate * torch.sign(load.mean() - load)


class Routed:
    """An objective for a model with experts: its own loss, and beside it the auxiliary ones of all routers.

    The loss has a term for the objective and one for each stack with experts, [1 + stacks], each averaged over a weight
    of its own: that of the objective, and the stack's counted tokens, over which its auxiliary losses are a mean. They
    are summed over layers.

    Args:
        objective: what is minimised besides.
        layers: those with routers, of the model that is trained.
        reduce: the sum of a tensor over all processes.
        device: where the model is.
    """

    def __init__(
        self, objective: Any, layers: Sequence[RoutedLayer], reduce: Callable[[Tensor], Tensor], device: torch.device
    ) -> None:
        self.objective, self.layers, self.reduce = objective, layers, reduce
        self.stacks: tuple[Stack, ...] = tuple(dict.fromkeys(layer.stack for layer in layers))
        self.sizes = [layer.num_experts for layer in layers]
        self.loads = torch.zeros(sum(self.sizes), device=device)  # of the update that is being made

    def weight(self, batch: Any) -> Tensor:
        """The objective's weight and the number of counted tokens of each stack, [1 + stacks]."""
        own: Tensor = self.objective.weight(batch)
        counted = batch.counted_tokens()
        return torch.stack([own, *(counted[stack].sum().to(own.dtype) for stack in self.stacks)])

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, Metrics]:
        """The sums.

        Metrics: the objective's, and means over layers and counted tokens: router/balance_loss and router/z_loss, both
        before their weights, router/entropy in nats, and router/dropped, the share of the choices that their expert had
        no room for; where both stacks have experts, of each by itself: router/encoder/entropy.
        """
        for layer in self.layers:
            layer.routings = []
        loss, metrics = self.objective(model, batch)
        noted = [(number, each) for number, layer in enumerate(self.layers) for each in layer.routings or []]
        for layer in self.layers:
            layer.routings = None
        terms, counted = [loss], batch.counted_tokens()
        for stack in self.stacks:
            found = [(number, each) for number, each in noted if self.layers[number].stack == stack]
            auxiliary, measured = self._judged(found, counted[stack])
            terms.append(auxiliary)
            metrics |= {self._metric(stack, name): value for name, value in measured.items()}
        return torch.stack(terms), metrics

    def _judged(self, found: Sequence[tuple[int, Routing]], counted: Tensor) -> tuple[Tensor, Metrics]:
        """The auxiliary losses of a stack's routings, each beside the number of its layer, and what is measured."""
        balance = [balance_loss_sum(routing, counted) for _, routing in found]
        z = [z_loss_sum(routing, counted) for _, routing in found]
        auxiliary = torch.zeros_like(balance[0])
        for (number, _), one, other in zip(found, balance, z, strict=True):
            layer = self.layers[number]
            auxiliary = auxiliary + layer.balance_loss * one + layer.z_loss * other
        self._note(found, counted)
        tokens = counted.sum().float() * len(found)
        measured = {"balance_loss": balance, "z_loss": z} | statistics([routing for _, routing in found], counted)
        return auxiliary, {name: (torch.stack(sums).sum(), tokens) for name, sums in measured.items()}

    def _metric(self, stack: Stack, name: str) -> str:
        return f"router/{stack}/{name}" if len(self.stacks) > 1 else f"router/{name}"

    @torch.no_grad()
    def _note(self, found: Sequence[tuple[int, Routing]], counted: Tensor) -> None:
        """Add the loads of a micro-batch to those of its update."""
        of_layer = self.loads.split(self.sizes)
        for number, routing in found:
            of_layer[number].add_(loads(routing, counted).sum(dim=0))

    @torch.no_grad()
    def after_update(self, is_made: bool = True) -> Metrics:
        """Let the layers go by the load of the update, if it has been made.

        Metrics: router/share_max and router/share_min, of the choices of a layer that went to one expert; where both
        stacks have experts, of each by itself: router/encoder/share_max.
        """
        of_all = self.reduce(self.loads.clone()).split(self.sizes)
        self.loads.zero_()
        for layer, load in zip(self.layers, of_all, strict=True):
            if is_made:
                layer.adapt(load)
        metrics: Metrics = {}
        for stack in self.stacks:
            own = [load for layer, load in zip(self.layers, of_all, strict=True) if layer.stack == stack]
            shares = torch.cat([load / load.sum().clamp(min=1) for load in own])
            for name, share in (("share_max", shares.max()), ("share_min", shares.min())):
                metrics[self._metric(stack, name)] = (share, shares.new_ones(()))
        return metrics


@torch.no_grad()
def statistics(routings: Sequence[Routing], counted: Tensor) -> dict[str, list[Tensor]]:
    """The entropy of the probabilities in nats and the share of dropped choices, of each routing a sum over tokens."""
    entropies, dropped = [], []
    for routing in routings:
        entropy = torch.special.entr(routing.probabilities).sum(dim=-1)
        missed = torch.zeros_like(entropy) if routing.kept is None else (~routing.kept).float().mean(dim=-1)
        entropies.append(torch.where(counted, entropy, 0.0).sum())
        dropped.append(torch.where(counted, missed, 0.0).sum())
    return {"entropy": entropies, "dropped": dropped}
