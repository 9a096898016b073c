"""Continuous batching: the same tokens and bits in any batch, prompts read once, rows freed and filled."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.config.schema import DynamicScalingConfig, ExpertsConfig, ModelConfig
from llmtrain.generation import batching, decoder
from llmtrain.generation.batching import ContinuousBatch, enough_rows
from llmtrain.generation.decoder import Decoder, PreparedLinear
from llmtrain.generation.sampler import generate
from llmtrain.models.cache import PROMPT_MULTIPLE, KVCache
from llmtrain.models.heads import LanguageModel, make_model

VOCAB_SIZE = 61
GROUPED = ModelConfig(num_layers=2, hidden_size=80, num_heads=4, num_kv_heads=2, max_sequence_length=160, init_std=0.3)
MULTI_HEAD = dataclasses.replace(GROUPED, num_kv_heads=None, hidden_size=96)
MULTI_QUERY = dataclasses.replace(GROUPED, num_kv_heads=1, tied_embeddings=True)
GPT2 = dataclasses.replace(
    MULTI_HEAD, positions="learned", norm="layernorm", activation="gelu_tanh", bias=True, tied_embeddings=True
)
GPT2_GROUPED = dataclasses.replace(GPT2, num_kv_heads=2, activation="gelu")
WINDOWS = dataclasses.replace(GROUPED, sliding_window=7, attention_pattern=["sliding", "full"], qk_norm="head")
ALIBI = dataclasses.replace(MULTI_HEAD, positions="alibi")
ALIBI_GROUPED = dataclasses.replace(GROUPED, positions="alibi", sliding_window=20)
SINKS = dataclasses.replace(WINDOWS, attention_sinks=True)
CAPPED = dataclasses.replace(WINDOWS, attention_softcap=5.0, logit_softcap=4.0, norm="zero_centred_rmsnorm")
DYNAMIC = dataclasses.replace(
    GROUPED, rope_scaling=DynamicScalingConfig(factor=4.0, original_max_sequence_length=16), attention_scale=0.5
)
NEOX = dataclasses.replace(
    MULTI_HEAD, block="parallel", partial_rotary_factor=0.5, norm="layernorm", activation="gelu", bias=True
)
FALCON = dataclasses.replace(MULTI_QUERY, block="parallel_shared_norm", norm="layernorm", norm_bias=True)
FIRST = dataclasses.replace(
    MULTI_HEAD, positions="sinusoidal", norm_placement="post", activation="relu", tied_embeddings=False, init_std=1.0
)
OLMO = dataclasses.replace(
    GROUPED, norm_placement="reordered", qk_norm="full", logit_scale=0.5, tied_embeddings=False, init_std=0.1
)
T5 = dataclasses.replace(
    MULTI_HEAD, architecture="encoder_decoder", encoder_layers=1, positions="relative", relative_buckets=8,
    relative_max_distance=20, attention_scale=1.0, activation="geglu_tanh", tied_embeddings=False,
)  # fmt: skip
FIRST_BOTH = dataclasses.replace(
    FIRST, architecture="encoder_decoder", embedding_scale="sqrt_hidden_size", bias=True, init_std=0.2
)
CROSS_CAPPED = dataclasses.replace(
    GROUPED, architecture="encoder_decoder", attention_softcap=5.0, qk_norm="head", init_std=0.2
)
EXPERTS = dataclasses.replace(
    GROUPED, init_std=0.2, experts=ExpertsConfig(num_experts=5, shared_experts=1, first_layer=1, capacity_factor=0.5)
)
SWITCH = dataclasses.replace(
    T5, encoder_layers=2, activation="relu", experts=ExpertsConfig(
        num_experts=5, experts_per_token=1, normalise_weights=False, first_layer=1, capacity_factor=0.5
    ),
)  # fmt: skip
KINDS = {
    "grouped": GROUPED, "multi-head": MULTI_HEAD, "multi-query": MULTI_QUERY, "gpt2": GPT2,
    "gpt2-grouped": GPT2_GROUPED, "windows": WINDOWS, "alibi": ALIBI, "alibi-grouped": ALIBI_GROUPED,
    "capped": CAPPED, "dynamic": DYNAMIC, "neox": NEOX, "falcon": FALCON, "first": FIRST, "olmo": OLMO,
    "t5": T5, "first-both": FIRST_BOTH, "cross-capped": CROSS_CAPPED,
    "sinks": SINKS, "experts": EXPERTS, "switch": SWITCH,
}  # fmt: skip
EVERY = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)
PACKED = pytest.mark.parametrize("packed", [False, pytest.param(True, marks=pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="packing is oneDNN's"))], ids=["plain", "packed"])  # fmt: skip
# Kernels are chosen by processor: this was tried where they are those for AVX512. Several threads divide a product
# among them by its number of rows, and round by where they divide.
SAME_BITS = torch.backends.cpu.get_cpu_capability() == "AVX512"


def build(config: ModelConfig) -> LanguageModel:
    return make_model(config, VOCAB_SIZE).initialise(torch.Generator().manual_seed(0))


def make_prompts(count: int = 11) -> list[list[int]]:
    """Of 1 to 40 tokens, and two of more; the last three repeat the first and the second."""
    generator = torch.Generator().manual_seed(1)
    lengths = [1 + (17 * row) % 40 for row in range(count - 2)] + [60, 125]  # these grow beyond 64 and 128 columns
    prompts = [torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]
    return [*prompts, prompts[0], prompts[1], prompts[0]]


def autocast(dtype: torch.dtype) -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype, enabled=dtype != torch.float32)


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, int], list[Tensor]]:
    """The logits of each (seed, place in the answer) in all calls of `generate`."""
    logits_of: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
    take = ContinuousBatch._take

    def watch(self: ContinuousBatch, rows: list[int], logits: Tensor) -> None:
        for row, values in zip(rows, logits, strict=True):
            number = self.slots[row]
            assert number is not None
            logits_of[self.requests[number].seed, int(self.counts[row])].append(values.clone())
        take(self, rows, logits)

    monkeypatch.setattr(ContinuousBatch, "_take", watch)
    return logits_of


@EVERY
@PACKED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("threads", [1, pytest.param(2, marks=pytest.mark.slow)], indirect=True)
def test_the_same_in_any_batch(
    config: ModelConfig, packed: bool, dtype: torch.dtype, temperature: float, threads: int,
    seen: dict[tuple[int, int], list[Tensor]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(decoder, "PACKED_FROM", 0 if packed else 10**12)
    model, prompts = build(config), make_prompts()
    seeds = [100 + row for row in range(len(prompts))]

    def answer(rows: Sequence[int], batch_rows: int) -> list[list[int]]:
        return generate(
            model, [prompts[row] for row in rows], max_new_tokens=9, stop_tokens=set(range(8)),
            temperature=temperature, seeds=[seeds[row] for row in rows], batch_rows=batch_rows,
            start_token=0,
        )  # fmt: skip

    everyone = range(len(prompts))
    with autocast(dtype):
        together = answer(everyone, 256)
        in_threes = answer(everyone, 3)
        in_eights = answer(everyone[::-1], 8)[::-1]
        alone = [answer([row], 1)[0] for row in everyone]
    assert len({len(row) for row in together}) > 2, "rows should end at different times"
    worst = max(float((other - first).abs().max()) for first, *others in seen.values() for other in others)
    same_bits = SAME_BITS and threads == 1
    assert worst == 0 if same_bits else worst < (1e-4 if dtype == torch.float32 else 0.1)
    assert together == in_threes == in_eights == alone


def test_equal_prompts_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[tuple[int, ...]]] = []
    read_prompts = Decoder.read_prompts

    def watch(self: Decoder, prompts: Sequence[tuple[int, ...]]) -> tuple[Tensor, KVCache]:
        read.append(list(prompts))
        return read_prompts(self, prompts)

    monkeypatch.setattr(Decoder, "read_prompts", watch)
    model = build(GROUPED)
    prompts = [prompt for prompt in ([5, 6, 7], [8, 9], [5, 6, 8], [4] * 20) for _ in range(7)]
    arguments = {"max_new_tokens": 6, "stop_tokens": set(range(20))}
    answers = generate(model, prompts, batch_rows=5, **arguments)
    assert sorted(prompt for prompts in read for prompt in prompts) == sorted({tuple(prompt) for prompt in prompts})
    assert all(len({-(-len(prompt) // PROMPT_MULTIPLE) for prompt in prompts}) == 1 for prompts in read)
    assert len({tuple(answer) for answer in answers[:7]}) > 3, "rows of a group have draws of their own"
    read.clear()
    assert generate(model, prompts, **arguments) == answers
    assert [len(prompts) for prompts in read] == [3, 1]


def test_long_prompts_are_read_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = build(GROUPED), make_prompts()
    whole = generate(model, prompts, max_new_tokens=5, stop_tokens=set())
    monkeypatch.setattr(batching, "PROMPT_TOKENS", PROMPT_MULTIPLE)
    assert generate(model, prompts, max_new_tokens=5, stop_tokens=set()) == whole


def test_freed_rows_go_to_those_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is never computed for nothing while requests wait, but for a share that is too small to be filled."""
    running: list[tuple[int, int, int]] = []
    read_tokens = Decoder.read_tokens
    batches: list[ContinuousBatch] = []
    run = ContinuousBatch.run

    def start(self: ContinuousBatch) -> list[list[int]]:
        batches.append(self)
        return run(self)

    def watch(self: Decoder, tokens: Tensor, cache: KVCache) -> Tensor:
        batch = batches[-1]
        running.append((len(batch.waiting), sum(slot is not None for slot in batch.slots), len(tokens)))
        return read_tokens(self, tokens, cache)

    monkeypatch.setattr(ContinuousBatch, "run", start)
    monkeypatch.setattr(Decoder, "read_tokens", watch)
    prompts = [[2 + row % 50, 3] for row in range(90)]
    answers = generate(build(GROUPED), prompts, max_new_tokens=30, stop_tokens=set(range(4)), batch_rows=16)
    assert all(computed == 16 and busy >= 15 for waiting, busy, computed in running if waiting)
    assert all(computed == enough_rows(busy) for waiting, busy, computed in running if not waiting)
    assert sum(busy for _, busy, _ in running) == sum(map(len, answers)) - len(answers)


def test_row_counts_are_few() -> None:
    assert [enough_rows(running) for running in (1, 2, 3, 4, 5, 8, 9, 17)] == [1, 2, 4, 4, 8, 8, 16, 24]


def test_generation_leaves_the_model_alone_and_sees_its_newest_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "PACKED_FROM", 0)
    model = build(GROUPED).train()
    modules, state = list(model.modules()), {name: value.clone() for name, value in model.state_dict().items()}
    arguments = {"max_new_tokens": 8, "stop_tokens": set(), "temperature": 0.0}
    before = generate(model, make_prompts(), **arguments)
    assert [id(module) for module in model.modules()] == [id(module) for module in modules]
    assert all(module.training for module in modules)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        model.trunk.blocks[0].attention.output.weight.mul_(-1)
    assert generate(model, make_prompts(), **arguments) != before


@PACKED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_prepared_products(packed: bool, dtype: torch.dtype, bias: bool) -> None:
    """Against the product in float64 of the rounded operands: within the rounding of the result's dtype."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(96, 40, bias=bias)
    prepared = PreparedLinear(linear.weight, linear.bias, dtype, packed=packed)
    for rows in (4, 5, 300):
        hidden = torch.randn(rows, 1, 96)
        operands = [None if each is None else each.to(dtype).double() for each in (hidden, linear.weight, linear.bias)]
        expected = torch.nn.functional.linear(*operands)
        found = prepared(hidden)
        assert found.dtype == dtype
        torch.testing.assert_close(
            found.double(), expected, atol=4e-6 if dtype == torch.float32 else 1e-2, rtol=torch.finfo(dtype).eps
        )
