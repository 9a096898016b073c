"""The blocked attention against float64 and against torch's own kernel; it runs on any processor."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.config.schema import ModelConfig
from llmtrain.kernels import cpu_attention
from llmtrain.models.heads import LanguageModel


def _run(attend, tensors: list[Tensor], grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    leaves = [tensor.to(dtype).requires_grad_() for tensor in tensors]
    attended = attend(*leaves)
    return [attended.double(), *(part.double() for part in torch.autograd.grad(attended, leaves, grad.to(dtype)))]


def _torch_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize("length", [2, 63, 64, 200])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("kept_length", [512, 0])
@pytest.mark.parametrize("whole_length", [256, 0])
def test_equals_softmax_attention(
    length: int, kv_heads: int, kept_length: int, whole_length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks and whole, with probabilities kept and made again."""
    monkeypatch.setattr(cpu_attention, "KEPT_LENGTH", kept_length)
    monkeypatch.setattr(cpu_attention, "WHOLE_LENGTHS", {torch.bfloat16: whole_length, torch.float32: whole_length})
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, heads, length, 16) for heads in (6, kv_heads, kv_heads, 6)]
    *tensors, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
        expected = _run(_torch_attention, [tensor.to(dtype) for tensor in tensors], grad.to(dtype), torch.float64)
        found = _run(cpu_attention.causal_attention, tensors, grad, dtype)
        for one, other in zip(found, expected, strict=True):
            assert (one - other).norm() <= tolerance * max(other.norm().item(), 1.0)


@pytest.mark.parametrize("asking", [1, 63, 65, 199])
@pytest.mark.parametrize("kept_length", [512, 0])
@pytest.mark.parametrize("whole_length", [256, 0])
def test_the_last_positions_may_ask_alone(
    asking: int, kept_length: int, whole_length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_attention, "KEPT_LENGTH", kept_length)
    monkeypatch.setattr(cpu_attention, "WHOLE_LENGTHS", {torch.float32: whole_length})
    generator = torch.Generator().manual_seed(asking)
    query, key, value, grad = (torch.randn(2, heads, 200, 16, generator=generator).double() for heads in (6, 2, 2, 6))
    grad[:, :, :-asking] = 0
    expected = _run(_torch_attention, [query, key, value], grad, torch.float64)
    found = _run(
        cpu_attention.causal_attention, [query[:, :, -asking:], key, value], grad[:, :, -asking:], torch.float32
    )
    expected[:2] = [each[:, :, -asking:] for each in expected[:2]]
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 2e-6 * other.norm()


@pytest.mark.parametrize("asking", [9, 4])
def test_operators_are_sound_for_compilers(asking: int) -> None:
    query, key, value = (torch.randn(2, heads, 9, 8, requires_grad=True) for heads in (4, 2, 2))
    torch.library.opcheck(cpu_attention._forward, (query.detach()[:, :, -asking:].requires_grad_(), key, value))


def test_model_takes_it_where_it_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without gradients alike: where a rollout is read, the numbers are those of training."""
    calls = []
    monkeypatch.setattr(cpu_attention, "is_faster", lambda query: query.dtype == torch.bfloat16)
    monkeypatch.setattr(
        cpu_attention,
        "causal_attention",
        lambda *heads, attend=cpu_attention.causal_attention: calls.append(1) or attend(*heads),
    )
    config = ModelConfig(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, max_sequence_length=32)
    model = LanguageModel(config, 61).initialise(torch.Generator().manual_seed(0))
    tokens = torch.arange(10)[None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trained = model(tokens)
        with torch.no_grad():
            evaluated = model(tokens)
    assert len(calls) == 2 * config.num_layers
    assert torch.equal(trained, evaluated)


def test_lengths_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short rows in float32 and very long ones stay with torch's kernel."""
    monkeypatch.setattr(cpu_attention, "PRODUCTS_WITHOUT_TILES", True)
    found = {
        (str(dtype).removeprefix("torch."), length): cpu_attention.is_faster(torch.empty(1, 1, length, 8, dtype=dtype))
        for dtype in (torch.bfloat16, torch.float32, torch.float64) for length in (128, 512, 2048)
    }  # fmt: skip
    assert [key for key, faster in found.items() if faster] == [("bfloat16", 128), ("bfloat16", 512), ("float32", 512)]


def test_lengths_may_be_left_open_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "PRODUCTS_WITHOUT_TILES", True)
    seen = torch.compile(lambda query: query * cpu_attention.is_faster(query), backend="eager", dynamic=True)
    for length in (255, 256, 700):
        query = torch.ones(1, 1, length, 8)
        assert torch.equal(seen(query), query * (length >= 256))


def test_is_compiled_with_a_length_left_open() -> None:
    compiled = torch.compile(cpu_attention.causal_attention, backend="aot_eager", dynamic=True)
    for length in (65, 70, 140):
        heads = [torch.randn(2, count, length, 8) for count in (4, 2, 2)]
        grad = torch.randn(2, 4, length, 8)
        expected = _run(cpu_attention.causal_attention, heads, grad, torch.float32)
        for one, other in zip(_run(compiled, heads, grad, torch.float32), expected, strict=True):
            assert torch.equal(one, other)


def test_several_portions_of_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few heads are taken at a time, the result is the same."""
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(3, count, 70, 8, generator=generator) for count in (4, 2, 2)]
    grad = torch.randn(heads[0].shape, generator=generator)
    whole = _run(cpu_attention.causal_attention, [*heads], grad, torch.float32)
    monkeypatch.setattr(cpu_attention, "SCORES_BYTES", 1)
    one_by_one = _run(cpu_attention.causal_attention, [*heads], grad, torch.float32)
    for one, other in zip(whole, one_by_one, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
