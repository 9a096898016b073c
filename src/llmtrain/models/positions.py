"""Rotary position embedding, in the half-split convention of Transformers: dimension d pairs with d + D/2.

Shapes: B rows, T positions, N heads, D head size.
"""

import torch
from torch import Tensor

RotaryTables = tuple[Tensor, Tensor]


def rotary_tables(positions: Tensor, head_size: int, theta: float) -> RotaryTables:
    """Cosines and signed sines of the rotation angles, each [B or 1, T, 1, D] float32, for positions [B or 1, T].

    The angle of pair d at position p is p · theta^(-2d/D) (Su et al. 2021, arXiv 2104.09864, eq. 15). They are
    computed in each forward pass rather than kept as buffers: a buffer would follow the weights to bfloat16, and
    would have to be rebuilt after a start on the meta device.
    """
    make = _opaque_tables if torch.compiler.is_compiling() else _tables
    tables: RotaryTables = make(positions, head_size, theta)
    return tables


def _tables(positions: Tensor, head_size: int, theta: float) -> RotaryTables:
    exponents = torch.arange(0, head_size, 2, device=positions.device, dtype=torch.float32) / head_size
    angles = positions.to(torch.float32)[..., None, None] * (1.0 / theta**exponents)  # [B or 1, T, 1, D/2]
    cosines, sines = angles.cos(), angles.sin()
    return torch.cat((cosines, cosines), dim=-1), torch.cat((-sines, sines), dim=-1)


# The compiler would make cosines and sines anew in every layer, for every row, rather than read them from a table.
_opaque_tables = torch.library.custom_op("llmtrain::rotary_tables", _tables, mutates_args=())


@_opaque_tables.register_fake
def _table_shapes(positions: Tensor, head_size: int, theta: float) -> RotaryTables:
    cosines = positions.new_empty((*positions.shape, 1, head_size), dtype=torch.float32)
    return cosines, torch.empty_like(cosines)


def rotate(heads: Tensor, tables: RotaryTables) -> Tensor:
    """The heads [B, T, N, D] turned by the angles of their positions, in the dtype they came in.

    (x1, x2) → (x1 cos - x2 sin, x2 cos + x1 sin) for the two halves of a head (arXiv 2104.09864, eq. 34).
    """
    cosines, signed_sines = tables
    first, second = heads.chunk(2, dim=-1)
    swapped = torch.cat((second, first), dim=-1)
    return torch.addcmul(heads * cosines, swapped, signed_sines).to(heads.dtype)
