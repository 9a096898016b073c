"""Rows that share positions: the same outputs and gradients as each for itself."""

import dataclasses

import pytest
import torch
from tests.tiny import MODELS, tiny_model
from torch import Tensor

from llmtrain.config.schema import DynamicScalingConfig, ExpertsConfig, LoraConfig, ModelConfig
from llmtrain.kernels import cpu_attention
from llmtrain.models.heads import ActorCritic, LanguageModel, ScalarModel, SharedActorCritic
from llmtrain.models.lora import AdaptedActorCritic, WithoutAdapters, adapt, initialise_adapters
from llmtrain.models.shared_rows import SharedRows
from llmtrain.objectives.shared_positions import group_leaders, shared_positions

VOCAB_SIZE, WIDTH = 61, 40
LLAMA = ModelConfig(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, max_sequence_length=64)
GPT2 = ModelConfig(
    num_layers=2, hidden_size=32, num_heads=4, max_sequence_length=64, positions="learned", norm="layernorm",
    activation="gelu_tanh", bias=True,
)  # fmt: skip
EXPERTS = ExpertsConfig(num_experts=4, shared_experts=1, capacity_factor=0.8, capacity_group_tokens=8)
WINDOWS = {"sliding_window": 7, "attention_pattern": ["sliding", "full"]}
# Parts that no shipped architecture has, or has together.
COMBINED = {
    "sinusoids, norms after": {"positions": "sinusoidal", "norm_placement": "post"},
    "no positions": {"positions": "none", "attention_scale": 0.3},
    "alibi in windows": {"positions": "alibi", **WINDOWS},
    "capped alibi": {"positions": "alibi", "attention_softcap": 2.0, "logit_softcap": 3.0, "num_kv_heads": None},
    "sinks in windows": {"attention_sinks": True, **WINDOWS},
    "experts": {"experts": EXPERTS},
    "dynamic rotation": {"rope_scaling": DynamicScalingConfig(factor=4.0, original_max_sequence_length=16), **WINDOWS},
}
BOTH = pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
GROUPS = pytest.mark.parametrize("group_rows", [1, 4, 8])


def build(config: ModelConfig, dtype: torch.dtype = torch.float32) -> LanguageModel:
    model = LanguageModel(config, VOCAB_SIZE).initialise(torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # at first attention is nearly even, whatever it sees
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    return model


def answers(group_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, mask and sharing of eight answers of many lengths, one of them empty, to prompts of 5 or 20 tokens."""
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCAB_SIZE, (8, WIDTH), generator=draw)
    leaders = group_leaders(tokens, group_rows)
    begin = torch.where(leaders >= 4, 5, 20)[:, None]
    columns = torch.arange(WIDTH)
    tokens = torch.where(columns < begin, tokens[leaders], tokens)
    lengths = torch.tensor([3, 20, 1, 12, 6, 0, 9, 20])[:, None]
    mask = (columns >= begin) & (columns < begin + lengths)
    return tokens, mask, shared_positions(tokens, mask, leaders)


def assert_same(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert (found - wanted).norm() <= tolerance * wanted.norm()


@BOTH
@GROUPS
@pytest.mark.parametrize(
    ("dtype", "tolerance", "blocked"),
    [(torch.float32, 1e-5, False), (torch.float32, 1e-5, True), (torch.float64, 1e-12, False)],
)
def test_outputs_and_gradients_are_those_of_separate_rows(
    config: ModelConfig, group_rows: int, dtype: torch.dtype, tolerance: float, blocked: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """By torch's kernel and by our own."""
    monkeypatch.setattr(cpu_attention, "is_faster", lambda key: blocked)
    assert_rows_may_be_shared(build(config, dtype), group_rows, tolerance)


@pytest.mark.parametrize("name", [*MODELS, *COMBINED])
def test_every_architecture_may_share_rows(name: str) -> None:
    """Windows are shorter than prompts and answers."""
    config = dataclasses.replace(LLAMA, **COMBINED[name]) if name in COMBINED else tiny_model(name)
    if config.experts is not None:  # drawn for what is computed, and never in alignment, where rows are shared
        config = dataclasses.replace(config, experts=dataclasses.replace(config.experts, jitter=0.0))
    assert_rows_may_be_shared(build(config, torch.float64), group_rows=4, tolerance=1e-12)


def assert_rows_may_be_shared(model: LanguageModel, group_rows: int, tolerance: float) -> None:
    """Outputs and gradients of all weights are those of separate rows, within a part of their norms."""
    tokens, mask, same_as = answers(group_rows)
    asked = torch.nn.functional.pad(mask[:, 1:], (0, 1))  # what predicts a masked token
    weight = torch.randn(8, WIDTH, VOCAB_SIZE, dtype=model.head_weight.dtype) * asked[..., None]
    outputs, gradients = [], []
    for sharing in (None, same_as):
        logits = model(tokens, same_as=sharing)
        (logits * weight).sum().backward()
        outputs.append(logits.detach()[asked])
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        model.zero_grad()
    assert_same(*outputs[::-1], tolerance)
    for name, wanted in gradients[0].items():
        assert (gradients[1][name] - wanted).norm() <= tolerance * wanted.norm(), name


@GROUPS
def test_only_what_is_asked_for_is_computed(group_rows: int) -> None:
    model, (tokens, mask, same_as) = build(LLAMA), answers(group_rows)
    seen = []
    model.trunk.blocks[0].feed_forward.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    model(tokens, same_as=same_as)
    before_the_last = [int(row.nonzero().max()) if row.any() else 0 for row in mask]
    if group_rows == 1:
        wanted = sum(before_the_last) + 1  # the first position of the empty row
    else:
        prompts = [20, 5] if group_rows == 4 else [20]
        own = [max(n - prompts[row // group_rows], 0) for row, n in enumerate(before_the_last)]
        wanted = sum(prompts) + sum(own)
    assert seen == [(1, wanted, 32)]


def test_followers_ask_only_where_they_have_something_of_their_own() -> None:
    shared = SharedRows.of(answers(8)[2])
    assert shared.leaders.tolist() == [0]
    assert shared.followers.tolist() == [1, 3, 4, 6, 7]  # of an answer of one token nothing has to be computed
    assert shared.first_own == 20


def test_bfloat16_is_near() -> None:
    model, (tokens, mask, same_as) = build(LLAMA), answers(8)
    asked = torch.nn.functional.pad(mask[:, 1:], (0, 1))
    wanted = model(tokens)[asked]
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(model(tokens, same_as=same_as)[asked].float(), wanted, 0.03)


def test_every_kind_of_model_takes_it() -> None:
    tokens, mask, same_as = answers(4)
    asked = torch.nn.functional.pad(mask[:, 1:], (0, 1))
    policy, value = build(LLAMA), ScalarModel.from_language_model(build(LLAMA), torch.Generator().manual_seed(2))
    shared, adapted, settings = SharedActorCritic(build(LLAMA)), build(LLAMA), LoraConfig(rank=2)
    torch.nn.init.normal_(shared.value.weight)
    adapt(adapted, settings)
    initialise_adapters(adapted, 1)
    for model in (ActorCritic(policy, value), shared, AdaptedActorCritic(adapted, settings)):
        for one, other in zip(model(tokens, same_as=same_as), model(tokens), strict=True):
            torch.testing.assert_close(one[asked], other[asked], rtol=1e-4, atol=1e-4)
    reference = WithoutAdapters(adapted)
    torch.testing.assert_close(
        reference(tokens, same_as=same_as)[asked], reference(tokens)[asked], rtol=1e-4, atol=1e-4
    )


def test_dropout_in_attention_is_possible() -> None:
    model, (tokens, _, same_as) = build(dataclasses.replace(LLAMA, dropout=0.3)).train(), answers(8)
    logits = model(tokens, same_as=same_as)
    logits.sum().backward()
    assert logits.isfinite().all()


def test_it_can_be_compiled() -> None:
    model, (tokens, mask, _) = build(LLAMA), answers(4)
    compiled = torch.compile(model, backend="aot_eager")
    asked = torch.nn.functional.pad(mask[:, 1:], (0, 1))
    for rows in (slice(None), slice(4, 8)):
        sharing = shared_positions(tokens[rows], mask[rows], group_leaders(tokens[rows], 4))
        found = compiled(tokens[rows], same_as=sharing)
        torch.testing.assert_close(found[asked[rows]], model(tokens[rows])[asked[rows]], rtol=1e-4, atol=1e-4)
