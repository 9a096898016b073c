"""Initial weights: how wide the normal distribution is that a matrix is drawn from, by its name and shape.

Shapes: O outputs and I inputs of a matrix, H hidden size, L layers, l a layer from 1.
"""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llmtrain.config.schema import ModelConfig, MupInitConfig, T5InitConfig

# The projections of a block whose outputs are added to the residual stream.
INTO_RESIDUAL = (
    "attention.output.weight", "feed_forward.down.weight",
    "feed_forward.expert_down.weight", "feed_forward.shared.down.weight",
)  # fmt: skip


class Matrix(NamedTuple):
    """Where a matrix stands."""

    inputs: int
    """I; of an embedding, whose inputs are single tokens or positions, its width."""
    layer: int | None
    """l; None for embeddings and the head."""
    name: str
    """Of the parameter in its part of the model."""
    into_residual: bool
    """Whether what it makes is added to the residual stream."""


def gpt2(config: ModelConfig, matrix: Matrix) -> float:
    """σ, and σ / √(2 L) into the residual stream, of which there are 2 L; Radford et al. 2019, section 2.3."""
    return config.init_std / (2 * config.num_layers) ** 0.5 if matrix.into_residual else config.init_std


def normal(config: ModelConfig, matrix: Matrix) -> float:
    """σ everywhere, as OLMo 2 has it (arXiv 2501.00656)."""
    return config.init_std


def scaled(config: ModelConfig, matrix: Matrix) -> float:
    """1 / √I, and 1 / √(2 I l) into the residual stream: earlier layers say more.

    By layer after Zhang et al. 2019 (arXiv 1908.11365), with the constants of OLMo's `mitchell` (arXiv 2402.00838),
    which also cuts the distribution at three standard deviations.
    """
    depth = 2 * matrix.layer if matrix.into_residual and matrix.layer is not None else 1
    return (matrix.inputs * depth) ** -0.5


def small(config: ModelConfig, matrix: Matrix) -> float:
    """√(2 / (5 H)), and 2 / (L √H) into the residual stream; GPT-NeoX-20B (arXiv 2204.06745, section 2.3.1).

    The first is Nguyen and Salazar's (2019, arXiv 1910.05895), the second Wang's, of GPT-J.
    """
    if matrix.into_residual:
        return 2 / (config.num_layers * config.hidden_size**0.5)
    return (2 / (5 * config.hidden_size)) ** 0.5


def t5(config: ModelConfig, matrix: Matrix) -> float:
    """That of Mesh TensorFlow in T5 (Raffel et al. 2020, arXiv 1910.10683), as Transformers' T5 begins.

        embeddings of tokens, positions, segments    1
        queries                                      1 / √(H D), D being the width of a head
        keys, values, what goes into the layers      1 / √H
        attention's output, of I = Q D inputs        1 / √I, as for the feed-forward part's, of I = F
        relative positions                           1 / √H
        routers, experts, a head of its own          1 / √I, Mesh TensorFlow's for all that says nothing else

    Scores need no other scale than queries have, and the width is taken off a tied head's hidden states. Those of the
    blocks are multiplied by the root of `variance_scale` (Fedus et al. 2021, arXiv 2101.03961, section 2.4). Mesh
    TensorFlow also cuts the distribution at two standard deviations; Transformers gives a head of its own, and routers,
    deviation 1, with which logits of normalised states would have √H.
    """
    if matrix.name.endswith("_embedding.weight"):
        return 1.0
    if matrix.name == "relative_bias.weight":
        return config.hidden_size**-0.5
    inputs = matrix.inputs * (config.head_size if matrix.name.endswith("attention.query.weight") else 1)
    scale = config.init.variance_scale if isinstance(config.init, T5InitConfig) and matrix.layer is not None else 1.0
    return (scale / inputs) ** 0.5


def mup(config: ModelConfig, matrix: Matrix) -> float:
    """That of `gpt2`, over √m in the layers, m being how much wider they are than those of the base model.

    Yang et al. 2022 (arXiv 2203.03466, table 8): variances of matrices between widths go with 1 / I.
    """
    return gpt2(config, matrix) * (1.0 if matrix.layer is None else config.width_ratio**-0.5)


STANDARD_DEVIATIONS: dict[str, Callable[[ModelConfig, Matrix], float]] = {
    "gpt2": gpt2,
    "normal": normal,
    "scaled": scaled,
    "small": small,
    "t5": t5,
    "mup": mup,
}


def drawn_matrix(config: ModelConfig, name: str, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Initial values [O, I] of the parameter of this name in the model, as `config.init` says, from a CPU generator."""
    layer = re.search(r"\bblocks\.(\d+)\.", name)
    matrix = Matrix(shape[-1], int(layer[1]) + 1 if layer else None, name, name.endswith(INTO_RESIDUAL))
    std = STANDARD_DEVIATIONS[config.init.name](config, matrix)
    values = torch.empty(tuple(shape)).normal_(0.0, std, generator=generator)
    if isinstance(config.init, MupInitConfig):
        if config.init.zero_head and name == "head.weight":
            values.zero_()
        elif config.init.zero_query and name.endswith("attention.qkv.weight"):
            values[: config.num_heads * config.head_size] = 0.0
    elif isinstance(config.init, T5InitConfig) and name.endswith("attention.qkv.weight"):
        values[: config.num_heads * config.head_size] *= config.head_size**-0.5
    return values


def draw(config: ModelConfig, name: str, parameter: Tensor, generator: torch.Generator) -> None:
    """Draws a matrix of the model anew as `drawn_matrix` does; biases become 0, and norms as if they had no weight."""
    if parameter.ndim > 1 and not name.endswith("bias"):
        parameter.copy_(drawn_matrix(config, name, parameter.shape, generator))
    else:
        no_weight = 0.0 if config.norm == "zero_centred_rmsnorm" else 1.0
        parameter.fill_(0.0 if name.endswith("bias") else no_weight)
