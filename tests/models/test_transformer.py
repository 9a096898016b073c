"""The trunk: what positions may see, sizes, initial weights, the cache."""

import dataclasses
import itertools

import pytest
import torch

from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import ModelConfig
from llmtrain.models.attend import attend_one
from llmtrain.models.cache import KVCache
from llmtrain.models.feed_forward import inner_size
from llmtrain.models.heads import LanguageModel
from llmtrain.models.positions import rotary_tables, rotate
from llmtrain.models.transformer import Transformer

VOCAB_SIZE = 61
LLAMA = ModelConfig(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, max_sequence_length=32)
GPT2 = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    max_sequence_length=32,
    positions="learned",
    norm="layernorm",
    activation="gelu_tanh",
    bias=True,
)
MIXED = dataclasses.replace(GPT2, positions="rope", activation="gelu", num_kv_heads=1, bias=False)
ALL = pytest.mark.parametrize("config", [LLAMA, GPT2, MIXED], ids=["llama", "gpt2", "mixed"])


def build(config: ModelConfig, seed: int = 0) -> LanguageModel:
    return LanguageModel(config, VOCAB_SIZE).initialise(torch.Generator().manual_seed(seed)).eval()


def tokens(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(seed))


@ALL
def test_a_position_sees_nothing_behind_it(config: ModelConfig) -> None:
    model, first = build(config), tokens(2, 12)
    second = first.clone()
    second[:, 7:] = (second[:, 7:] + 1) % VOCAB_SIZE
    torch.testing.assert_close(model(first)[:, :7], model(second)[:, :7])
    assert not torch.allclose(model(first)[:, 7], model(second)[:, 7])


@ALL
def test_number_of_parameters(config: ModelConfig) -> None:
    hidden, inner, layers = config.hidden_size, inner_size(config), config.num_layers
    kv_size = hidden // config.num_heads * (config.num_kv_heads or config.num_heads)
    matrices = 3 if config.activation == "swiglu" else 2
    norm = hidden * (2 if config.norm == "layernorm" and config.bias else 1)
    block = 2 * hidden * hidden + 2 * hidden * kv_size + matrices * hidden * inner + 2 * norm
    if config.bias:
        block += hidden + 2 * kv_size + hidden + inner + hidden
    positions = config.max_sequence_length * hidden if config.positions == "learned" else 0
    expected = VOCAB_SIZE * hidden + positions + layers * block + norm
    assert sum(parameter.numel() for parameter in build(config).parameters()) == expected


@pytest.mark.parametrize(("hidden_size", "expected"), [(128, 384), (512, 1408), (4096, 10944)])
def test_default_inner_size_of_swiglu(hidden_size: int, expected: int) -> None:
    assert inner_size(ModelConfig(hidden_size=hidden_size)) == expected


@ALL
def test_cached_steps_equal_the_whole_sequence(config: ModelConfig) -> None:
    model, lengths = build(config), [9, 4, 6]
    prompts, added = tokens(3, 9), tokens(3, 3, seed=2)
    cache = KVCache(config, lengths, 12, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        prefill = model(prompts, cache=cache)
        steps = [model(added[:, [step]], cache=cache)[:, 0] for step in range(3)]
        for row, length in enumerate(lengths):
            whole = model(torch.cat((prompts[row, :length], added[row]))[None])[0]
            torch.testing.assert_close(prefill[row, :length], whole[:length], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(torch.stack(steps)[:, row], whole[length:], atol=1e-5, rtol=1e-4)


@ALL
def test_cache_goes_on_with_the_selected_rows(config: ModelConfig) -> None:
    model, lengths = build(config), [9, 4, 6]
    prompts, added = tokens(3, 9), tokens(3, 2, seed=2)
    cache = KVCache(config, lengths, 11, dtype=torch.float32, device=torch.device("cpu"))
    kept = torch.tensor([2, 1])
    with torch.no_grad():
        model(prompts, cache=cache)
        model(added[:, [0]], cache=cache)
        cache.select(kept)
        after = model(added[kept][:, [1]], cache=cache)[:, 0]
        for row, logits in zip(kept.tolist(), after, strict=True):
            whole = model(torch.cat((prompts[row, : lengths[row]], added[row]))[None])[0, -1]
            torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-4)


@ALL
def test_cache_goes_on_with_adopted_rows(config: ModelConfig) -> None:
    """Two prompts are put in the places of others, one of them twice; a row is released in between."""
    model, lengths = build(config), [9, 4]
    prompts, added = tokens(2, 9), tokens(3, 3, seed=2)
    other = KVCache(config, lengths, 9, dtype=torch.float32, device=torch.device("cpu"))
    cache = KVCache(config, [0] * 3, 32, dtype=torch.float32, device=torch.device("cpu"))
    with torch.no_grad():
        model(prompts, cache=other)
        cache.adopt(torch.tensor([0, 1]), other, torch.tensor([0, 0]))
        model(added[:, [0]], cache=cache)
        cache.release(torch.tensor([1]))
        cache.adopt(torch.tensor([2, 1]), other, torch.tensor([0, 1]))
        after = [model(added[:, [step]], cache=cache)[:, 0] for step in (1, 2)]
        seen = [prompts[0, :9].tolist() + added[0, :1].tolist(), prompts[1, :4].tolist(), prompts[0, :9].tolist()]
        for row, before in enumerate(seen):
            whole = model(torch.tensor([before + added[row, 1:].tolist()]))[0, -2:]
            torch.testing.assert_close(torch.stack(after)[:, row], whole, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (8, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_single_query_attends_as_the_formula_says(heads: int, kv_heads: int, dtype: torch.dtype) -> None:
    """Against float64 with the heads expanded: within the rounding of the dtype."""
    query, keys, values = (
        torch.randn(3, *shape, 16).to(dtype) for shape in ((heads, 1), (kv_heads, 32), (kv_heads, 32))
    )
    mask = torch.zeros(3, 1, 1, 32, dtype=dtype).masked_fill(
        torch.arange(32) >= torch.tensor([[5], [32], [17]])[:, None, None], float("-inf")
    )
    wide = [each.double().repeat_interleave(heads // kv_heads, dim=1) for each in (keys, values)]
    expected = (query.double() @ wide[0].mT / 4 + mask.double()).softmax(dim=-1) @ wide[1]
    found = attend_one(query, keys, values, mask)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, atol=1e-6 if dtype == torch.float32 else 2e-2, rtol=0)


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="kernels are chosen by processor")
@pytest.mark.parametrize(("heads", "kv_heads", "head_size"), [(4, 4, 24), (8, 1, 64), (4, 2, 128), (2, 1, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_single_query_attends_alike_beside_any_rows(
    heads: int, kv_heads: int, head_size: int, dtype: torch.dtype
) -> None:  # fmt: skip
    """The same bits for any number of rows, and of masked columns behind its own."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"query": (9, heads, 1), "keys": (9, kv_heads, 1216), "values": (9, kv_heads, 1216)}
    query, keys, values = (torch.randn(*s, head_size, generator=generator).to(dtype) for s in sizes.values())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for length in (1, 60, 129, 1000):
        found = []
        for rows, width in itertools.product((1, 2, 4, 9), (64, 128, 192, 512, 1024, 1088, 1216)):
            if width >= length:
                mask = torch.zeros(rows, 1, 1, width, dtype=dtype)
                mask[..., length:] = float("-inf")
                seen = (each[:rows, :, :width].contiguous() for each in (keys, values))
                found.append(attend_one(query[:rows], *seen, mask)[0])
        assert all(torch.equal(found[0], each) for each in found[1:])
    torch.set_num_threads(threads)


def test_flops_follow_the_products() -> None:
    model, length = build(LLAMA), 16
    hidden, layers = LLAMA.hidden_size, LLAMA.num_layers
    in_products = layers * (hidden * (hidden + 2 * 16) + hidden * hidden + 3 * hidden * 128) + VOCAB_SIZE * hidden
    assert model.flops_per_token(length) == 6 * in_products + 6 * layers * length * hidden


def test_rotary_scores_depend_on_distance_only() -> None:
    query, key = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(query_position: int, key_position: int) -> float:
        config = ModelConfig(head_dim=8, rope_theta=100.0)
        at = [rotary_tables(config, torch.tensor([[position]])) for position in (query_position, key_position)]
        return float((rotate(query, at[0]) * rotate(key, at[1])).sum())

    assert score(5, 3) == pytest.approx(score(12, 10), abs=1e-5)
    assert score(5, 3) != pytest.approx(score(5, 4), abs=1e-5)


def test_positions_can_be_given() -> None:
    model, row = build(GPT2), tokens(1, 6)
    shifted = model(row, positions=torch.arange(3, 9)[None])
    assert not torch.allclose(shifted, model(row))
    torch.testing.assert_close(model(row, positions=torch.arange(6)[None]), model(row))


def test_initial_weights() -> None:
    config = ModelConfig(num_layers=8, hidden_size=128, bias=True, norm="layernorm", init_std=0.02)
    model = build(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif parameter.ndim == 1:
            assert (parameter == 1).all()
        else:
            into_residual = name.endswith(("output.weight", "down.weight"))
            assert parameter.std().item() == pytest.approx(0.02 / (4 if into_residual else 1), rel=0.05), name


def test_initial_weights_depend_on_the_generator_alone() -> None:
    first, second, other = build(LLAMA, 0).state_dict(), build(LLAMA, 0).state_dict(), build(LLAMA, 1).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["trunk.token_embedding.weight"], other["trunk.token_embedding.weight"])


def test_dropout_acts_in_training_only() -> None:
    model, row = build(dataclasses.replace(GPT2, dropout=0.5)), tokens(1, 6)
    torch.testing.assert_close(model(row), model(row))
    model.train()
    assert not torch.allclose(model(row), model(row))


@ALL
def test_every_parameter_gets_a_gradient(config: ModelConfig) -> None:
    model = build(dataclasses.replace(config, tied_embeddings=False))
    model(tokens(2, 8)).logsumexp(dim=-1).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@ALL
def test_bfloat16_autocast_is_close_and_leaves_weights_alone(config: ModelConfig) -> None:
    model, row = build(config), tokens(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(row)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model(row), atol=0.03, rtol=0.1)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_heads": 5}, "model.num_heads=5 does not divide model.hidden_size=32"),
        ({"num_kv_heads": 3}, "model.num_kv_heads=3 does not divide model.num_heads=4"),
        ({"hidden_size": 36}, "is odd"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Transformer(dataclasses.replace(LLAMA, **changes), VOCAB_SIZE)


@pytest.mark.slow
@ALL
def test_compiles_in_one_graph(config: ModelConfig) -> None:
    model, row = build(config), tokens(2, 8)
    torch.compiler.reset()  # it compiles the same code for eight kinds of models, and no more
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(row), model(row), atol=1e-5, rtol=1e-4)
