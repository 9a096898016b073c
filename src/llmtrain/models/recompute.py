"""Activations that are not kept for the backward pass but made again (Chen et al. 2016, arXiv 1604.06174)."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    noop_context_fn,
)

from llmtrain.kernels import cpu_product, grouped_product  # noqa: F401 (they register the operators named below)
from llmtrain.models.switched import Switched, switched_layers, switched_to

Recompute = Literal["none", "selective", "full"]
# What is long to compute for its size: matrix products and attention (Korthikanti et al. 2022, arXiv 2205.05198,
# section 5, turned round: attention's kernels keep no scores; ours for processors may, and is left out).
COSTLY = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.linear.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.llmtrain.product.default,
    torch.ops.llmtrain.grouped_product.default,
}


def recomputed(block: nn.Module, kind: Recompute, *inputs: Any) -> Tensor:
    """block(*inputs), of which only the inputs (full), or the costly results too (selective), are kept.

    The backward pass computes the rest again, with the same random draws, up to what it wants last, and with the same
    adapters: by then others may be switched on.
    """
    contexts: Callable[[], Any] = noop_context_fn
    if kind == "selective":
        contexts = partial(create_selective_checkpoint_contexts, _policy)
    active = {layer: layer.active for layer in switched_layers(block)}
    # a compiler has seen which adapters they are
    compute = _switched(block, active) if active and not torch.compiler.is_compiling() else block
    found: Tensor = checkpoint(compute, *inputs, use_reentrant=False, context_fn=contexts)
    return found


def _switched(block: nn.Module, active: Mapping[Switched, str | None]) -> Callable[..., Tensor]:
    def compute(*inputs: Any) -> Tensor:
        with switched_to(active):
            found: Tensor = block(*inputs)
        return found

    return compute


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in COSTLY else CheckpointPolicy.PREFER_RECOMPUTE
