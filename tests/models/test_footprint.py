"""What is counted of a model against what torch keeps of it."""

import dataclasses
import math

import pytest
import torch
from tests.models.small import published
from tests.tiny import MODELS, TINY_MODELS, tiny_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from llmtrain.config.schema import ModelConfig
from llmtrain.kernels import cpu_attention
from llmtrain.models.footprint import (
    activation_bytes,
    num_active,
    num_parameters,
    num_without_embeddings,
    weights_by_name,
)
from llmtrain.models.heads import EncoderDecoder, LanguageModel, make_model
from llmtrain.models.meta import on_meta


def without_numbers(config: ModelConfig, vocab_size: int) -> LanguageModel:
    with on_meta():
        return make_model(config, vocab_size)


def test_parameters_are_told_apart() -> None:
    model = published("llama2_70b")
    lines, total = weights_by_name(model), num_parameters(model)
    assert sum(line.numel for line in lines) == total == 68_976_648_192
    [gate_up] = [line for line in lines if line.name == "trunk.blocks.*.feed_forward.gate_up.weight"]
    assert gate_up[1:] == ((2 * 28672, 8192), 80, 80 * 2 * 28672 * 8192)
    tables = 2 * 32_000 * 8192
    assert num_without_embeddings(model) == total - tables
    norms = (2 * 80 + 1) * 8192
    assert num_active(model) == total - tables // 2 - norms
    tied = published("gpt2_small")
    assert num_without_embeddings(tied) == 124_439_808 - (50257 + 1024) * 768


@pytest.mark.parametrize("name", TINY_MODELS)
def test_what_is_counted_is_what_is_built_and_multiplied(name: str) -> None:
    """Parameters of the model as it is built; of its products those that torch's own counter sees."""
    config, vocab_size, tokens = tiny_model(name), 300, torch.zeros(2, 24, dtype=torch.int64)
    model, counted = make_model(config, vocab_size), without_numbers(config, vocab_size)
    sizes = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    assert num_parameters(counted) == sum(sizes.values())
    assert sum(line.numel for line in weights_by_name(counted)) == num_parameters(counted)
    left_out = ("embedding.weight", "relative_bias.weight")
    tables = sum(size for each, size in sizes.items() if each.endswith(left_out) or each == "head.weight")
    assert num_without_embeddings(counted) == num_parameters(counted) - tables
    grouped = torch.ops.llmtrain.grouped_product
    source = {"source": tokens} if isinstance(model, EncoderDecoder) else {}
    with FlopCounterMode(display=False, custom_mapping={grouped: grouped_flops}) as counter, torch.no_grad():
        model(tokens, **source)
    products = counter.get_flop_counts()["Global"]
    matrices = sum(products.get(each, 0) for each in (torch.ops.aten.mm, torch.ops.aten.addmm, grouped))
    assert matrices == 2 * tokens.numel() * (1 + len(source)) * num_active(counted)


def grouped_flops(inputs: tuple[int, int], weight: tuple[int, int, int], *_: object, **__: object) -> int:
    return 2 * inputs[0] * weight[1] * weight[2]


@pytest.mark.parametrize("name", MODELS)
def test_attention_is_counted_as_far_as_it_sees(name: str) -> None:
    """Scores and sums, 4 D for each pair and head, three times; of each position's own score a half."""
    config, length = tiny_model(name), 24
    model, places = without_numbers(config, 300), torch.arange(length)
    pairs = 0.0
    for window in config.windows:
        seen = (places[:, None] >= places) & (places[:, None] - places < (window or length))
        pairs += int(seen.sum()) - min(window or length, length) / 2
    flops = length * (model.flops_per_token(length) - model.flops_per_token(0))
    assert flops == pytest.approx(3 * 4 * pairs * config.num_heads * config.head_size, rel=1e-12)


def test_attention_of_encoders_is_counted_as_far_as_it_sees() -> None:
    """12 T Q D for each layer that sees all T, half where it sees what is before; of both stacks the mean."""
    size, length = 12 * 24 * 128, 24
    cost = {name: without_numbers(tiny_model(name), 300) for name in ("bert_tiny", "t5_tiny")}
    flops = {name: model.flops_per_token(length) - model.flops_per_token(0) for name, model in cost.items()}
    assert flops["bert_tiny"] == 4 * size
    assert flops["t5_tiny"] == 2 * (size + size / 2 + size) / 2  # two layers of both: read, write, and cross


GPT = {"positions": "learned", "norm": "layernorm", "activation": "gelu_tanh", "bias": True}
LLAMA = {"num_kv_heads": 2, "ffn_hidden_size": 192}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [
    GPT, LLAMA, GPT | {"activation": "gelu"}, {**GPT, "positions": "rope"}, GPT | {"activation": "relu"},
    LLAMA | {"attention_sinks": True},
    LLAMA | {"attention_scale": 0.3, "norm_placement": "post"}, GPT | {"activation": "relu_squared", "bias": False},
])  # fmt: skip
def test_activations_are_what_autograd_keeps(
    parts: dict[str, object], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer's bytes are those of two layers less those of one, counted by storage as autograd packs them."""
    monkeypatch.setattr(cpu_attention, "is_faster", lambda query: False)
    shape = {"hidden_size": 64, "num_heads": 4, "max_sequence_length": 64, **parts}
    assert_keeps_what_is_predicted(ModelConfig(**shape), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_activations_of_every_architecture(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_attention, "is_faster", lambda key: False)
    assert_keeps_what_is_predicted(dataclasses.replace(tiny_model(name), attention_pattern=None), dtype)


def assert_keeps_what_is_predicted(config: ModelConfig, dtype: torch.dtype) -> None:
    rows, length = 5, 48
    one, two = (dataclasses.replace(config, num_layers=layers) for layers in (1, 2))
    tokens = torch.randint(50, (rows, length))
    kept = {each.num_layers: kept_bytes(make_model(each, 50), tokens, dtype) for each in (one, two)}
    predicted = sum(kept_by(each, rows, length, dtype) * sign for each, sign in ((two, 1), (one, -1)))
    if config.norm == "rmsnorm" and config.qk_norm != "none" and dtype == torch.float32:
        # the quotients of queries and keys, on a processor: what these were is kept by others then
        predicted += 4 * (config.num_heads + config.kv_heads) * config.head_size * rows * length
    # what is kept for each token and no dimension: norms' means and deviations
    assert kept[2] - kept[1] == pytest.approx(predicted, rel=0.03)


def kept_by(config: ModelConfig, rows: int, length: int, dtype: torch.dtype) -> int:
    return sum(activation_bytes(config, rows * length, length, dtype.itemsize).values())


def kept_bytes(model: nn.Module, tokens: torch.Tensor, dtype: torch.dtype) -> int:
    """Bytes of the tensors that autograd keeps, each storage once, without weights and their copies."""
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    matrices = {shape for each in model.parameters() for shape in (each.shape, each.shape[::-1])}
    found: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.shape not in matrices:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16),
    ):
        source = {"source": tokens} if isinstance(model, EncoderDecoder) else {}
        loss = model(tokens, read=lambda hidden, head, **others: hidden.float().sum(), **source)
    assert math.isfinite(loss.item())
    return sum(size for size, _ in found.values())
