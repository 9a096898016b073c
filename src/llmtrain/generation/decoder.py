"""A language model made ready for decoding: the same modules, their matrices laid out for a few rows at a time.

Decoding reads all weights for each token, so what counts is how they are read. Under autocast they would be cast again
and again; on a CPU a product with few rows spends half of its time on rearranging the matrix.

Shapes: R rows, V vocabulary.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.models.cache import PROMPT_MULTIPLE, KVCache, SourceCache, rounded_up
from llmtrain.models.experts import ExpertLinear
from llmtrain.models.heads import EncoderDecoder, LanguageModel, capped
from llmtrain.models.linear import Linear

PLAIN = (nn.Linear, Linear)  # layers that are a product and nothing else
# Matrices are packed from so many weights on; smaller models live in the processor's caches, and calls cost more.
PACKED_FROM = 4_000_000
# Rows that a layout is made for. It serves any number; made for one row it is slower for all others.
PACKED_FOR = 256
# On a CPU no product is computed with fewer rows: it would go other ways in the kernels and round differently (a single
# row in oneDNN's, up to three in MKL's), and four rows of a packed product even take less time than one.
LEAST_ROWS = 4


class Decoder:
    """Runs a language model over prompts, then over one token at a time.

    It holds the weights of the moment it is made. On a CPU, in one thread, it gives a row the same bits whatever rows
    are beside it; in several, a product is divided by its number of rows.
    """

    def __init__(self, model: LanguageModel) -> None:
        self.config = model.config
        self.device = model.head_weight.device
        self.dtype = _working_dtype(model)
        linears = [module for module in model.modules() if isinstance(module, nn.Linear) and type(module) in PLAIN]
        packed = _can_pack(self.device) and sum(module.weight.numel() for module in linears) >= PACKED_FROM
        shared: dict[int, object] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        for module in linears:
            shared[id(module)] = PreparedLinear(module.weight, module.bias, self.dtype, packed=packed)
        experts = [module for module in model.modules() if isinstance(module, ExpertLinear)]
        shared |= {id(each): each.in_dtype(self.dtype) for each in experts}
        self.head = PreparedLinear(model.head_weight, None, self.dtype, packed=packed)
        self.model = copy.deepcopy(model, shared).eval()  # new modules over the same weights
        self.least_rows = LEAST_ROWS if self.device.type == "cpu" else 1

    def new_cache(self, lengths: Sequence[int], capacity: int) -> KVCache:
        """A cache for rows of such lengths that may grow to `capacity` tokens."""
        return KVCache(self.config, lengths, capacity, dtype=self.dtype, device=self.device)

    def free_rows(self, rows: int, sizes: Sequence[tuple[int, int]]) -> KVCache:
        """A cache of rows that take, one after the other, prompts and answers of at most such lengths in tokens."""
        return self.new_cache([0] * rows, max(prompt + answer for prompt, answer in sizes))

    def read_prompts(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, KVCache]:
        """The logits [R, V] that follow each prompt, and the cache of the prompts."""
        tokens = self._padded(prompts)
        cache = self.new_cache([len(prompt) for prompt in prompts], tokens.shape[1])
        return self._first_logits(tokens, cache), cache

    def _padded(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """The prompts as rows [R, T], filled up with zeros on the right."""
        width = rounded_up(max(map(len, prompts)), PROMPT_MULTIPLE)
        return torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=self.device)

    def _first_logits(self, tokens: Tensor, cache: KVCache, **source: Tensor) -> Tensor:
        """The logits [R, V] that follow the last token of each row [R, T] that an empty cache is made for."""
        rows, last = torch.arange(len(tokens), device=self.device), cache.lengths - 1

        def read(hidden: Tensor, _: Tensor, softcap: float | None = None) -> Tensor:
            return capped(self.head(self._filled(hidden[rows, last])), softcap)

        logits: Tensor = self.model(tokens, read=read, cache=cache, **source)
        return logits[: len(tokens)]

    def read_tokens(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """The logits [R, V] that follow one token more of each row, [R]."""

        def read(hidden: Tensor, _: Tensor, softcap: float | None = None) -> Tensor:
            return capped(self.head(hidden[:, 0]), softcap)

        logits: Tensor = self.model(self._filled(tokens)[:, None], read=read, cache=cache)
        return logits[: len(tokens)]

    def _filled(self, rows: Tensor) -> Tensor:
        """Rows [R, ...] and as many of zeros as make up the least number."""
        lacking = self.least_rows - len(rows)
        return F.pad(rows, (*[0] * (2 * rows.ndim - 1), lacking)) if lacking > 0 else rows


class SourceDecoder(Decoder):
    """A decoder whose prompts are the sources that its encoder reads, once; every answer begins with `start_token`."""

    def __init__(self, model: EncoderDecoder, start_token: int) -> None:
        super().__init__(model)
        self.start_token = start_token

    def free_rows(self, rows: int, sizes: Sequence[tuple[int, int]]) -> KVCache:
        """As that of `Decoder`; answers stand by themselves, behind the start token."""
        cache = self.new_cache([0] * rows, 1 + max(answer for _, answer in sizes))
        return self._beside_sources(cache, [0] * rows, max(prompt for prompt, _ in sizes))

    def read_prompts(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, KVCache]:
        """The logits [R, V] of each answer's first token, and the cache."""
        sources, lengths = self._padded(prompts), [len(prompt) for prompt in prompts]
        cache = self._beside_sources(self.new_cache([1] * len(prompts), 1), lengths, sources.shape[1])
        # as many columns as are read together, so that no product has a few rows alone
        tokens = torch.full((len(prompts), PROMPT_MULTIPLE), self.start_token, device=self.device)
        source_lengths = torch.tensor(lengths, device=self.device)
        return self._first_logits(tokens, cache, source=sources, source_lengths=source_lengths), cache

    def _beside_sources(self, cache: KVCache, lengths: Sequence[int], capacity: int) -> KVCache:
        cache.source = SourceCache(self.config, lengths, capacity, dtype=self.dtype, device=self.device)
        return cache


class PreparedLinear(nn.Module):
    """x Wᵀ + b with the weight in the dtype of the product, [..., in] → [..., out].

    `packed`: the weight is rearranged once for the CPU's kernel, by the operator that torch's own compiler uses when
    weights are frozen. In float32 the result may then round differently from the plain product.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *, packed: bool) -> None:
        super().__init__()
        self.packed = packed
        self.weight = weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        if packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous(), PACKED_FOR)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden.to(self.weight.dtype)
        if not self.packed:
            return F.linear(hidden, self.weight, self.bias)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(hidden, self.weight, self.bias, "none", [], "")
        return product


def _can_pack(device: torch.device) -> bool:
    return device.type == "cpu" and torch.backends.mkldnn.is_available()


def _working_dtype(model: LanguageModel) -> torch.dtype:
    """What matrix products give: autocast's dtype if it is on, else that of the weights."""
    device_type = model.head_weight.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return model.head_weight.dtype
