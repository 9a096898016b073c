"""Low-rank adapters against `peft`: forward, gradients, folders; and that switched off they are as if never there."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import MODELS, tiny_model
from torch import Tensor

from llmtrain.config.errors import ConfigError, UserError
from llmtrain.config.schema import ExpertsConfig, LoraConfig, ModelConfig
from llmtrain.models.formats import load_language_model, save_model
from llmtrain.models.heads import LanguageModel, ScalarModel, make_model, trained_share
from llmtrain.models.lora import (
    VALUE_SET,
    AdaptedActorCritic,
    WithoutAdapters,
    adapt,
    adapted_layers,
    initialise_adapters,
    merged_state,
    using,
)
from llmtrain.models.peft_folders import add_adapter, save_adapter
from llmtrain.models.recompute import Recompute

VOCAB = 61
TOKEN_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
LLAMA = ModelConfig(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, max_sequence_length=32)
GPT2 = dataclasses.replace(
    LLAMA, num_kv_heads=None, positions="learned", norm="layernorm", activation="gelu_tanh", bias=True,
)  # fmt: skip
UNTIED = dataclasses.replace(LLAMA, tied_embeddings=False)
OWN = dataclasses.replace(LLAMA, norm="layernorm")
CASES = {
    "llama": (LLAMA, LoraConfig(rank=4)),
    "gpt2": (GPT2, LoraConfig(rank=4, alpha=6.0)),
    "rslora": (LLAMA, LoraConfig(rank=4, rslora=True)),
    "query and value": (LLAMA, LoraConfig(rank=3, targets=["q_proj", "v_proj"])),
    "one layer": (GPT2, LoraConfig(rank=4, targets=["blocks.1.attention.output", "up"], also_train=["blocks.0.*down"])),
    "norms and head": (UNTIED, LoraConfig(rank=4, targets=["gate_up"], also_train=[".*norm", "head"])),
    "tied embedding": (LLAMA, LoraConfig(rank=4, targets=["k_proj"], also_train=["token_embedding"])),
}


def plain(config: ModelConfig = LLAMA, seed: int = 0) -> LanguageModel:
    return LanguageModel(config, VOCAB).initialise(torch.Generator().manual_seed(seed)).eval()


@torch.no_grad()
def moved(model: Any, seed: int = 1) -> Any:
    """The model with all that is trained drawn anew, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.empty(parameter.shape).normal_(0.0, 0.2, generator=generator))
    return model


def adapted(config: ModelConfig, settings: LoraConfig) -> LanguageModel:
    model = plain(config)
    adapt(model, settings)
    initialise_adapters(model, 0, "adapter")
    return moved(model)


def some_tokens(rows: int = 3) -> Tensor:
    return torch.randint(0, VOCAB, (rows, 20), generator=torch.Generator().manual_seed(2))


def loss_of(logits: Tensor) -> Tensor:
    tokens = some_tokens()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def their_model(folder: Path, config: ModelConfig, settings: LoraConfig, model: LanguageModel) -> Any:
    """The model as `peft` loads it: the start from one folder, the adapters from another."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    save_model(folder / "base", plain(config), extra_config=TOKEN_IDS)
    save_adapter(folder / "adapter", model, model.state_dict(), settings, str(folder / "base"))
    plainly = {"attn_implementation": "eager", "experts_implementation": "eager"}  # in any dtype
    base = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", **plainly)
    return peft.PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).eval()


@pytest.mark.parametrize("case", CASES)
def test_logits_loss_and_gradients_are_those_of_peft(case: str, tmp_path: Path) -> None:
    config, settings = CASES[case]
    model = adapted(config, settings)
    theirs = their_model(tmp_path, config, settings, model)
    ours, other = model(some_tokens()), theirs(some_tokens()).logits
    assert (ours - plain(config)(some_tokens())).abs().max() > 0.05
    torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss_of(ours), loss_of(other), rtol=1e-5, atol=1e-5)
    loss_of(ours).backward()
    loss_of(other).backward()
    found = {}
    for _, layer in adapted_layers(model):
        low = layer.low_rank()
        for name, a, b in low.by_part(low.lora_A.grad, low.lora_B.grad):
            found |= {f"{name}.lora_A.default.weight": a, f"{name}.lora_B.default.weight": b}
    expected = {name.removeprefix("base_model.model."): each for name, each in theirs.named_parameters()}
    assert found.keys() == {name for name in expected if ".lora_" in name}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name].grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "switch_tiny"])  # Transformers cannot read it
@torch.no_grad()
def test_adapters_of_every_family_are_those_of_peft(name: str, tmp_path: Path) -> None:
    """In float64: within 1e-4 of theirs, whose norms and softmax are float32; merged and switched off within 1e-12."""
    config, tokens = tiny_model(name), some_tokens()
    settings = LoraConfig(rank=4) if config.experts is None else LoraConfig(rank=4, targets=["attention.*"])
    model = adapted(config, settings)
    theirs, model = their_model(tmp_path, config, settings, model).double(), model.double()
    merged, before, ours = LanguageModel(config, VOCAB).double(), plain(config).double(), model(tokens)
    merged.load_state_dict(merged_state(model, model.state_dict()))
    assert (ours - before(tokens)).abs().max() > 0.1
    torch.testing.assert_close(theirs(tokens).logits, ours, rtol=0, atol=1e-4)
    torch.testing.assert_close(merged(tokens), ours, rtol=0, atol=1e-12)
    torch.testing.assert_close(WithoutAdapters(model)(tokens), before(tokens), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "library_class", "targets"),
    [
        ("bert_tiny", "BertForMaskedLM", LoraConfig().targets),
        ("modernbert_tiny", "ModernBertForMaskedLM", ["attention.qkv"]),
        ("t5_tiny", "T5ForConditionalGeneration", LoraConfig().targets),
        ("t5_tiny", "T5ForConditionalGeneration", ["EncDecAttention.v", "wi_1"]),
    ],
)
@torch.no_grad()
def test_adapters_of_encoders_are_those_of_peft(
    name: str, library_class: str, targets: list[str], tmp_path: Path
) -> None:  # fmt: skip
    """In float64; theirs has norms and softmax in float32, which T5's scores, not divided by a root, bring out."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    config, settings, tokens = tiny_model(name), LoraConfig(rank=4, targets=targets), some_tokens()
    start = make_model(config, VOCAB).initialise(torch.Generator().manual_seed(0)).eval()
    save_model(tmp_path / "base", start, extra_config=TOKEN_IDS)
    model = make_model(config, VOCAB).eval()
    model.load_state_dict(start.state_dict())
    adapt(model, settings)
    initialise_adapters(model, 0, "adapter")
    moved(model)
    save_adapter(tmp_path / "adapter", model, model.state_dict(), settings, str(tmp_path / "base"))
    theirs = getattr(transformers, library_class).from_pretrained(tmp_path / "base", attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval().double()
    model, start = model.double(), start.double()
    source = {"source": tokens} if name == "t5_tiny" else {}
    inputs = {"input_ids": tokens, **({"decoder_input_ids": tokens} if source else {})}
    assert (model(tokens, **source) - start(tokens, **source)).abs().max() > 0.05
    torch.testing.assert_close(theirs(**inputs).logits, model(tokens, **source), rtol=0, atol=5e-4)
    merged = make_model(config, VOCAB).eval().double()
    merged.load_state_dict(merged_state(model, model.state_dict()))
    torch.testing.assert_close(merged(tokens, **source), model(tokens, **source), rtol=0, atol=1e-9)


def test_frozen_weights_get_no_gradient() -> None:
    model = adapted(UNTIED, LoraConfig(rank=2, also_train=["final_norm"]))
    loss_of(model(some_tokens())).backward()
    with_gradient = {name for name, each in model.named_parameters() if each.grad is not None}
    assert with_gradient == {name for name, each in model.named_parameters() if each.requires_grad}
    assert {name for name in with_gradient if ".adapters." not in name} == {"trunk.final_norm.weight"}


@pytest.mark.parametrize("case", CASES)
def test_merged_is_the_same_model(case: str) -> None:
    config, settings = CASES[case]
    model = adapted(config, settings)
    merged = LanguageModel(config, VOCAB)
    merged.load_state_dict(merged_state(model, model.state_dict()))
    torch.testing.assert_close(merged(some_tokens()), model(some_tokens()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", [LLAMA, GPT2, OWN], ids=["llama", "gpt2", "own"])
def test_switched_off_it_is_the_model_before_bit_for_bit(config: ModelConfig) -> None:
    model, before = adapted(config, LoraConfig()), plain(config)
    assert not torch.equal(model(some_tokens()), before(some_tokens()))
    assert torch.equal(WithoutAdapters(model)(some_tokens()), before(some_tokens()))
    with pytest.raises(RuntimeError), using(model, None):
        raise RuntimeError
    assert not torch.equal(model(some_tokens()), before(some_tokens())), "on again, whatever happened"


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_at_first_it_is_the_model_before_and_a_is_drawn_by_name(config: ModelConfig) -> None:
    models = [plain(config) for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        adapt(model, LoraConfig(rank=8))
        initialise_adapters(model, seed, "adapter")
        assert torch.equal(model(some_tokens()), plain(config)(some_tokens()))
    one, same, other = (dict(adapted_layers(model)) for model in models)
    for name, layer in one.items():
        a = layer.low_rank().lora_A
        assert torch.equal(a, same[name].low_rank().lora_A)
        assert not torch.equal(a, other[name].low_rank().lora_A)
        bound = 1 / math.sqrt(layer.in_features)  # kaiming_uniform_ with a = sqrt(5)
        assert 0.9 * bound < a.abs().max() <= bound
        assert abs(a.mean()) < 0.1 * bound
    drawn = [layer.low_rank().lora_A.flatten()[:8] for layer in one.values()]
    assert not any(torch.equal(drawn[0], each) for each in drawn[1:])


def test_a_value_model_has_adapters_of_its_own_on_the_policys_trunk() -> None:
    settings = LoraConfig(rank=4)
    policy = adapted(LLAMA, settings)
    alone = policy(some_tokens())
    both = AdaptedActorCritic(policy, settings)
    initialise_adapters(policy, 0, "value adapter", adapters=VALUE_SET)
    logits, values = both(some_tokens())
    assert torch.equal(logits, alone)
    assert torch.equal(values, torch.zeros(3, 20))
    assert torch.equal(both(some_tokens(), values=False), alone)
    assert torch.equal(WithoutAdapters(both, values=False)(some_tokens()), plain()(some_tokens()))

    with torch.no_grad():
        both.value.weight.fill_(0.1)
    hidden = plain().trunk(some_tokens())  # B of the value's adapters is zero
    torch.testing.assert_close(both(some_tokens())[1], 0.1 * hidden.sum(dim=-1), rtol=1e-5, atol=1e-5)
    both(some_tokens())[1].sum().backward()
    moved_by = {name for name, each in both.named_parameters() if each.grad is not None}
    assert moved_by == {name for name, _ in both.named_parameters() if ".adapters.value." in name} | {"value.weight"}
    both(some_tokens())[0].sum().backward()
    now = {name for name, each in both.named_parameters() if each.grad is not None} - moved_by
    assert now == {name for name, _ in both.named_parameters() if ".adapters.default." in name}
    assert both.flops_per_token(8) == policy.flops_per_token(8) + policy.trunk.flops_per_token(8)


def actor_critic_gradients(kind: Recompute) -> dict[str, Tensor]:
    """Of what values and log-probabilities alike add to, both with adapters that have been trained."""
    settings = LoraConfig(rank=4)
    policy = adapted(LLAMA, settings)
    both = AdaptedActorCritic(policy, settings)
    initialise_adapters(policy, 0, "value adapter", adapters=VALUE_SET)
    moved(both, seed=3)
    policy.trunk.recompute = kind
    logits, values = both(some_tokens())
    (loss_of(logits) + values.square().sum()).backward()
    return {name: each.grad for name, each in both.named_parameters() if each.grad is not None}


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_what_the_backward_pass_makes_again_has_the_adapters_that_it_had(kind: Recompute) -> None:
    expected, found = actor_critic_gradients("none"), actor_critic_gradients(kind)
    assert any(".adapters.value." in name and bool(grad.any()) for name, grad in expected.items())
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert torch.equal(found[name], grad), name


def test_frozen_weights_cost_a_third_less() -> None:
    model, before = adapted(UNTIED, LoraConfig(rank=4)), plain(UNTIED)
    weights = sum(each.numel() for each in before.blocks[0].parameters() if each.ndim == 2) * 2 + 32 * VOCAB
    added = sum(each.numel() for each in model.parameters() if each.requires_grad)
    assert model.flops_per_token(8) == before.flops_per_token(8) - 2 * weights + 6 * added


def test_dropout_is_on_what_goes_into_the_adapters_in_training_alone() -> None:
    model = adapted(LLAMA, LoraConfig(dropout=0.5))
    whole = model(some_tokens())
    model.train()
    torch.manual_seed(0)
    dropped = model(some_tokens())
    assert not torch.equal(dropped, whole)
    assert torch.equal(WithoutAdapters(model)(some_tokens()), plain()(some_tokens()))
    torch.manual_seed(0)
    assert torch.equal(model(some_tokens()), dropped)


@pytest.mark.parametrize("case", CASES)
def test_a_folder_of_adapters_is_added_to_the_weights(case: str, tmp_path: Path) -> None:
    config, settings = CASES[case]
    model = adapted(config, settings)
    save_adapter(tmp_path, model, model.state_dict(), settings, "base")
    again = plain(config)
    add_adapter(again, tmp_path)
    torch.testing.assert_close(again(some_tokens()), model(some_tokens()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_folder_that_peft_has_written_is_read(family: str, tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    save_model(tmp_path / "base", plain(LLAMA if family == "llama" else GPT2))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    targets = ["q_proj", "down_proj"] if family == "llama" else ["c_attn", "c_proj"]
    theirs = peft.get_peft_model(
        base, peft.LoraConfig(r=3, lora_alpha=7, use_rslora=True, target_modules=targets, task_type="CAUSAL_LM")
    )
    moved(theirs).eval().save_pretrained(tmp_path / "adapter")
    model = load_language_model(tmp_path / "base")
    add_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(model(some_tokens()), theirs(some_tokens()).logits, rtol=1e-5, atol=1e-5)


def test_the_adapters_of_a_reward_model_load_in_peft(tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = ScalarModel.from_language_model(plain(), torch.Generator().manual_seed(3)).eval()
    adapt(model, LoraConfig(rank=4))
    assert model.score.weight.requires_grad
    initialise_adapters(model, 0, "adapter")
    moved(model)
    save_adapter(tmp_path / "adapter", model, model.state_dict(), LoraConfig(rank=4), "base")
    save_model(tmp_path / "base", ScalarModel.from_language_model(plain(), torch.Generator()))
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    theirs.config.pad_token_id = VOCAB  # no token of these
    scores = theirs(some_tokens()).logits[:, 0]
    torch.testing.assert_close(scores, model(some_tokens())[:, -1], rtol=1e-5, atol=1e-5)


def test_folders_that_cannot_be_used_say_why(tmp_path: Path) -> None:
    settings = LoraConfig(rank=2)
    model = adapted(LLAMA, settings)
    save_adapter(tmp_path, model, model.state_dict(), settings, "base")
    config, weights = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    said = json.loads(config.read_text())
    with pytest.raises(UserError, match=r"does not fit the model.*; model.* and 9 more"):
        add_adapter(plain(GPT2), tmp_path)
    for option in ({"use_dora": True}, {"rank_pattern": {"q_proj": 8}}, {"peft_type": "IA3"}, {"r": 0}):
        config.write_text(json.dumps(said | option))
        with pytest.raises(UserError, match=f"asks for what is not supported: {next(iter(option))}="):
            add_adapter(plain(), tmp_path)
    config.write_text(json.dumps(said | {"r": 4}))
    with pytest.raises(UserError, match=r"adapter_config.json says r=4, but .* has matrices of rank 2"):
        add_adapter(plain(), tmp_path)
    config.write_text(json.dumps(said))
    tensors = load_file(weights)
    for change in ("missing", "unknown"):
        changed = dict(tensors)
        if change == "missing":
            del changed["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
        else:
            changed["base_model.model.lora_embedding_A"] = torch.zeros(2)
        save_file(changed, weights)
        with pytest.raises(UserError, match="does not fit the model, or holds other things"):
            add_adapter(plain(), tmp_path)
    weights.write_bytes(b"torn")
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="is no folder of LoRA weights"):
            add_adapter(plain(), path)


def test_a_pattern_that_matches_nothing_names_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"adapter\.targets: 'q_prj' .* attention\.qkv, .*self_attn\.q_proj"):
        adapt(plain(), LoraConfig(targets=["attention.qkv", "q_prj"]))
    with pytest.raises(ConfigError, match=r"adapter\.also_train: 'head' .* token_embedding, attention_norm"):
        adapt(plain(), LoraConfig(also_train=["head"]))


def test_experts_get_no_adapters_and_may_be_trained_as_they_are() -> None:
    config = dataclasses.replace(LLAMA, experts=ExpertsConfig(num_experts=4, shared_experts=1, first_layer=1))
    with pytest.raises(ConfigError, match=r"adapter\.targets: 'expert_up' matches experts and their routers alone"):
        adapt(plain(config), LoraConfig(targets=["expert_up", "attention.*"]))
    model = adapted(config, LoraConfig(also_train=["router"]))
    parts = {name.partition(".feed_forward.")[2] for name, _ in adapted_layers(model)} - {""}
    assert parts == {"gate_up", "down", "shared.gate_up", "shared.down"}
    merged = LanguageModel(config, VOCAB)
    merged.load_state_dict(merged_state(model, model.state_dict()))
    torch.testing.assert_close(merged(some_tokens()), model(some_tokens()), rtol=1e-5, atol=1e-5)
    loss_of(model(some_tokens())).backward()
    trained = {name for name, each in model.named_parameters() if each.grad is not None and ".adapters." not in name}
    assert trained == {"trunk.blocks.1.feed_forward.router.weight"}


def test_what_is_trained_is_counted() -> None:
    model = plain()
    weights = sum(each.numel() for each in model.parameters())
    adapt(model, LoraConfig(rank=4, targets=["attention.output"]))
    added = 2 * 4 * (32 + 32)
    assert trained_share(model).startswith(f"{added:,} of {weights + added:,} parameters are trained (")
