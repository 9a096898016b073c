"""A feed-forward part of several experts, of which a router picks a few for each token.

    x → shared(x) + Σ over the chosen experts e of  weight_e(x) · expert_e(x)

Switch (Fedus et al. 2021, arXiv 2101.03961): one expert, weighted with its probability. Mixtral (arXiv 2401.04088):
two, their probabilities divided by their sum, which is the softmax of their logits alone. DeepSeek-V3 (arXiv
2412.19437, equations 12 to 16): sigmoid scores, shared experts, and a bias that takes part in the choice only.

Tokens are sorted by expert, so each weight is read once and multiplied in one go.

Shapes: B rows, T positions, N tokens, H hidden size, F inner size, E experts, K experts for each token.
"""

import copy
import dataclasses
import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import ExpertsConfig, ModelConfig
from llmtrain.kernels.grouped_product import grouped_product
from llmtrain.models.expert_parallel import compute_elsewhere, inverse, own_experts, reordered
from llmtrain.models.feed_forward import ACTIVATIONS, GATES, inner_size, make_dense
from llmtrain.models.shared_rows import SharedRows
from llmtrain.models.tensor_parallel import local, sum_gradients
from llmtrain.objectives.routing import Routing, Stack, balanced


class ExpertLinear(nn.Module):
    """A linear layer for each expert, as one weight [E, O, I]: rows [N, I] sorted by expert → [N, O]."""

    def __init__(self, num_experts: int, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(num_experts, outputs)) if bias else None
        nn.init.uniform_(self.weight, -(inputs**-0.5), inputs**-0.5)

    def in_dtype(self, dtype: torch.dtype) -> "ExpertLinear":
        """The same layers with weights of this dtype, for many products without training."""
        copied = copy.copy(self)
        copied._parameters = {
            name: None if each is None else nn.Parameter(each.detach().to(dtype), requires_grad=False)
            for name, each in self._parameters.items()
        }
        return copied

    def forward(self, rows: Tensor, experts: Tensor, ends: Tensor) -> Tensor:
        """`experts` [N] are the rows' experts, E for rows of none, which become zero; `ends` [E] their last rows."""
        weight, bias = local(self.weight), None if self.bias is None else local(self.bias)
        dtype = working_dtype(weight)
        products: Tensor = grouped_product(rows.to(dtype), weight.to(dtype), ends)
        if bias is None:
            return products
        return products + torch.cat((bias, bias.new_zeros(1, bias.shape[1]))).to(dtype)[experts]


class Router(nn.Module):
    """Scores of the experts for each token, [B, T, H] → [B, T, E], always in float32 at least.

    `bias` is part of the state: an update moves it, no gradient does.
    """

    bias: Tensor | None

    def __init__(self, hidden_size: int, settings: ExpertsConfig) -> None:
        super().__init__()
        self.settings = settings
        self.weight = nn.Parameter(torch.empty(settings.num_experts, hidden_size))
        self.register_buffer("bias", torch.zeros(settings.num_experts) if settings.balance_bias_rate else None)
        nn.init.uniform_(self.weight, -(hidden_size**-0.5), hidden_size**-0.5)

    def forward(self, hidden: Tensor) -> tuple[Routing, Tensor]:
        """The routing, and the weight of each chosen expert [B, T, K]."""
        settings, exact = self.settings, torch.promote_types(hidden.dtype, torch.float32)
        inputs = hidden.to(exact)
        if self.training and settings.jitter:
            inputs = inputs * torch.empty_like(inputs).uniform_(1 - settings.jitter, 1 + settings.jitter)
        with torch.autocast(hidden.device.type, enabled=False):
            logits = inputs @ self.weight.to(exact).T
        if settings.scores == "softmax":
            scores = probabilities = logits.softmax(dim=-1)
        else:
            scores = logits.sigmoid()
            probabilities = scores / scores.sum(dim=-1, keepdim=True)
        ranked = scores if self.bias is None else scores + self.bias
        chosen = ranked.topk(settings.experts_per_token, dim=-1).indices
        weights = scores.gather(-1, chosen)
        if settings.normalise_weights:
            weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(exact).tiny)
        return Routing(logits, probabilities, chosen), settings.weight_scale * weights


class Experts(nn.Module):
    """The routed experts of a layer and the shared ones, [B, T, H] → [B, T, H].

    Without a capacity, and always in evaluation, every token reaches its experts, and what becomes of it depends on no
    other token. With one, an expert takes so many tokens of each group of `capacity_group_tokens` in a row, the first
    ones; what it has no room for passes by it. Groups lie within a row and depend on nothing behind a token, so
    neither the rows beside it nor its padding change what is dropped.
    """

    def __init__(self, config: ModelConfig, settings: ExpertsConfig) -> None:
        super().__init__()
        inner, bias = expert_size(config, settings), config.has_bias("mlp")
        number, hidden = settings.num_experts, config.hidden_size
        self.settings, self.gated = settings, config.activation in GATES
        self.activation = (GATES if self.gated else ACTIVATIONS)[config.activation]
        self.router = Router(hidden, settings)
        # a gate's rows first, as in a dense layer
        self.expert_up = ExpertLinear(number, hidden, 2 * inner if self.gated else inner, bias=bias)
        self.expert_down = ExpertLinear(number, inner, hidden, bias=bias)
        self.shared = make_dense(config, inner * settings.shared_experts) if settings.shared_experts else None
        self.num_experts, self.balance_loss, self.z_loss = number, settings.balance_loss, settings.z_loss
        self.stack: Stack = "decoder" if config.is_causal else "encoder"
        self.routings: list[Routing] | None = None
        self.group: dist.ProcessGroup | None = None  # of the processes that share the experts

    def forward(self, hidden: Tensor, rows: SharedRows | None = None) -> Tensor:
        """`rows`: how rows are put together from the positions in `hidden`, [1, N, H], where they share some."""
        routing, weights = self.router(hidden)
        chosen = routing.chosen
        noted = self.routings if torch.is_grad_enabled() else None
        limited = self.training and self.settings.capacity_factor is not None
        if limited or torch.is_grad_enabled():  # noted or not, so that what is computed again is the same
            in_rows = routing if rows is None else routing.map(rows.spread)
            if limited:
                kept = within_capacity(
                    in_rows.chosen, self.num_experts, self.capacity, self.settings.capacity_group_tokens
                )  # fmt: skip
                in_rows = dataclasses.replace(in_rows, kept=kept)
                kept = kept if rows is None else rows.gather(kept)
                chosen = torch.where(kept, chosen, self.num_experts)  # of no expert: sorted to the end
            if noted is not None:
                noted.append(in_rows)
        mixed = self._mix(hidden.flatten(0, 1), chosen.flatten(0, 1), weights.flatten(0, 1)).view_as(hidden)
        return mixed if self.shared is None else self.shared(hidden) + mixed

    @property
    def capacity(self) -> int:
        """The most tokens of a group that an expert takes: Fedus et al. 2021, equation 3, rounded up."""
        settings = self.settings
        assert settings.capacity_factor is not None
        choices = settings.capacity_group_tokens * settings.experts_per_token
        return math.ceil(settings.capacity_factor * choices / settings.num_experts)

    def _mix(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Each token through its experts: [N, H], experts [N, K] (E for none) and weights [N, K] → [N, H]."""
        experts, order = chosen.flatten().sort(stable=True)  # [N K]
        places = inverse(order)
        ends = torch.searchsorted(experts, torch.arange(self.num_experts, device=order.device), right=True)
        rows = _Spread.apply(hidden.to(working_dtype(self.expert_up.weight)), order, places, chosen.shape[1])
        if self.group is None:
            outputs = self._compute(rows, experts, ends)
        else:
            outputs = compute_elsewhere(rows, ends, self.group, self._compute)
        outputs = reordered(outputs, places, order)
        return (outputs.unflatten(0, chosen.shape) * weights[..., None]).sum(dim=1).to(hidden.dtype)

    def _compute(self, rows: Tensor, experts: Tensor, ends: Tensor) -> Tensor:
        """Rows [N, H] sorted by expert through the experts that this process has → [N, H]."""
        return self.expert_down(self._activate(self.expert_up(rows, experts, ends)), experts, ends)

    def _activate(self, hidden: Tensor) -> Tensor:
        if not self.gated:
            return self.activation(hidden)
        gate, up = hidden.chunk(2, dim=-1)
        return self.activation(gate) * up

    def split_experts(self, mesh: DeviceMesh) -> None:
        """Keep this process's share of the experts, on a mesh [with the same experts, with others].

        Raises ConfigError where the experts cannot be shared out evenly.
        """
        if self.num_experts % mesh.size(1):
            raise ConfigError(
                f"engine.expert_parallel={mesh.size(1)} does not divide the number of experts, {self.num_experts}"
            )
        same = None if mesh.size(0) == 1 else mesh.get_group(0)
        for layer in (self.expert_up, self.expert_down):
            for name, parameter in list(layer.named_parameters()):
                setattr(layer, name, own_experts(parameter, mesh))
            # the others' gradients are means over the processes that take different rows, these are sums
            sum_gradients(layer, same, 1 / mesh.size())
        self.group = mesh.get_group(1)

    @torch.no_grad()
    def adapt(self, load: Tensor) -> None:
        """Move the biases against the load [E]; where the router is frozen, they are too."""
        if self.router.bias is not None and self.router.weight.requires_grad:
            self.router.bias.copy_(balanced(self.router.bias, load, self.settings.balance_bias_rate))


def make_feed_forward(config: ModelConfig, layer: int) -> nn.Module:
    """The feed-forward part of this layer, counted from 0: experts where `config.experts` says so, else a dense one."""
    if config.experts is None or not config.sparse_layers[layer]:
        return make_dense(config, inner_size(config))
    return Experts(config, config.experts)


def expert_size(config: ModelConfig, settings: ExpertsConfig) -> int:
    """F of one expert: `ffn_hidden_size`, or that of a dense layer."""
    return settings.ffn_hidden_size or inner_size(config)


def expert_layers(model: nn.Module) -> list[Experts]:
    """The parts of a model that route, in order."""
    return [module for module in model.modules() if isinstance(module, Experts)]


def within_capacity(chosen: Tensor, num_experts: int, capacity: int, group_tokens: int) -> Tensor:
    """Which of the choices [B, T, K] their expert has room for, [B, T, K] bool.

    Each expert takes the first `capacity` choices of each group of so many tokens of a row, in the order of tokens;
    of the choices of one token, the better one comes first.
    """
    rows, length, _ = chosen.shape
    groups = -(-length // group_tokens)
    row, position = (torch.arange(size, device=chosen.device) for size in (rows, length))
    group = row[:, None] * groups + position // group_tokens  # [B, T]
    keys, order = (group[..., None] * num_experts + chosen).flatten().sort(stable=True)
    queued = torch.arange(len(keys), device=keys.device) - torch.searchsorted(keys, keys)
    return queued[inverse(order)].view_as(chosen) < capacity


def working_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which products are taken: autocast's where it is on, else the weight's."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


class _Spread(torch.autograd.Function):
    """Row n of [N, H] at its K places in [N K, H]; its gradient is the sum of theirs, always in the same order."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, order: Tensor, places: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(places)
        ctx.copies = copies
        return hidden[order // copies]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        return grad[places].unflatten(0, (-1, ctx.copies)).sum(dim=1), None, None, None
