"""Rows of several documents: each as if it were alone."""

import dataclasses

import pytest
import torch
from torch import Tensor

from llmtrain.config.schema import ModelConfig
from llmtrain.kernels import cpu_attention
from llmtrain.models.cache import KVCache
from llmtrain.models.document_attention import Documents, _forward, document_attention
from llmtrain.models.heads import LanguageModel

VOCAB_SIZE = 61
LLAMA = ModelConfig(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, max_sequence_length=32)
GPT2 = ModelConfig(
    num_layers=2, hidden_size=32, num_heads=4, max_sequence_length=32, positions="learned", norm="layernorm",
    activation="gelu_tanh", bias=True,
)  # fmt: skip
BERT = dataclasses.replace(GPT2, architecture="encoder", num_kv_heads=2, norm_placement="post", mlm_head=True)
BOTH = pytest.mark.parametrize("config", [LLAMA, GPT2, BERT], ids=["llama", "gpt2", "bert"])
DIRECTIONS = pytest.mark.parametrize("is_causal", [True, False])
LENGTHS = [[5, 1, 14, 4], [24], [1, 1, 22]]
WAYS = pytest.mark.parametrize("masked", [False, True], ids=["one by one", "masked"])


def build(config: ModelConfig, dtype: torch.dtype = torch.float32) -> LanguageModel:
    model = LanguageModel(config, VOCAB_SIZE).initialise(torch.Generator().manual_seed(0)).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # at first attention is nearly even, whatever it sees
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    return model


def numbers() -> Tensor:
    return torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in LENGTHS]).int()


def tokens(seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (len(LENGTHS), 24), generator=torch.Generator().manual_seed(seed))


def use_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other devices do, and dropout."""
    one_by_one = Documents.of
    monkeypatch.setattr(Documents, "of", lambda numbers, dropout, **kind: one_by_one(numbers, 0.1, **kind))


@BOTH
@WAYS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_outputs_and_gradients_are_those_of_separate_passes(
    config: ModelConfig, masked: bool, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if masked:
        use_mask(monkeypatch)
    model, weight = build(config, dtype), torch.randn(3, 24, VOCAB_SIZE, dtype=dtype)
    together = model(tokens(), documents=numbers())
    (together * weight).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    alone = torch.stack(
        [
            torch.cat([model(document[None])[0] for document in row.split(lengths)])
            for row, lengths in zip(tokens(), LENGTHS, strict=True)
        ]
    )
    (alone * weight).sum().backward()
    torch.testing.assert_close(together, alone, atol=tolerance * float(alone.detach().abs().max()), rtol=0)
    for name, parameter in model.named_parameters():
        assert (gradients[name] - parameter.grad).norm() <= tolerance * parameter.grad.norm(), name


@BOTH
@WAYS
def test_other_documents_change_nothing(config: ModelConfig, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if masked:
        use_mask(monkeypatch)
    model, documents = build(config), numbers()
    first, second = tokens(), tokens(seed=2)
    mine = documents == 2
    second[mine] = first[mine]
    one, other = model(first, documents=documents), model(second, documents=documents)
    assert mine.sum() == 14 + 22
    assert torch.equal(one[mine], other[mine])
    assert not torch.isclose(model(first)[mine], model(second)[mine]).all()


@BOTH
def test_one_document_is_no_document(config: ModelConfig) -> None:
    model, row = build(config), tokens()
    torch.testing.assert_close(model(row, documents=torch.full((3, 24), 7)), model(row), atol=1e-5, rtol=1e-5)


def test_positions_start_anew() -> None:
    found = Documents.of(torch.tensor([[0, 0, 3, 3, 3, 4], [1, 1, 1, 1, 1, 1]]), 0.0).positions()
    assert found.tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]


def test_dropout_acts_within_documents() -> None:
    model = build(dataclasses.replace(GPT2, dropout=0.5)).train()
    row, documents = tokens(), numbers()
    assert not torch.allclose(model(row, documents=documents), model(row, documents=documents))
    changed = row.clone()
    changed[documents == 0] = 0
    torch.manual_seed(0)
    before = model(row, documents=documents)
    torch.manual_seed(0)
    after = model(changed, documents=documents)
    assert torch.equal(before[documents == 1], after[documents == 1])


def test_bfloat16_takes_the_faster_kernel_for_each_document(monkeypatch: pytest.MonkeyPatch) -> None:
    generator, calls = torch.Generator().manual_seed(0), []
    shapes = [(3, heads, 24, 16) for heads in (4, 2, 2, 4)]
    *tensors, grad = (torch.randn(shape, generator=generator, dtype=torch.bfloat16) for shape in shapes)
    found = {}
    for fast in (False, True):
        monkeypatch.setattr(cpu_attention, "is_faster", lambda query, fast=fast: calls.append(fast) or fast)
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        attended = document_attention(*leaves, numbers())
        found[fast] = [attended, *torch.autograd.grad(attended, leaves, grad)]
    assert calls.count(True) == calls.count(False) == 2 * sum(map(len, LENGTHS))
    for one, other in zip(found[False], found[True], strict=True):
        assert (one - other).norm() <= 2e-2 * other.norm()


@DIRECTIONS
def test_operators_are_sound_for_compilers(is_causal: bool) -> None:
    tensors = [torch.randn(3, heads, 24, 8, requires_grad=True) for heads in (4, 2, 2)]
    torch.library.opcheck(_forward, (*tensors, numbers(), is_causal))
    projected = [torch.randn(3, 24, heads, 8).transpose(1, 2).requires_grad_() for heads in (4, 2, 2)]
    torch.library.opcheck(_forward, (*projected, numbers(), is_causal))


def test_a_cache_takes_no_documents() -> None:
    cache = KVCache(LLAMA, [24] * 3, 24, dtype=torch.float32, device=torch.device("cpu"))
    with pytest.raises(AssertionError):
        build(LLAMA)(tokens(), cache=cache, documents=numbers())


@pytest.mark.slow
@BOTH
@WAYS
def test_compiles_in_one_graph(config: ModelConfig, masked: bool) -> None:
    model = build(dataclasses.replace(config, dropout=1e-9 if masked else 0.0)).train()
    row, documents = tokens(), numbers()
    gradients = []
    torch.compiler.reset()  # it compiles the same code for eight kinds of models, and no more
    for run in (model, torch.compile(model, fullgraph=True)):
        logits = run(row, documents=documents)
        gradients.append([logits, *torch.autograd.grad(logits.logsumexp(dim=-1).sum(), list(model.parameters()))])
    for wanted, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
