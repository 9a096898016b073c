"""Experts against a slow loop in float64 and against Transformers; capacity by hand; the model around them."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llmtrain.config.schema import ExpertsConfig, ModelConfig
from llmtrain.generation.sampler import generate
from llmtrain.models.experts import Experts, Router, expert_layers, within_capacity
from llmtrain.models.formats import load_language_model, save_model
from llmtrain.models.heads import LanguageModel
from llmtrain.models.layouts.table import described
from llmtrain.optim.optimizers import parameter_groups

VOCAB_SIZE, HIDDEN = 61, 32
MIXTRAL = ExpertsConfig(num_experts=5, experts_per_token=2)
SWITCH = ExpertsConfig(num_experts=4, experts_per_token=1, normalise_weights=False, first_layer=1, layer_step=2)
DEEPSEEK = ExpertsConfig(
    num_experts=6, experts_per_token=3, shared_experts=2, ffn_hidden_size=24, first_layer=1, scores="sigmoid",
    weight_scale=2.5, balance_bias_rate=0.001,
)  # fmt: skip
KINDS = {"mixtral": MIXTRAL, "switch": SWITCH, "deepseek": DEEPSEEK}
ALL = pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS)


def config(settings: ExpertsConfig, **changes: object) -> ModelConfig:
    return ModelConfig(
        num_layers=2, hidden_size=HIDDEN, num_heads=4, num_kv_heads=2, ffn_hidden_size=40, max_sequence_length=48,
        init_std=0.2, experts=settings, **changes,
    )  # fmt: skip


def build(settings: ExpertsConfig, **changes: object) -> LanguageModel:
    model = LanguageModel(config(settings, **changes), VOCAB_SIZE).initialise(torch.Generator().manual_seed(0))
    for layer in expert_layers(model):
        if layer.router.bias is not None:
            layer.router.bias.copy_(torch.linspace(-0.3, 0.3, settings.num_experts))
    return model.eval()


def layer_of(settings: ExpertsConfig, **changes: object) -> Experts:
    """A layer with weights large enough that experts and tokens differ."""
    layer = Experts(config(settings, **changes), settings)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0.0, 0.3, generator=generator)
    if layer.router.bias is not None:
        layer.router.bias.copy_(torch.linspace(-0.3, 0.3, settings.num_experts))
    return layer


def hidden_states(rows: int = 3, length: int = 7, seed: int = 1) -> Tensor:
    return torch.randn(rows, length, HIDDEN, generator=torch.Generator().manual_seed(seed))


def one_by_one(layer: Experts, hidden: Tensor, room: Tensor | None = None) -> Tensor:
    """Each token by itself: scores, choice, a sum over its experts; `room` [B, T, K] where they have any."""
    settings, mixed = layer.settings, torch.zeros_like(hidden)
    for row, position in torch.cartesian_prod(*map(torch.arange, hidden.shape[:2])).tolist():
        token = hidden[row, position]
        logits = layer.router.weight @ token
        scores = 1 / (1 + torch.exp(-logits)) if settings.scores == "sigmoid" else logits.exp() / logits.exp().sum()
        ranked = scores if layer.router.bias is None else scores + layer.router.bias
        chosen = ranked.argsort(descending=True)[: settings.experts_per_token].tolist()
        total = sum(scores[expert] for expert in chosen) if settings.normalise_weights else 1.0
        for place, expert in enumerate(chosen):
            if room is not None and not room[row, position, place]:
                continue
            inner = layer.expert_up.weight[expert] @ token
            inner = inner + layer.expert_up.bias[expert] if layer.expert_up.bias is not None else inner
            outputs = layer.expert_down.weight[expert] @ layer._activate(inner)
            outputs = outputs + layer.expert_down.bias[expert] if layer.expert_down.bias is not None else outputs
            mixed[row, position] += settings.weight_scale * scores[expert] / total * outputs
    return mixed if layer.shared is None else mixed + layer.shared(hidden)


@ALL
@pytest.mark.parametrize("changes", [{}, {"activation": "gelu", "bias": True}], ids=["swiglu", "gelu"])
def test_equals_a_loop_over_tokens(settings: ExpertsConfig, changes: dict[str, object]) -> None:
    """Outputs and gradients, in float64 and in float32."""
    layer, hidden = layer_of(settings, **changes).double(), hidden_states().double()
    weights = [hidden.requires_grad_(), *layer.parameters()]
    draw = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = one_by_one(layer, hidden)
    expected_gradients = torch.autograd.grad(expected, weights, draw)
    found = layer(hidden)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
    for one, other in zip(torch.autograd.grad(found, weights, draw), expected_gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(layer.float()(hidden.float()).double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("family", "normalise"), [("mixtral", True), ("qwen3_moe", True), ("qwen3_moe", False)])
def test_equals_the_sparse_block_of_transformers(family: str, normalise: bool) -> None:
    transformers = pytest.importorskip("transformers")
    shared = {"hidden_size": HIDDEN, "num_experts_per_tok": 2, "hidden_act": "silu"}
    if family == "mixtral":
        theirs = transformers.models.mixtral.modeling_mixtral.MixtralSparseMoeBlock(
            transformers.MixtralConfig(num_local_experts=5, intermediate_size=40, **shared)
        )
    else:
        theirs = transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock(
            transformers.Qwen3MoeConfig(
                num_experts=5, moe_intermediate_size=40, norm_topk_prob=normalise, intermediate_size=8, **shared
            )
        )
    layer = layer_of(dataclasses.replace(MIXTRAL, normalise_weights=normalise))
    with torch.no_grad():
        theirs.gate.weight.copy_(layer.router.weight)
        theirs.experts.gate_up_proj.copy_(layer.expert_up.weight)
        theirs.experts.down_proj.copy_(layer.expert_down.weight)
        hidden = hidden_states(4, 16)
        torch.testing.assert_close(layer(hidden), theirs(hidden), atol=1e-5, rtol=1e-5)


def test_equals_the_block_of_deepseek_v3() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.models.deepseek_v3.modeling_deepseek_v3.DeepseekV3MoE(
        transformers.DeepseekV3Config(
            hidden_size=HIDDEN, n_routed_experts=6, num_experts_per_tok=3, n_shared_experts=2,
            moe_intermediate_size=24, n_group=1, topk_group=1, routed_scaling_factor=2.5, norm_topk_prob=True,
        )
    )  # fmt: skip
    layer = layer_of(DEEPSEEK)
    with torch.no_grad():
        theirs.gate.weight.copy_(layer.router.weight)
        theirs.gate.e_score_correction_bias.copy_(layer.router.bias)
        theirs.experts.gate_up_proj.copy_(layer.expert_up.weight)
        theirs.experts.down_proj.copy_(layer.expert_down.weight)
        gate, up = layer.shared.gate_up.weight.chunk(2)
        theirs.shared_experts.gate_proj.weight.copy_(gate)
        theirs.shared_experts.up_proj.weight.copy_(up)
        theirs.shared_experts.down_proj.weight.copy_(layer.shared.down.weight)
        hidden = hidden_states(4, 16)
        torch.testing.assert_close(layer(hidden), theirs(hidden), atol=1e-5, rtol=1e-5)


def test_capacity_by_hand() -> None:
    """Two rows of six tokens, groups of four, one choice each, room for two: the third and later ones are dropped."""
    chosen = torch.tensor([[0, 0, 0, 1, 0, 0], [1, 0, 1, 1, 1, 1]])[..., None]
    kept = within_capacity(chosen, num_experts=2, capacity=2, group_tokens=4)[..., 0].int()
    assert kept.tolist() == [[1, 1, 0, 1, 1, 1], [1, 1, 1, 0, 1, 1]]


def test_capacity_of_several_choices_goes_by_token() -> None:
    """Room for two in each of three experts; a later token's first choice does not push out an earlier second one."""
    chosen = torch.tensor([[[0, 1], [1, 0], [0, 2], [1, 2]]])
    kept = within_capacity(chosen, num_experts=3, capacity=2, group_tokens=8)
    assert kept.int().tolist() == [[[1, 1], [1, 1], [0, 1], [0, 1]]]


@pytest.mark.parametrize("capacity_factor", [1.0, 0.4])
def test_dropping_equals_a_loop_and_transformers_switch(capacity_factor: float) -> None:
    """An even share of 12 tokens among 4 experts is 3; of 0.4 times that, 1.2, there is room for 2."""
    settings = dataclasses.replace(SWITCH, capacity_factor=capacity_factor, capacity_group_tokens=12)
    layer, hidden = layer_of(settings).double().train(), hidden_states(3, 12).double()
    assert layer.capacity == (3 if capacity_factor == 1.0 else 2)
    kept = within_capacity(layer.router(hidden)[0].chosen, 4, layer.capacity, 12)
    assert 0 < (~kept).sum() < kept.numel()
    torch.testing.assert_close(layer(hidden), one_by_one(layer, hidden, kept), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(layer.eval()(hidden), one_by_one(layer, hidden), atol=1e-12, rtol=1e-12)

    transformers = pytest.importorskip("transformers")
    modeling = transformers.models.switch_transformers.modeling_switch_transformers
    theirs = modeling.SwitchTransformersTop1Router(
        transformers.SwitchTransformersConfig(
            d_model=HIDDEN, num_experts=4, expert_capacity=layer.capacity, router_bias=False, router_jitter_noise=0.0
        )
    )
    theirs.classifier.weight.data = layer.router.weight.data.float()
    mask = theirs(hidden.float())[0].sum(dim=-1, keepdim=True)
    assert torch.equal(mask.bool(), kept)


def test_what_is_dropped_depends_on_no_other_row_and_on_nothing_behind() -> None:
    settings = dataclasses.replace(MIXTRAL, capacity_factor=0.6, capacity_group_tokens=8)
    layer, hidden = layer_of(settings).train(), hidden_states(3, 20)
    whole = layer(hidden)
    torch.testing.assert_close(layer(hidden[1:2]), whole[1:2])
    for length in (5, 8, 13):
        torch.testing.assert_close(layer(hidden[:, :length]), whole[:, :length])
    assert not torch.allclose(whole, layer.eval()(hidden))


def test_router_is_exact_under_autocast() -> None:
    layer, hidden = layer_of(MIXTRAL), hidden_states()
    expected = layer.router(hidden)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer.router(hidden)
        outputs = layer(hidden)
    assert torch.equal(found[0].logits, expected[0].logits)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(outputs.float(), layer(hidden), atol=0.1, rtol=0.1)


def test_jitter_is_for_training_and_for_the_router() -> None:
    layer, hidden = layer_of(dataclasses.replace(MIXTRAL, jitter=0.3)), hidden_states()
    exact = layer.eval().router(hidden)[0].logits
    torch.manual_seed(0)
    drawn = layer.train().router(hidden)[0].logits
    torch.manual_seed(0)
    factors = torch.empty_like(hidden).uniform_(0.7, 1.3)
    torch.testing.assert_close(drawn, (hidden * factors) @ layer.router.weight.T)
    assert not torch.allclose(drawn, exact)


def test_sparse_layers_are_those_asked_for() -> None:
    for settings, expected in ((SWITCH, [1, 3, 5]), (DEEPSEEK, [1, 2, 3, 4, 5]), (MIXTRAL, list(range(6)))):
        model = LanguageModel(dataclasses.replace(config(settings), num_layers=6), VOCAB_SIZE)
        assert [n for n, block in enumerate(model.blocks) if isinstance(block.feed_forward, Experts)] == expected


def test_initial_weights_and_their_decay() -> None:
    model = LanguageModel(
        dataclasses.replace(config(DEEPSEEK, bias=True, norm="layernorm"), hidden_size=128, num_layers=8), VOCAB_SIZE
    ).initialise(torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif parameter.ndim > 1:
            into_residual = name.endswith(("output.weight", "down.weight"))
            assert parameter.std().item() == pytest.approx(0.2 / (4 if into_residual else 1), rel=0.06), name
    decayed = {id(parameter) for parameter in parameter_groups(model, 0.1)[0]["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (parameter.ndim > 1 and not name.endswith("bias")), name


def test_flops_count_the_experts_of_a_token() -> None:
    model, length = build(DEEPSEEK), 16
    attention = HIDDEN * (HIDDEN + 2 * 16) + HIDDEN * HIDDEN
    sparse = 6 * HIDDEN + (3 + 2) * 3 * HIDDEN * 24  # router, three routed and two shared experts
    products = 2 * attention + 3 * HIDDEN * 40 + sparse + VOCAB_SIZE * HIDDEN
    assert model.flops_per_token(length) == pytest.approx(6 * products + 6 * 2 * length * HIDDEN)


@ALL
def test_a_sample_does_not_depend_on_its_batch(settings: ExpertsConfig) -> None:
    model = build(dataclasses.replace(settings, capacity_factor=0.5)).train()
    prompts = [torch.randint(2, VOCAB_SIZE, (1 + (7 * row) % 11,)).tolist() for row in range(9)]
    seeds = [100 + row for row in range(len(prompts))]
    arguments = {"max_new_tokens": 12, "stop_tokens": set(range(10))}
    together = generate(model, prompts, seeds=seeds, **arguments)
    alone = [
        generate(model, [prompt], seeds=[seed], **arguments)[0] for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    assert together == alone == generate(model, prompts, seeds=seeds, batch_rows=3, **arguments)


@ALL
def test_greedy_equals_decoding_without_cache(settings: ExpertsConfig) -> None:
    model, prompt = build(settings), [5, 9, 23]
    answer = generate(model, [prompt], max_new_tokens=10, stop_tokens=set(), temperature=0)[0]
    expected: list[int] = []
    with torch.no_grad():
        while len(expected) < 10:
            expected.append(int(model(torch.tensor([[*prompt, *expected]]))[0, -1].argmax()))
    assert answer == expected


@ALL
def test_saved_and_read_again(settings: ExpertsConfig, tmp_path: Path) -> None:
    """What is of training alone goes along, in the layout of a family and in our own."""
    model = build(dataclasses.replace(settings, capacity_factor=1.25, jitter=0.01, balance_loss=0.2, z_loss=0.1))
    save_model(tmp_path, model)
    model_type = "mixtral" if settings is MIXTRAL else "llmtrain"
    assert f'"model_type": "{model_type}"' in (tmp_path / "config.json").read_text()
    again = load_language_model(tmp_path)
    assert described(again.config) == described(model.config)
    state = again.state_dict()
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    exact = load_language_model(tmp_path, dropout=0.0).config.experts
    assert exact is not None
    assert (exact.capacity_factor, exact.jitter) == (None, 0.0)


def test_a_bias_takes_part_in_the_choice_only() -> None:
    settings = dataclasses.replace(MIXTRAL, balance_bias_rate=0.1, normalise_weights=False)
    router, hidden = Router(HIDDEN, settings), hidden_states()
    before, weights = router(hidden)
    router.bias[3] = 10.0
    after, with_bias = router(hidden)
    assert (after.chosen[..., 0] == 3).all()
    torch.testing.assert_close(with_bias, after.probabilities.gather(-1, after.chosen))
    torch.testing.assert_close(before.probabilities, after.probabilities)
    assert not torch.equal(weights, with_bias)


@pytest.mark.slow
@ALL
def test_compiles_in_one_graph(settings: ExpertsConfig) -> None:
    model = build(dataclasses.replace(settings, capacity_factor=0.5, capacity_group_tokens=8)).train()
    row = torch.randint(2, VOCAB_SIZE, (2, 16), generator=torch.Generator().manual_seed(0))
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    gradients = []
    for each in (compiled, model):
        model.zero_grad()
        each(row).logsumexp(dim=-1).square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, value in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], value, atol=1e-5, rtol=1e-4, msg=name)
