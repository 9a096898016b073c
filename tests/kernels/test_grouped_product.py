"""Products by group against float64, forward and backward; the kernel of torch against the loop."""

import pytest
import torch
from torch import Tensor

from llmtrain.kernels.grouped_product import LEAST_ROWS, grouped_kernel, grouped_product, weight_gradient

SIZES = [5, 0, 1, 3, 9, 0]
BEHIND = 4


def made(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [N, I], of groups of different sizes and some of none; weights [E, O, I]; where the groups end."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(SIZES) + BEHIND, 16, generator=generator, dtype=torch.float64)
    weight = torch.randn(len(SIZES), 24, 16, generator=generator, dtype=torch.float64)
    return rows.to(dtype), weight.to(dtype), torch.tensor(SIZES).cumsum(0)


def by_row(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """One product for each row."""
    groups = torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES))
    inside = torch.stack([weight[group] @ row for group, row in zip(groups, rows, strict=False)])
    return torch.cat([inside, inside.new_zeros(BEHIND, inside.shape[1])])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_equals_a_product_for_each_row(dtype: torch.dtype, tolerance: float) -> None:
    rows, weight, ends = made()
    grad = torch.randn(len(rows), 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, expected = [], []
    for function, results, kind in ((grouped_product, found, dtype), (by_row, expected, torch.float64)):
        leaves = [each.detach().to(kind).requires_grad_() for each in (rows, weight)]
        outputs = function(*leaves, ends)
        results += [outputs, *torch.autograd.grad(outputs, leaves, grad.to(kind))]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, atol=tolerance, rtol=tolerance)
    assert not found[0][-BEHIND:].any()
    assert not found[1][-BEHIND:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernel_of_torch_equals_the_loop(dtype: torch.dtype) -> None:
    """On a CPU torch runs its grouped kernel as a loop of its own, with the same meaning."""
    rows, weight, ends = made(dtype)
    torch.testing.assert_close(grouped_kernel(rows, weight, ends), grouped_product(rows, weight, ends))
    inside = int(ends[-1])
    grad = torch.randn(inside, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    theirs = torch.nn.functional.grouped_mm(grad.T, rows[:inside], offs=ends.int())
    torch.testing.assert_close(theirs, weight_gradient(grad, rows[:inside], ends))


def test_a_row_has_the_same_bits_whatever_is_beside_it() -> None:
    _, weight, _ = made(torch.float32)
    row = torch.randn(1, 16, generator=torch.Generator().manual_seed(2))
    alone = grouped_product(row, weight, torch.ones(len(SIZES), dtype=torch.int64))
    for others in (1, LEAST_ROWS - 1, LEAST_ROWS, 50, 400):
        rows = torch.cat([row, torch.randn(others, 16)])
        ends = torch.full((len(SIZES),), len(rows))
        assert torch.equal(grouped_product(rows, weight, ends)[:1], alone)


def test_operators_are_sound_for_compilers() -> None:
    rows, weight, ends = made(torch.float32)
    torch.library.opcheck(grouped_product, (rows.requires_grad_(), weight.requires_grad_(), ends))
    torch.library.opcheck(weight_gradient, (torch.randn(len(rows), 24), rows.detach(), ends))
