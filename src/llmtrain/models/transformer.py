"""A pre-norm decoder-only Transformer, from token ids to hidden states; `heads.py` makes models of it.

    embedding (+ learned positions) → num_layers x [ x + attention(norm(x)) → x + feed_forward(norm(x)) ] → norm

With learned positions, LayerNorm, GELU and biases this is GPT-2 (Radford et al. 2019); with rotary positions,
RMSNorm, SwiGLU and grouped queries it is Llama (Touvron et al. 2023, arXiv 2302.13971; arXiv 2307.09288).

Shapes: B rows, T positions, H hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import ModelConfig
from llmtrain.models.attention import Attention, KVCache
from llmtrain.models.document_attention import Documents
from llmtrain.models.experts import make_feed_forward
from llmtrain.models.norms import make_norm
from llmtrain.models.positions import RotaryTables, rotary_tables

# The projections of a block whose outputs are added to the residual stream.
INTO_RESIDUAL = ("attention.output.weight", "feed_forward.down.weight", "feed_forward.shared.down.weight")


class Block(nn.Module):
    """Attention and feed-forward part, each behind a norm and added to the stream, [B, T, H] → [B, T, H].

    Pre-norm: Xiong et al. 2020 (arXiv 2002.04745, table 1).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, layer)
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = make_feed_forward(config, layer)

    def forward(
        self, hidden: Tensor, rotary: RotaryTables | None = None, cache: KVCache | None = None,
        documents: Documents | None = None,
    ) -> Tensor:  # fmt: skip
        attended = self.attention(self.attention_norm(hidden), rotary, cache, documents)
        hidden = hidden + F.dropout(attended, self.dropout, self.training)
        transformed = self.feed_forward(self.feed_forward_norm(hidden))
        return hidden + F.dropout(transformed, self.dropout, self.training)


class Transformer(nn.Module):
    """The trunk of every model: tokens [B, T] int64 → hidden states [B, T, H] after the last norm.

    Raises ConfigError where the sizes in `config` do not divide each other.
    """

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        _check_sizes(config)
        self.config = config
        self.vocab_size = vocab_size
        self.token_embedding = nn.Embedding(vocab_size, config.hidden_size)
        if config.positions == "learned":
            self.position_embedding = nn.Embedding(config.max_sequence_length, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_norm = make_norm(config)

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, cache: KVCache | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Hidden states [B, T, H] of tokens [B, T].

        `positions` [B or 1, T] default to 0, 1, 2, ..., or with a cache to the ones that follow its tokens, which
        `cache.begin` has given where they are set. With a cache, the first call takes the right-padded prompts and
        every later one a single token for each row.
        `documents` [B, T], non-decreasing in a row: tokens see their own document alone, in which positions start at 0.
        """
        assert cache is None or documents is None, "a cache holds one document for each row"
        assert cache is None or cache.width == 0 or tokens.shape[1] == 1, "after the prompts: one token at a time"
        dropout = self.config.dropout if self.training else 0.0
        within = None if documents is None else Documents.of(documents, dropout)
        if positions is None and within is not None:
            positions = within.positions()
        elif positions is None and cache is not None:
            positions = cache.begin(tokens)
        elif positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]  # [1, T]
        hidden, rotary = self._embed(tokens, positions)
        for block in self.blocks:
            hidden = block(hidden, rotary, cache, within)
        return self.final_norm(hidden)

    def flops_per_token(self, sequence_length: int) -> float:
        """Floating-point operations per token, forward and backward, of sequences of this length, without a head.

        `flops_per_weight` for each weight in a matrix product, and 6 T H for each layer's attention: half of the usual
        12 T H (arXiv 2204.02311, appendix B), since nothing ahead is computed. Of routed experts, those count that a
        token goes through.
        """
        weights = [each for name, each in self.blocks.named_parameters() if each.ndim > 1 and not name.endswith("bias")]
        products = sum(each.numel() * used_share(self.config, each) * flops_per_weight(each) for each in weights)
        return products + 6.0 * self.config.num_layers * sequence_length * self.config.hidden_size

    def _embed(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, RotaryTables | None]:
        hidden = self.token_embedding(tokens)  # [B, T, H]
        rotary = None
        if self.config.positions == "learned":
            hidden = hidden + self.position_embedding(positions)
        else:
            rotary = rotary_tables(positions, self.config.hidden_size // self.config.num_heads, self.config.rope_theta)
        return F.dropout(hidden, self.config.dropout, self.training), rotary

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draws all weights anew: N(0, init_std²), into the residual stream init_std / sqrt(2 num_layers); biases 0.

        Radford et al. 2019, section 2.3. Drawn on the CPU in the order of the parameters, whatever device they
        are on, from a CPU generator.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1 or name.endswith("bias"):
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            std = self.config.init_std
            if name.endswith(INTO_RESIDUAL):
                std /= (2 * self.config.num_layers) ** 0.5
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))


def used_share(config: ModelConfig, weight: Tensor) -> float:
    """Of a weight in a matrix product: how much of it a token goes through; with experts ([E, O, I]), some of them."""
    if config.experts is None or weight.ndim < 3:
        return 1.0
    return config.experts.experts_per_token / config.experts.num_experts


def flops_per_weight(weight: Tensor) -> float:
    """Of a weight in a matrix product, for each token: 6 (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).

    A third of them is for its own gradient, which a frozen one has not.
    """
    return 6.0 if weight.requires_grad else 4.0


def _check_sizes(config: ModelConfig) -> None:
    heads, kv_heads = config.num_heads, config.num_kv_heads or config.num_heads
    if config.hidden_size % heads:
        raise ConfigError(
            f"model.num_heads={heads} does not divide model.hidden_size={config.hidden_size}: change one of them"
        )
    if heads % kv_heads:
        raise ConfigError(f"model.num_kv_heads={kv_heads} does not divide model.num_heads={heads}: change one of them")
    if config.positions == "rope" and (config.hidden_size // heads) % 2:
        raise ConfigError(
            f"model.hidden_size={config.hidden_size} / model.num_heads={heads} is odd, but rotary positions turn"
            " dimensions in pairs: choose an even head size, or model.positions=learned"
        )
