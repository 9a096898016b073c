"""How positions enter: rotary embedding with its scalings, sinusoidal embedding, ALiBi's slopes, T5's buckets.

Rotary embedding is in the half-split convention of Transformers: dimension d pairs with d + R/2.

Shapes: B rows, T positions, N heads, D head size, R rotated dimensions of a head (all D, or the first of them),
H hidden size, Q query heads.
"""

import math

import torch
from torch import Tensor

from llmtrain.config.schema import (
    DynamicScalingConfig,
    LinearScalingConfig,
    Llama3ScalingConfig,
    ModelConfig,
    RopeScaling,
    YarnScalingConfig,
)

RotaryTables = tuple[Tensor, Tensor]


def rotary_tables(
    config: ModelConfig, positions: Tensor, window: int | None = None, lengths: Tensor | int | None = None
) -> RotaryTables:
    """Cosines and signed sines of the rotation angles, each [B or 1, T, 1, R] float32, for positions [B or 1, T].

    The angle of pair d at position p is p · theta^(-2d/R) (Su et al. 2021, arXiv 2104.09864, eq. 15), or with
    `rope_scaling` p times a scaled frequency. They are computed in each forward pass rather than kept as buffers: a
    buffer would follow the weights to bfloat16, and would have to be rebuilt after a start on the meta device.
    `window` is that of the layers which they are for; `lengths` [B], or one for all rows, are those of the sequences,
    which dynamic scaling goes by.
    """
    theta, scaling, factor = config.rope_theta, config.rope_scaling, 1.0
    if window is not None and config.rope_local_theta is not None:
        theta, scaling = config.rope_local_theta, None
    if isinstance(scaling, YarnScalingConfig):
        factor = scaling.attention_factor or 1.0 + 0.1 * math.log(scaling.factor)
    size = rotated_size(config)
    exponents = torch.arange(0, size, 2, device=positions.device, dtype=torch.float32) / size
    frequencies = 1.0 / theta**exponents if scaling is None else _scaled(scaling, theta, exponents, size, lengths)
    make = _opaque_tables if torch.compiler.is_compiling() else _tables
    tables: RotaryTables = make(positions, frequencies, factor)
    return tables


def _tables(positions: Tensor, frequencies: Tensor, factor: float) -> RotaryTables:
    """Of positions [B or 1, T] and frequencies [R/2] or, of each row, [B, 1, 1, R/2]; multiplied by a factor."""
    angles = positions.to(torch.float32)[..., None, None] * frequencies  # [B or 1, T, 1, R/2]
    cosines, sines = angles.cos(), angles.sin()
    if factor != 1.0:
        cosines, sines = cosines * factor, sines * factor
    return torch.cat((cosines, cosines), dim=-1), torch.cat((-sines, sines), dim=-1)


# The compiler would make cosines and sines anew in every layer, for every row, rather than read them from a table.
_opaque_tables = torch.library.custom_op("llmtrain::rotary_tables", _tables, mutates_args=())
_opaque_tables.register_fake(_tables)


def rotated_size(config: ModelConfig) -> int:
    """R."""
    return int(config.head_size * config.partial_rotary_factor)


def rotate(heads: Tensor, tables: RotaryTables) -> Tensor:
    """The heads [B, T, N, D] turned by the angles of their positions, in the dtype they came in.

    (x1, x2) → (x1 cos - x2 sin, x2 cos + x1 sin) for the two halves of what is rotated (arXiv 2104.09864, eq. 34).
    """
    cosines, signed_sines = tables
    size = cosines.shape[-1]
    if size < heads.shape[-1]:
        return torch.cat((rotate(heads[..., :size], tables), heads[..., size:]), dim=-1)
    first, second = heads.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    return torch.addcmul(heads * cosines, swapped, signed_sines).to(heads.dtype)


def _scaled(
    scaling: RopeScaling, theta: float, exponents: Tensor, size: int, lengths: Tensor | int | None
) -> Tensor:  # fmt: skip
    """The frequencies of the pairs, [R/2], or with dynamic scaling of rows of different lengths [B, 1, 1, R/2]."""
    if isinstance(scaling, LinearScalingConfig):
        return 1.0 / theta**exponents / scaling.factor
    if isinstance(scaling, DynamicScalingConfig):
        return 1.0 / _grown_base(scaling, theta, size, lengths, exponents.device) ** exponents
    if isinstance(scaling, Llama3ScalingConfig):
        return _llama3(scaling, 1.0 / theta**exponents)
    return _yarn(scaling, theta, exponents, size)


def _grown_base(
    scaling: DynamicScalingConfig, theta: float, size: int, lengths: Tensor | int | None, device: torch.device
) -> Tensor:
    """theta (f L / L0 - (f - 1))^(R / (R - 2)), L the sequence's length but at least L0, [1 or B, 1, 1, 1].

    NTK-aware scaling of a base that depends on the length: bloc97 and emozilla 2023, as in Transformers.
    """
    assert lengths is not None, "dynamic scaling goes by the lengths of the sequences"
    length = torch.as_tensor(lengths, dtype=torch.float32, device=device).view(-1, 1, 1, 1)
    growth = length.clamp(min=scaling.original_max_sequence_length) / scaling.original_max_sequence_length
    return theta * (scaling.factor * growth - (scaling.factor - 1.0)) ** (size / (size - 2))


def _llama3(scaling: Llama3ScalingConfig, frequencies: Tensor) -> Tensor:
    """Long waves get 1 / factor of their frequency, short ones keep it, in between is a mixture (Llama 3.1's code)."""
    turns = scaling.original_max_sequence_length * frequencies / (2.0 * math.pi)  # in the original length
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - kept) * frequencies / scaling.factor + kept * frequencies


def _yarn(scaling: YarnScalingConfig, theta: float, exponents: Tensor, size: int) -> Tensor:
    """As `_llama3`, the mixture linear in the pair's number (Peng et al. 2023, arXiv 2309.00071, section 3.2)."""

    def pair_that_turns(times: float) -> float:
        waves = scaling.original_max_sequence_length / (times * 2.0 * math.pi)
        return size * math.log(waves) / (2.0 * math.log(theta))

    first = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(scaling.beta_slow)), size - 1)
    pairs = torch.arange(len(exponents), device=exponents.device, dtype=torch.float32)
    divided = ((pairs - first) / max(last - first, 1e-3)).clamp(0.0, 1.0)
    frequencies = 1.0 / theta**exponents
    return divided * frequencies / scaling.factor + (1.0 - divided) * frequencies


def sinusoids(positions: Tensor, hidden_size: int) -> Tensor:
    """sin(p / 10000^(2i/H)) in dimension 2i, cos of the same in 2i + 1: [B or 1, T, H] float32 of [B or 1, T].

    Vaswani et al. 2017 (arXiv 1706.03762, section 3.5).
    """
    exponents = torch.arange(0, hidden_size, 2, device=positions.device, dtype=torch.float32) / hidden_size
    angles = positions.to(torch.float32)[..., None] / 10_000.0**exponents
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def alibi_slopes(num_heads: int) -> list[float]:
    """What a distance of one takes off the scores of each query head, [Q] (Press et al. 2022, arXiv 2108.12409).

    2^(-8 i / Q), i from 1; where Q is no power of two, those of the next smaller power, then every second of the next
    larger one's, as in the authors' code.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    between = [2.0 ** (-8.0 * (i + 1) / (2 * power)) for i in range(0, 2 * power, 2)]
    return (slopes + between)[:num_heads]


def relative_buckets(distance: Tensor, count: int, max_distance: int, *, both_ways: bool) -> Tensor:
    """The bucket of each distance, query's place less key's, any shape, int64 (Raffel et al. 2020, arXiv 1910.10683).

    Half of the buckets are for one distance each, the other half for ranges that grow by a constant factor up to
    `max_distance`, beyond which all share the last. With `both_ways` keys ahead have the upper half of all buckets;
    without, they are as near as can be. As in the authors' code.
    """
    count = count // 2 if both_ways else count
    ahead = (distance < 0) * count if both_ways else 0
    distance = distance.abs() if both_ways else distance.clamp(min=0)
    exact = count // 2
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = (exact + growth * (count - exact)).long().clamp(max=count - 1)
    return torch.where(distance < exact, distance, far) + ahead
