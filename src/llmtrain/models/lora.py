"""Low-rank adapters: a weight W stays as it is, and a product of two thin matrices beside it is trained.

    W x + s B A x        s = alpha / r, or alpha / sqrt(r)

Hu et al. 2021 (arXiv 2106.09685, equation 3); the second scale is that of Kalajdzievski 2023 (arXiv 2312.03732). A
layer of ours that holds several of Transformers' (query, key and value) has an A and a B for each of them, as `peft`
has: those of A one below the other, those of B along the diagonal of one matrix.

Shapes: O outputs and I inputs of a layer, r rank, P adapted parts of the layer.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import LoraConfig
from llmtrain.config.seeds import derive_seed
from llmtrain.models.experts import ExpertLinear, Router
from llmtrain.models.heads import LanguageModel, Read, ScalarModel, SharedActorCritic
from llmtrain.models.layouts import layout_for, their_parts
from llmtrain.models.linear import Linear
from llmtrain.models.switched import Switched, switched_layers, switched_to

OWN_SET, VALUE_SET = "default", "value"  # the names of a model's own adapters, and of those of a value model on it


class Part(NamedTuple):
    """One of the layers of Transformers that a layer of ours holds."""

    name: str  # as Transformers names it
    rows: int
    adapted: bool


class LowRank(nn.Module):
    """s B A x of one layer, [..., I] → [..., O], with dropout on x."""

    def __init__(self, linear: nn.Linear, parts: Sequence[Part], settings: LoraConfig) -> None:
        super().__init__()
        self.parts, self.rank, self.dropout = parts, settings.rank, settings.dropout
        self.scale = settings.alpha / (settings.rank**0.5 if settings.rslora else settings.rank)
        empty, rows = linear.weight.new_zeros, [part.rows for part in parts if part.adapted]
        self.lora_A = nn.Parameter(empty(len(rows) * self.rank, linear.in_features))  # [P r, I]
        self.lora_B = nn.Parameter(empty(sum(rows), self.rank))  # rows of the adapted parts

    def forward(self, hidden: Tensor) -> Tensor:
        low = F.linear(F.dropout(hidden, self.dropout, self.training), self.lora_A)
        return self.scale * F.linear(low, self._diagonal(self.lora_B))

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """s B A [O, I] of such an A and B: what merging adds to the weight."""
        return self.scale * (self._diagonal(b) @ a)

    def by_part(self, a: Tensor, b: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Name, A [r, I] and B [rows, r] of each adapted part."""
        adapted = [part for part in self.parts if part.adapted]
        pieces = b.split([part.rows for part in adapted])
        yield from zip([part.name for part in adapted], a.split(self.rank), pieces, strict=True)

    def _diagonal(self, b: Tensor) -> Tensor:
        """[O, P r]: each part's B in its own rows and columns."""
        pieces = iter(b.split([part.rows for part in self.parts if part.adapted]))
        return torch.block_diag(*(next(pieces) if each.adapted else b.new_zeros(each.rows, 0) for each in self.parts))


class AdaptedLinear(Linear, Switched):
    """A linear layer with the weight of another, frozen, and adapters beside it; those called `active` are added."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.adapters = nn.ModuleDict()
        self.active = OWN_SET

    def forward(self, input: Tensor) -> Tensor:
        output = super().forward(input)
        return output if self.active is None else output + self.adapters[self.active](input)

    def low_rank(self, adapters: str = OWN_SET) -> LowRank:
        """The adapters of this name."""
        found = self.adapters[adapters]
        assert isinstance(found, LowRank)
        return found


def adapt(model: LanguageModel | ScalarModel, settings: LoraConfig) -> None:
    """Freezes the model's weights but those of `also_train`, and sets adapters, all zero, beside those of `targets`.

    Raises ConfigError for a pattern that matches nothing, or nothing but experts and routers, which get no adapters.
    """
    modules = dict(model.named_modules())
    layers = {name: each for name, each in modules.items() if isinstance(each, nn.Linear) and ".blocks." in name}
    layout = layout_for(model.config)
    held = {name: their_parts(layout, model.config, name, layer.out_features) for name, layer in layers.items()}
    experts = [name for name, each in modules.items() if isinstance(each, ExpertLinear | Router)]
    _check("targets", settings.targets, [*layers, *(part for parts in held.values() for part in parts)], experts)
    adapted = {}
    for name, parts in held.items():
        wanted = [Part(part, rows, _matches(settings.targets, name, part)) for part, rows in parts.items()]
        if any(part.adapted for part in wanted):
            adapted[name] = wanted
    others = [name for name in modules if name not in adapted and list(modules[name].parameters(recurse=False))]
    _check("also_train", settings.also_train, others)
    model.requires_grad_(False)
    for name in others:
        if name == "score" or _matches(settings.also_train, name):  # the head of a reward model is new
            modules[name].requires_grad_(True)
    for name, wanted in adapted.items():
        layer = AdaptedLinear(layers[name])
        layer.adapters[OWN_SET] = LowRank(layer, wanted, settings)
        model.set_submodule(name, layer)


@torch.no_grad()
def initialise_adapters(model: nn.Module, *key: int | str, adapters: str = OWN_SET) -> None:
    """Draws each A from U(-1 / sqrt(I), 1 / sqrt(I)), on the CPU, by `key` and name; B stays zero, and so the sum.

    Kaiming-uniform with a = sqrt(5), as in the authors' code and `peft`.
    """
    for name, layer in adapted_layers(model):
        generator, bound = torch.Generator().manual_seed(derive_seed(*key, name)), layer.in_features**-0.5
        a = layer.low_rank(adapters).lora_A
        a.copy_(torch.empty(a.shape).uniform_(-bound, bound, generator=generator))


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, AdaptedLinear]]:
    """The layers with adapters, by name."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, AdaptedLinear))


def using(model: nn.Module, adapters: str | None) -> AbstractContextManager[None]:
    """Within, the adapters of this name are added, or with None no adapters."""
    return switched_to(dict.fromkeys(switched_layers(model), adapters))


class WithoutAdapters(nn.Module):
    """A model with its adapters switched off: the one that it was before, bit for bit, without memory of its own."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, tokens: Tensor, *, read: Read | None = None, same_as: Tensor | None = None) -> Any:
        with using(self.model, None):
            return self.model(tokens, read=read, same_as=same_as, **self.options)


class AdaptedActorCritic(SharedActorCritic):
    """A policy with adapters, and a value model on its frozen trunk: adapters of its own, and a head of zeros."""

    def __init__(self, policy: LanguageModel, settings: LoraConfig) -> None:
        super().__init__(policy)
        for _, layer in adapted_layers(policy):
            layer.adapters[VALUE_SET] = LowRank(layer, layer.low_rank().parts, settings)

    def flops_per_token(self, sequence_length: int, predicted: float = 1.0) -> float:
        """Those of the policy, and of its trunk once more."""
        again = self.policy.trunk.flops_per_token(sequence_length)
        return self.policy.flops_per_token(sequence_length, predicted) + again

    def forward(
        self, tokens: Tensor, *, read: Read | None = None, values: bool = True, same_as: Tensor | None = None
    ) -> Any:
        """As that of `ActorCritic`."""
        found = self.policy(tokens, read=read, same_as=same_as)
        if not values:
            return found
        with using(self.policy, VALUE_SET):
            return found, self.values(self.policy.trunk(tokens, same_as=same_as))


@torch.no_grad()
def merged_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole state dict of a model as that of one without adapters: each product is added to its weight."""
    merged = {name: value for name, value in state.items() if ".adapters." not in name}
    for name, layer in adapted_layers(model):
        a, b = (state[f"{name}.adapters.{OWN_SET}.{matrix}"] for matrix in ("lora_A", "lora_B"))
        merged[f"{name}.weight"] = merged[f"{name}.weight"] + layer.low_rank().product(a, b)
    return merged


def _matches(patterns: Iterable[str], *names: str) -> bool:
    return any(re.fullmatch(rf"(.*\.)?({pattern})", name) for pattern in patterns for name in names)


def _check(key: str, patterns: Iterable[str], names: Sequence[str], experts: Sequence[str] = ()) -> None:
    for pattern in patterns:
        if not _matches([pattern], *names):
            if _matches([pattern], *experts):
                raise ConfigError(
                    f"adapter.{key}: {pattern!r} matches experts and their routers alone, which get no adapters: leave"
                    " it out, or train them as they are with adapter.also_train"
                )
            known = ", ".join(dict.fromkeys(re.sub(r"^.*\.\d+\.|^trunk\.", "", name) for name in names))
            raise ConfigError(f"adapter.{key}: {pattern!r} matches no module of this model; there are {known}")
