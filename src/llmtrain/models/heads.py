"""Models: a Transformer trunk with a head on it.

Shapes: B rows, T positions, H hidden size, V vocabulary.
"""

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.config.schema import ModelConfig
from llmtrain.models.attention import KVCache, Source
from llmtrain.models.division import Divisible
from llmtrain.models.feed_forward import ACTIVATIONS, GATES
from llmtrain.models.initialisation import draw
from llmtrain.models.meta import on_meta
from llmtrain.models.norms import make_norm
from llmtrain.models.transformer import Transformer, flops_per_weight

# What is done with the last hidden states [B, T, H] and the head's weight [V, H], inside the model's forward; where the
# logits are capped, it is called with the keyword `softcap`, and where they have a bias [V], with the keyword `bias`.
Read = Callable[..., Any]


def logits(
    hidden: Tensor, head_weight: Tensor, softcap: float | None = None, bias: Tensor | None = None
) -> Tensor:  # fmt: skip
    """[..., V] of hidden states [..., H] and the head's weight [V, H]; capped to c tanh(z / c) with `softcap` c."""
    return capped(F.linear(hidden, head_weight, bias), softcap)


def capped(values: Tensor, softcap: float | None) -> Tensor:
    """c tanh(z / c) in the dtype of z, or z without a cap (Gemma 2, arXiv 2408.00118, section 2)."""
    return values if softcap is None else softcap * torch.tanh(values / softcap)


class MaskedTokenHead(nn.Module):
    """norm(f(W x + b)), [..., H] → [..., H], before the output matrix, and the bias behind that (Devlin et al. 2019).

    arXiv 1810.04805; f is the feed-forward part's, or that of its gate.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.activation = (ACTIVATIONS | GATES)[config.activation]
        self.dense = nn.Linear(config.hidden_size, config.hidden_size, bias=config.has_bias("mlp"))
        self.norm = make_norm(config)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden: Tensor) -> Tensor:
        normed: Tensor = self.norm(self.activation(self.dense(hidden)))
        return normed


class LanguageModel(Divisible):
    """Predicts the next token, or masked ones: logits = head · hidden, scaled and capped where it is said so.

    The weights are random in torch's own way until `initialise` is called or a state is loaded.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.trunk = Transformer(config, vocab_size)
        if config.pooler:
            self.pooler = nn.Linear(config.hidden_size, config.hidden_size)
            self.next_sentence = nn.Linear(config.hidden_size, 2)
        if config.mlm_head:
            self.mlm_head = MaskedTokenHead(config, vocab_size)
        if not config.tied_embeddings:
            self.head = nn.Linear(config.hidden_size, vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """The output matrix [V, H]; the token embedding itself where they are tied."""
        return self.trunk.token_embedding.weight if self.config.tied_embeddings else self.head.weight

    @property
    def shared_by_ends(self) -> list[Tensor]:
        """The token embedding, where it is the output matrix too."""
        return [self.trunk.token_embedding.weight] if self.config.tied_embeddings else []

    def flops_per_token(self, sequence_length: int, predicted: float = 1.0) -> float:
        """`Transformer.flops_per_token`, and those of the head for the share of the tokens that are predicted."""
        head = flops_per_weight(self.head_weight) * self.config.hidden_size * self.vocab_size
        if self.config.mlm_head:
            head += flops_per_weight(self.mlm_head.dense.weight) * self.config.hidden_size**2
        return self.trunk.flops_per_token(sequence_length) + predicted * head

    def forward(
        self,
        tokens: Tensor,
        *,
        read: Read | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        documents: Tensor | None = None,
        same_as: Tensor | None = None,
        segments: Tensor | None = None,
        prefix: Tensor | None = None,
        pooled: bool = False,
        layers: range | None = None,
        hidden: Tensor | None = None,
    ) -> Any:
        """Logits [B, T, V] of tokens [B, T] int64, or `read(hidden, head_weight)` without making the logits.

        `read` runs inside forward because a sharded weight is whole only there. `positions`, `cache`, `documents`,
        `same_as`, `segments` and `prefix` are those of `Transformer.forward`. With `pooled`, a pair: that, and the
        logits [B, 2] of whether the second segment follows the first (0) or not (1).
        With `layers` and `hidden`, those of `Transformer.forward` too, the hidden states [B, T, H] after these layers
        unless they are the last.
        """
        hidden = self.trunk(
            tokens, positions, cache, documents, same_as, segments, prefix, layers=layers, hidden=hidden
        )  # fmt: skip
        if layers is not None and layers.stop < len(self.trunk.blocks):
            return hidden
        found = self._read(hidden, read)
        return (found, self._follows(hidden)) if pooled else found

    def _read(self, hidden: Tensor, read: Read | None) -> Any:
        """What is asked of the last hidden states [B, T, H]."""
        more: dict[str, Any] = {} if self.config.logit_softcap is None else {"softcap": self.config.logit_softcap}
        if self.config.mlm_head:
            hidden, more["bias"] = self.mlm_head(hidden), self.mlm_head.bias
        if self.config.logit_scale != 1.0:
            hidden = hidden * self.config.logit_scale
        return (read or logits)(hidden, self.head_weight, **more)

    def _follows(self, hidden: Tensor) -> Tensor:
        """[B, 2] of hidden states [B, T, H]: W tanh(P h₀ + p) + w (arXiv 1810.04805, section 3.1)."""
        follows: Tensor = self.next_sentence(torch.tanh(self.pooler(hidden[:, 0])))
        return follows

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> Self:
        """Draws all weights anew from a CPU generator, as `Transformer.initialise` does; the head last."""
        for name, part in self.named_children():
            if isinstance(part, Transformer):
                part.initialise(generator)
                continue
            for key, parameter in part.named_parameters(prefix=name):
                draw(self.config, key, parameter, generator)
        return self


class EncoderDecoder(LanguageModel):
    """Predicts the next token of a text from those before it and from a source, which an encoder reads.

    Vaswani et al. 2017 (arXiv 1706.03762), Raffel et al. 2020 (arXiv 1910.10683). `trunk` is the decoder; the encoder
    takes its tokens from the same table.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__(config, vocab_size)
        self.encoder = Transformer(config.encoder, vocab_size, embeds=False)

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated parts of both, in order: the units of sharding."""
        return [*self.encoder.blocks, *self.trunk.blocks]

    def flops_per_token(self, sequence_length: int, predicted: float = 0.5) -> float:
        """The mean over the tokens of a source and of a text, both of this length; only the text's are predicted."""
        text = super().flops_per_token(sequence_length, 2.0 * predicted)
        return (text + self.encoder.flops_per_token(sequence_length)) / 2.0

    def forward(  # type: ignore[override]
        self,
        tokens: Tensor,
        *,
        source: Tensor | None = None,
        source_lengths: Tensor | None = None,
        read: Read | None = None,
        cache: KVCache | None = None,
    ) -> Any:
        """Logits [B, T, V] of tokens [B, T] int64, which begin with the start token, or `read(hidden, head_weight)`.

        `source` [B, S] int64, right-padded, of which `source_lengths` [B] tokens count (None: all). With a cache, the
        first call keeps what the source is to every layer, and later calls are without it.
        """
        read_source = None if source is None else self.encode(source, source_lengths)
        return self._read(self.trunk(tokens, cache=cache, source=read_source), read)

    def encode(self, source: Tensor, source_lengths: Tensor | None = None) -> Source:
        """What the decoder sees of the source: the encoder's last hidden states [B, S, H], and which count."""
        table, places = self.trunk.token_embedding.weight, torch.arange(source.shape[1], device=source.device)
        if source_lengths is None:
            everything = None if self.config.attention_softcap is None else (places >= 0)[None, None, None]
            return Source(self.encoder(source, table=table), everything)
        is_padding = places >= source_lengths[:, None]
        states = self.encoder(source, documents=is_padding.to(torch.int32), table=table)
        return Source(states, ~is_padding[:, None, None])


def make_model(config: ModelConfig, vocab_size: int) -> LanguageModel:
    """The model of this architecture."""
    kind = EncoderDecoder if config.architecture == "encoder_decoder" else LanguageModel
    return kind(config, vocab_size)


class ScalarModel(Divisible):
    """One score for each position: a reward or value model.

    `score_mean` and `score_std` belong to the weights: what `normalised` takes off and divides by.
    """

    score_mean: Tensor
    score_std: Tensor

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.trunk = Transformer(config, vocab_size)
        self.score = nn.Linear(config.hidden_size, 1, bias=False)
        self.register_buffer("score_mean", torch.tensor(0.0))
        self.register_buffer("score_std", torch.tensor(1.0))

    @classmethod
    def from_language_model(cls, model: LanguageModel, generator: torch.Generator) -> Self:
        """A copy of the language model's trunk with a new score head, on the same device."""
        with on_meta():
            scalar_model = cls(model.config, model.vocab_size)
        scalar_model = scalar_model.to_empty(device=model.head_weight.device)
        scalar_model.trunk = copy.deepcopy(model.trunk)
        scalar_model.initialise_score(generator)
        return scalar_model.train(model.training)

    def flops_per_token(self, sequence_length: int, predicted: float = 0.0) -> float:
        """`Transformer.flops_per_token`; the score head is nothing beside it."""
        return self.trunk.flops_per_token(sequence_length)

    def forward(
        self, tokens: Tensor, *, same_as: Tensor | None = None, layers: range | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Scores [B, T] float32 of tokens [B, T], not normalised; each has seen the tokens up to its own.

        `same_as` is that of `Transformer.forward`; so are `layers` and `hidden`, with which hidden states [B, T, H]
        come out unless these layers are the last.
        """
        hidden = self.trunk(tokens, same_as=same_as, layers=layers, hidden=hidden)
        if layers is not None and layers.stop < len(self.trunk.blocks):
            return hidden
        # A product and a sum instead of a matrix product: autocast would take that in bfloat16.
        return (hidden.float() * self.score.weight[0]).sum(dim=-1)

    def normalised(self, scores: Tensor) -> Tensor:
        """(scores - score_mean) / score_std."""
        return (scores - self.score_mean) / self.score_std

    @property
    def is_normalised(self) -> bool:
        """Whether mean and standard deviation are those of scores, not those that a new head starts with."""
        return (float(self.score_mean), float(self.score_std)) != (0.0, 1.0)

    def initialise(self, generator: torch.Generator) -> Self:
        """Draws all weights anew from a CPU generator."""
        self.trunk.initialise(generator)
        self.initialise_score(generator)
        return self

    @torch.no_grad()
    def zero_score(self) -> Self:
        """Makes all scores zero: a value model that has no reward model to start from."""
        self.score.weight.zero_()
        return self

    @torch.no_grad()
    def initialise_score(self, generator: torch.Generator) -> None:
        """Draws the score head from N(0, 1 / (H + 1)) and resets mean and standard deviation to 0 and 1.

        Huang et al. 2024 (arXiv 2403.17031, detail 11), after Stiennon et al. 2020 (arXiv 2009.01325).
        """
        hidden_size = self.config.hidden_size
        drawn = torch.empty(self.score.weight.shape).normal_(0.0, (hidden_size + 1) ** -0.5, generator=generator)
        self.score.weight.copy_(drawn)
        self.score_mean.fill_(0.0)
        self.score_std.fill_(1.0)


class ActorCritic(nn.Module):
    """A policy and a value model with weights of their own, as one module: one optimizer, one forward pass."""

    def __init__(self, policy: LanguageModel, value: ScalarModel) -> None:
        super().__init__()
        self.policy = policy
        self.value = value

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated parts of both: the units of sharding."""
        return self.policy.blocks + self.value.blocks

    def flops_per_token(self, sequence_length: int, predicted: float = 1.0) -> float:
        """Floating-point operations per token of both."""
        return self.policy.flops_per_token(sequence_length, predicted) + self.value.flops_per_token(sequence_length)

    def forward(
        self, tokens: Tensor, *, read: Read | None = None, values: bool = True, same_as: Tensor | None = None
    ) -> Any:
        """The policy's logits [B, T, V] or `read(hidden, head_weight)`, and the values [B, T] float32, if wanted.

        `same_as` is that of `Transformer.forward`. Values are the value model's normalised scores: started from a
        reward model, they start in the unit of the rewards that the policy is trained on.
        """
        found = self.policy(tokens, read=read, same_as=same_as)
        return (found, self.value.normalised(self.value(tokens, same_as=same_as))) if values else found


class SharedActorCritic(nn.Module):
    """A policy and a value head on its own hidden states, as one module; the head starts with zeros.

    So the first values are zero, as in Ziegler et al. 2019 (arXiv 1909.08593); both losses train the trunk.
    """

    def __init__(self, policy: LanguageModel) -> None:
        super().__init__()
        self.policy = policy
        self.value = nn.Linear(policy.config.hidden_size, 1, bias=False, device=policy.head_weight.device)
        nn.init.zeros_(self.value.weight)

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated parts of the policy: the units of sharding."""
        return self.policy.blocks

    def flops_per_token(self, sequence_length: int, predicted: float = 1.0) -> float:
        """Those of the policy; the value head is nothing beside it."""
        return self.policy.flops_per_token(sequence_length, predicted)

    def forward(
        self, tokens: Tensor, *, read: Read | None = None, values: bool = True, same_as: Tensor | None = None
    ) -> Any:
        """As that of `ActorCritic`."""

        def both(hidden: Tensor, head_weight: Tensor, **softcap: Any) -> tuple[Any, Tensor]:
            return (read or logits)(hidden, head_weight, **softcap), self.values(hidden)

        return self.policy(tokens, read=both if values else read, same_as=same_as)

    def values(self, hidden: Tensor) -> Tensor:
        """Values [B, T] float32 of hidden states [B, T, H]."""
        return (hidden.float() * self.value.weight[0]).sum(dim=-1)


def trained_share(model: nn.Module) -> str:
    """How many parameters are trained, of how many, in words."""
    total = sum(each.numel() for each in model.parameters())
    trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
    return f"{trained:,} of {total:,} parameters are trained ({trained / total:.2%})"
