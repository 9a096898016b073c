"""A Transformer, from token ids to hidden states; `heads.py` makes models of it.

    embedding (+ positions) → num_layers x [ x + attention(norm(x)) → x + feed_forward(norm(x)) ] → norm

With learned positions, LayerNorm, GELU and biases this is GPT-2 (Radford et al. 2019); with rotary positions,
RMSNorm, SwiGLU and grouped queries it is Llama (Touvron et al. 2023, arXiv 2302.13971; arXiv 2307.09288). The other
families differ in where the norms stand, in what a layer sees, and in single parts: an encoder sees both directions
(BERT), and a decoder beside one attends to what that has read, between the two branches (T5).

Shapes: B rows, T positions, S positions of a source, H hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import DynamicScalingConfig, ModelConfig
from llmtrain.models.attention import Attention, Context, KVCache, Source
from llmtrain.models.context_parallel import PositionShare
from llmtrain.models.document_attention import Documents
from llmtrain.models.experts import Experts, make_feed_forward
from llmtrain.models.feed_forward import FeedForward, GatedFeedForward
from llmtrain.models.initialisation import draw
from llmtrain.models.masks import needs_mask, score_mask
from llmtrain.models.norms import make_norm
from llmtrain.models.positions import rotary_tables, rotated_size, sinusoids
from llmtrain.models.recompute import Recompute, recomputed
from llmtrain.models.shared_rows import SharedRows
from llmtrain.models.tensor_parallel import all_of, share_of, sum_gradients


class Block(nn.Module):
    """Attention A and feed-forward part F, added to the stream x, [B, T, H] → [B, T, H]; n are norms of their own.

    - pre: x + A(n(x)), then x + F(n(x)) (Xiong et al. 2020, arXiv 2002.04745, table 1).
    - post: n(x + A(x)), then n(x + F(x)) (Vaswani et al. 2017, arXiv 1706.03762).
    - reordered: x + n(A(x)), then x + n(F(x)) (OLMo 2, arXiv 2501.00656, section 3.2).
    - sandwich: x + n(A(n(x))), then x + n(F(n(x))) (Ding et al. 2021, arXiv 2105.13290; Gemma 2).
    - pre, parallel: x + A(n(x)) + F(n(x)), both behind one norm or each behind its own (GPT-J, GPT-NeoX).

    In a decoder beside an encoder, cross-attention stands between them, in the same way as they do.

    While training with stochastic depth p, each row leaves each branch of layer l of L out with probability p l / L,
    and the branches that are kept are divided by the rest (Huang et al. 2016, arXiv 1603.09382, equations 4 and 5;
    divided in training instead of multiplied afterwards, as dropout is).
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.skipped = config.stochastic_depth * (layer + 1) / config.num_layers
        self.placement, self.order = config.norm_placement, config.block
        has_first, has_last = self.placement != "reordered", self.placement in ("reordered", "sandwich")
        has_second = has_first and self.order != "parallel_shared_norm"
        is_normed = layer == 0 and config.embedding_norm == "first"  # by the norm behind the embeddings
        crosses = config.architecture == "encoder_decoder"
        self.attention_norm = make_norm(config) if has_first and not is_normed else None
        self.attention = Attention(config, layer)
        self.attention_output_norm = make_norm(config) if has_last else None
        self.cross_attention_norm = make_norm(config) if has_first and crosses else None
        self.cross_attention = Attention(config, layer, crosses=True) if crosses else None
        self.cross_attention_output_norm = make_norm(config) if has_last and crosses else None
        self.feed_forward_norm = make_norm(config) if has_second else None
        self.feed_forward = make_feed_forward(config, layer)
        self.feed_forward_output_norm = make_norm(config) if has_last else None

    def forward(self, hidden: Tensor, context: Context, cache: KVCache | None = None) -> Tensor:
        if self.order != "sequential":
            return self._parallel(hidden, context, cache)
        attended = self.attention(self._before(self.attention_norm, hidden), context, cache)
        hidden = self._added(hidden, attended, self.attention_norm, self.attention_output_norm)
        if self.cross_attention is not None:
            crossed = self.cross_attention(self._before(self.cross_attention_norm, hidden), context, cache)
            hidden = self._added(hidden, crossed, self.cross_attention_norm, self.cross_attention_output_norm)
        transformed = self._transformed(self._before(self.feed_forward_norm, hidden), context)
        return self._added(hidden, transformed, self.feed_forward_norm, self.feed_forward_output_norm)

    def _parallel(self, hidden: Tensor, context: Context, cache: KVCache | None) -> Tensor:
        normed = self._before(self.attention_norm, hidden)
        attended = self.attention(normed, context, cache)
        normed = normed if self.feed_forward_norm is None else self.feed_forward_norm(hidden)
        transformed = self._transformed(normed, context)
        return hidden + self._thinned(attended) + self._thinned(transformed)

    def _transformed(self, normed: Tensor, context: Context) -> Tensor:
        """A dense part goes position by position; that experts are even, and have room, is a matter of rows."""
        sparse = isinstance(self.feed_forward, Experts)
        transformed: Tensor = self.feed_forward(normed, context.rows) if sparse else self.feed_forward(normed)
        return transformed

    def _before(self, norm: nn.Module | None, hidden: Tensor) -> Tensor:
        return hidden if norm is None or self.placement == "post" else norm(hidden)

    def _added(self, hidden: Tensor, branch: Tensor, norm: nn.Module | None, output_norm: nn.Module | None) -> Tensor:
        if output_norm is not None:
            branch = output_norm(branch.to(hidden.dtype))  # under autocast it is of another
        hidden = hidden + self._thinned(branch)
        return norm(hidden) if self.placement == "post" and norm is not None else hidden

    def _thinned(self, branch: Tensor) -> Tensor:
        """The branch after dropout and stochastic depth, which draw from torch's own generator."""
        branch = F.dropout(branch, self.dropout, self.training)
        if self.skipped == 0.0 or not self.training:
            return branch
        kept = torch.rand(len(branch), 1, 1, device=branch.device) >= self.skipped
        return torch.where(kept, branch / (1.0 - self.skipped), 0.0)


class Transformer(nn.Module):
    """The trunk of every model: tokens [B, T] int64 → hidden states [B, T, H] after the last norm.

    With `embeds=False` it has no table of tokens of its own and is handed one.
    Raises ConfigError where the sizes in `config` do not divide each other.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, *, embeds: bool = True) -> None:
        super().__init__()
        _check_sizes(config)
        self.config = config
        self.vocab_size = vocab_size
        self.windows = config.windows
        self.recompute: Recompute = "none"  # which activations of the blocks are not kept
        scale = config.embedding_scale
        self.embedding_scale = config.hidden_size**0.5 if scale == "sqrt_hidden_size" else scale
        if embeds:
            self.token_embedding = nn.Embedding(vocab_size, config.hidden_size)
        if config.positions == "learned":
            places = config.max_sequence_length + config.position_offset
            self.position_embedding = nn.Embedding(places, config.hidden_size)
        if config.num_segments:
            self.segment_embedding = nn.Embedding(config.num_segments, config.hidden_size)
        self.embedding_norm = make_norm(config) if config.embedding_norm != "none" else None
        if config.positions == "relative":
            self.relative_bias = nn.Embedding(config.relative_buckets, config.num_heads)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.final_norm = make_norm(config) if config.norm_placement != "post" else nn.Identity()
        self.share: PositionShare | None = None
        self.tensor_group: ProcessGroup | None = None

    def forward(
        self, tokens: Tensor, positions: Tensor | None = None, cache: KVCache | None = None,
        documents: Tensor | None = None, same_as: Tensor | None = None, segments: Tensor | None = None,
        prefix: Tensor | None = None, source: Source | None = None, table: Tensor | None = None,
        layers: range | None = None, hidden: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Hidden states [B, T, H] of tokens [B, T].

        `positions` [B or 1, T] default to 0, 1, 2, ..., or with a cache to the ones that follow its tokens, which
        `cache.begin` has given where they are set. With a cache, the first call takes the right-padded prompts and
        every later one a single token for each row.
        `documents` [B, T], non-decreasing in a row: tokens see their own document alone, in which positions start at 0.
        `same_as` [B, T] int64: number b · T + t of the position that is computed in the place of each, itself or one
        with the same tokens up to it in a row above; −1: nobody asks for it, and what stands there means nothing.
        `segments` [B, T] int64: the kind of each token's segment, all 0 where they are not given. `prefix` [B, T]
        bool: tokens that those before them see too. `source`: what cross-attention looks at. `table` [V, H]: in the
        place of an own token embedding. `layers`: go through these alone, from `hidden` [B, T, H], what the ones before
        have made (None: these are the first); the last norm belongs to the last of all.
        """
        assert self.config.is_causal or (cache is None and same_as is None), "an encoder computes whole rows"
        assert prefix is None or (cache is None and same_as is None), "a prefix is one of whole rows"
        assert cache is None or documents is None, "a cache holds one document for each row"
        assert same_as is None or (positions is None and cache is None and documents is None), "whole rows alone"
        assert cache is None or cache.width == 0 or tokens.shape[1] == 1, "after the prompts: one token at a time"
        if self.share is not None and cache is None:
            assert all(each is None for each in (positions, same_as, layers)), "whole rows are shared out"
            return self._forward_share(self.share, tokens, documents, prefix)
        dropout = self.config.dropout if self.training else 0.0
        within = None if documents is None else Documents.of(documents, dropout, is_causal=self.config.is_causal)
        rows = None if same_as is None else SharedRows.of(same_as)
        length = tokens.shape[1]
        if rows is not None:
            tokens, positions = rows.gather(tokens), rows.positions()  # [1, N] each
        elif positions is None and within is not None:
            positions = within.positions()
        elif positions is None and cache is not None:
            positions = cache.begin(tokens, self._relative())
        elif positions is None:
            positions = torch.arange(length, device=tokens.device)[None]  # [1, T]
        lengths: Tensor | int = length
        if cache is not None:
            lengths = positions[:, 0] + 1 if cache.adding else cache.lengths
        if hidden is None:
            hidden = self._embed(tokens, positions, segments, table)
        layers = range(len(self.blocks)) if layers is None else layers
        contexts = {
            window: self._context(window, positions, length, lengths, within, rows, prefix, source)
            for window in {*self.windows[layers.start : layers.stop]}
        }
        hidden = self._through(layers, hidden, contexts, cache)
        return hidden if rows is None else rows.spread(hidden)

    def _through(
        self, layers: range, hidden: Tensor, contexts: dict[int | None, Context], cache: KVCache | None = None
    ) -> Tensor:
        """The hidden states after these layers, and after the last norm where they are the last ones."""
        kind, length, group = self.recompute if torch.is_grad_enabled() else "none", hidden.shape[1], self.tensor_group
        if group is not None:
            hidden = share_of(hidden, group)
            contexts = {window: context._replace(length=length) for window, context in contexts.items()}
        for layer in layers:
            block, inputs = self.blocks[layer], (hidden, contexts[self.windows[layer]], cache)
            hidden = block(*inputs) if kind == "none" else recomputed(block, kind, *inputs)
        hidden = self.final_norm(hidden) if layers.stop == len(self.blocks) else hidden
        return hidden if group is None else all_of(hidden, group, length)

    def _forward_share(
        self, share: PositionShare, tokens: Tensor, documents: Tensor | None, prefix: Tensor | None
    ) -> Tensor:
        """`forward` of rows whose positions several processes compute, each its own.

        In training the others' are zeros here, for they have their losses there; else they are gathered.
        """
        length, tokens = tokens.shape[1], share.filled_up(tokens)
        documents = None if documents is None else share.filled_up(documents)
        prefix = None if prefix is None else share.filled_up(prefix)
        columns, keys = share.columns(length, tokens.device), torch.arange(tokens.shape[1], device=tokens.device)
        places = keys[None] if documents is None else Documents(documents, None).positions()
        places = places[:, columns].clamp(max=length - 1)  # what fills rows up has none
        contexts = {}
        for window in {*self.windows}:
            rotary = rotary_tables(self.config, places, window, length) if self.config.positions == "rope" else None
            scores = score_mask(self.config, window, columns[None], keys, documents, prefix, self._relative())
            contexts[window] = Context(rotary, scores, share=share)
        hidden = self._through(range(len(self.blocks)), self._embed(tokens[:, columns], places), contexts)
        return share.in_rows(hidden, length, alone=self.training)

    def split_positions(self, mesh: DeviceMesh) -> None:
        """Compute this process's share of the positions of all rows; raises ConfigError where a part cannot be so."""
        config = self.config
        parts = {
            f"architecture {config.architecture}": config.architecture != "decoder",
            "experts": config.experts is not None,
            "stochastic depth, which leaves out whole rows": config.stochastic_depth > 0,
        }
        for part, present in parts.items():
            if present:
                raise ConfigError(f"engine.context_parallel: it does not go with {part}. Leave it at 1.")
        self.share = PositionShare(mesh.get_group())

    def split_tensors(self, mesh: DeviceMesh) -> None:
        """Keep this process's share of the heads, of the inner sizes, and between them of the positions.

        Embeddings and head stay whole.

        Raises ConfigError where that is not even, and for a model with a part that is not shared out.
        """
        config = self.config
        parts = {
            f"model.positions={config.positions}": config.positions in ("alibi", "relative"),
            "model.qk_norm=full": config.qk_norm == "full",
            "model.dropout above 0": config.dropout > 0,
            "model.attention_sinks": config.attention_sinks,
            "experts, which engine.expert_parallel shares out": config.experts is not None,
        }
        for part, present in parts.items():
            if present:
                raise ConfigError(f"engine.tensor_parallel: it does not go with {part}. Leave it at 1.")
        self.tensor_group = mesh.get_group()
        for module in [self.final_norm, *(child for block in self.blocks for child in block.children())]:
            if isinstance(module, Attention | FeedForward | GatedFeedForward):
                module.split(mesh)
            else:  # a norm, which sees this process's positions
                sum_gradients(module, self.tensor_group)

    @property
    def matrices(self) -> list[Tensor]:
        """The weights of the blocks' matrix products, [O, I], of experts [E, O, I]."""
        return [each for name, each in self.blocks.named_parameters() if each.ndim > 1 and not name.endswith("bias")]

    def flops_per_token(self, sequence_length: int) -> float:
        """Floating-point operations per token, forward and backward, of sequences of this length, without a head.

        `flops_per_weight` for each weight in a matrix product, and 12 T Q D for each layer's attention (arXiv
        2204.02311, appendix B), half of that where nothing ahead is computed, and less with a window. Cross-attention
        is over a source of the same length. Of routed experts, those count that a token goes through.
        """
        products = sum(each.numel() * used_share(self.config, each) * flops_per_weight(each) for each in self.matrices)
        seen = sum(_mean_seen(window, sequence_length, self.config.is_causal) for window in self.windows)
        if self.config.architecture == "encoder_decoder":
            seen += self.config.num_layers * float(sequence_length)
        return products + 12.0 * seen * self.config.num_heads * self.config.head_size

    def _embed(
        self, tokens: Tensor, positions: Tensor, segments: Tensor | None = None, table: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        hidden = self.token_embedding(tokens) if table is None else F.embedding(tokens, table)  # [B, T, H]
        if self.embedding_scale != 1.0:
            hidden = hidden * self.embedding_scale
        if self.config.num_segments:
            hidden = hidden + self.segment_embedding(torch.zeros_like(tokens) if segments is None else segments)
        if self.config.positions == "learned":
            hidden = hidden + self.position_embedding(positions + self.config.position_offset)
        elif self.config.positions == "sinusoidal":
            hidden = hidden + sinusoids(positions, self.config.hidden_size).to(hidden.dtype)
        if self.embedding_norm is not None:
            hidden = self.embedding_norm(hidden)
        return F.dropout(hidden, self.config.dropout, self.training)

    def _context(
        self, window: int | None, positions: Tensor, length: int, lengths: Tensor | int,
        documents: Documents | None, rows: SharedRows | None,
        prefix: Tensor | None = None, source: Source | None = None,
    ) -> Context:  # fmt: skip
        """For the layers with this window.

        `positions` are those that are computed, in rows of `length` columns that hold sequences of `lengths` tokens.
        """
        rotary = rotary_tables(self.config, positions, window, lengths) if self.config.positions == "rope" else None
        numbers = None if documents is None else documents.numbers
        if prefix is not None or needs_mask(self.config, window, length):
            columns = torch.arange(length, device=positions.device)
            scores = score_mask(self.config, window, columns[None], columns, numbers, prefix, self._relative())
            return Context(rotary, scores, rows=rows, source=source)
        mask = None if documents is None else documents.mask
        return Context(rotary, mask, numbers if mask is None else None, rows, source)

    def _relative(self) -> Tensor | None:
        """What relative positions add to the scores, [buckets, Q]."""
        return self.relative_bias.weight if self.config.positions == "relative" else None

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Draws all weights anew: matrices as `drawn_matrix` does, biases 0, norms as if they had no weight.

        Drawn on the CPU in the order of the parameters, whatever device they are on, from a CPU generator.
        """
        for name, parameter in self.named_parameters():
            draw(self.config, name, parameter, generator)


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


def _mean_seen(window: int | None, length: int, is_causal: bool) -> float:
    """How many of `length` positions one sees on average: T / 2, or w - w² / 2T with a window w; else twice as many."""
    behind = window - window * window / (2.0 * length) if window is not None and window < length else length / 2.0
    return behind if is_causal else 2.0 * behind


def _check_sizes(config: ModelConfig) -> None:
    heads, kv_heads = config.num_heads, config.kv_heads
    if config.head_dim is None and config.hidden_size % heads:
        raise ConfigError(
            f"model.num_heads={heads} does not divide model.hidden_size={config.hidden_size}: change one of them,"
            " or give model.head_dim"
        )
    if heads % kv_heads:
        raise ConfigError(f"model.num_kv_heads={kv_heads} does not divide model.num_heads={heads}: change one of them")
    rotated = rotated_size(config)
    if config.positions == "rope" and isinstance(config.rope_scaling, DynamicScalingConfig) and rotated == 2:
        raise ConfigError("model.rope_scaling.name=dynamic needs heads of which more than 2 dimensions are rotated")
    if config.positions == "rope" and (rotated == 0 or rotated % 2):
        raise ConfigError(
            f"{rotated} of {config.head_size} dimensions of a head would be rotated (model.hidden_size="
            f"{config.hidden_size}, model.num_heads={heads}, model.head_dim, model.partial_rotary_factor), which is odd"
            " or nothing, but rotary positions turn dimensions in pairs: change one, or take other model.positions"
        )
