"""Folders in the Transformers layout: agreement with that library both ways, exact round trips, refusals."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmtrain.config.errors import UserError
from llmtrain.config.schema import ModelConfig
from llmtrain.models.formats import (
    load_language_model,
    load_scalar_model,
    read_config,
    save_config,
    save_model,
)
from llmtrain.models.heads import LanguageModel, ScalarModel

transformers = pytest.importorskip("transformers")

VOCAB_SIZE = 61
LLAMA = ModelConfig(
    num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, max_sequence_length=64, ffn_hidden_size=48
)
GPT2 = ModelConfig(
    num_layers=2,
    hidden_size=32,
    num_heads=4,
    max_sequence_length=64,
    positions="learned",
    norm="layernorm",
    activation="gelu_tanh",
    bias=True,
)
FAMILIES = {
    "llama": LLAMA,
    "llama untied": dataclasses.replace(LLAMA, tied_embeddings=False, rope_theta=500.0, norm_eps=1e-6),
    "llama biased": dataclasses.replace(LLAMA, bias=True, num_kv_heads=None),
    "gpt2": GPT2,
    "gpt2 untied": dataclasses.replace(GPT2, tied_embeddings=False, activation="gelu", ffn_hidden_size=80),
}
FAMILY = pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES.keys())
OWN = dataclasses.replace(LLAMA, norm="layernorm", activation="gelu")
TOKEN_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
EXTRA = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def random_weights(model: Any, seed: int = 0) -> Any:
    """All weights drawn with a size that makes errors visible, biases and norms too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, 0.2, generator=generator))
    return model.eval()


def language_model(config: ModelConfig) -> LanguageModel:
    return random_weights(LanguageModel(config, VOCAB_SIZE))


def scalar_model(config: ModelConfig) -> ScalarModel:
    model = random_weights(ScalarModel(config, VOCAB_SIZE))
    model.score_mean.fill_(0.1)
    model.score_std.fill_(1.7)
    return model


def tokens() -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (3, 20), generator=torch.Generator().manual_seed(1))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, drop: str | None = None, **changes: Tensor) -> None:
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if name != drop}, folder / "model.safetensors")


@FAMILY
def test_transformers_reads_what_we_write(config: ModelConfig, tmp_path: Path) -> None:
    model = language_model(config)
    save_model(tmp_path, model, extra_config=EXTRA)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(tokens()).logits, model(tokens()), atol=1e-4, rtol=1e-4)
    assert theirs.generation_config.eos_token_id == 0


def hf_config(family: str, **changes: Any) -> Any:
    if family == "gpt2":
        sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 64}
        return transformers.GPT2Config(vocab_size=VOCAB_SIZE, **sizes, **TOKEN_IDS, **changes)
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    return transformers.LlamaConfig(vocab_size=VOCAB_SIZE, **sizes, **TOKEN_IDS, **changes)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", {}),
        ("gpt2", {"tie_word_embeddings": False, "n_inner": 40, "activation_function": "gelu"}),
        ("llama", {}),
        ("llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
        ("llama", {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": {"rope_theta": 777.0, "rope_type": "default"}}),
    ],
)
def test_we_read_what_transformers_writes(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    theirs = random_weights(transformers.AutoModelForCausalLM.from_config(hf_config(family, **changes)))
    theirs.save_pretrained(tmp_path)
    model = load_language_model(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()), theirs(tokens()).logits, atol=1e-4, rtol=1e-4)
    assert model.config.tied_embeddings == theirs.config.tie_word_embeddings


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_score_models_both_ways(family: str, tmp_path: Path) -> None:
    config = hf_config(family, num_labels=1)
    theirs = random_weights(transformers.AutoModelForSequenceClassification.from_config(config))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_scalar_model(tmp_path / "theirs").eval()
    row = tokens()[:1] % (VOCAB_SIZE - 2) + 2  # without the padding token
    with torch.no_grad():
        torch.testing.assert_close(ours(row)[:, -1], theirs(row).logits[:, 0], atol=1e-4, rtol=1e-4)
    save_model(tmp_path / "ours", ours, extra_config=TOKEN_IDS)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    assert again.config.num_labels == 1
    with torch.no_grad():
        torch.testing.assert_close(again(row).logits, theirs(row).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [*FAMILIES.values(), OWN], ids=[*FAMILIES.keys(), "own"])
@pytest.mark.parametrize("build", [language_model, scalar_model])
def test_round_trip_keeps_every_bit(config: ModelConfig, build: Any, tmp_path: Path) -> None:
    model = build(config)
    save_model(tmp_path, model)
    load = load_scalar_model if build is scalar_model else load_language_model
    loaded = load(tmp_path).state_dict()
    assert list(loaded) == list(model.state_dict())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("config", [LLAMA, GPT2, OWN], ids=["llama", "gpt2", "own"])
def test_round_trip_of_the_architecture(config: ModelConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, dropout=0.1, init_std=0.01, num_kv_heads=None)
    save_model(tmp_path, language_model(config))
    read, vocab_size = read_config(tmp_path)
    assert vocab_size == VOCAB_SIZE
    assert dataclasses.replace(read, ffn_hidden_size=config.ffn_hidden_size, num_kv_heads=None) == config


def test_a_loaded_model_trains_and_owns_its_memory(tmp_path: Path) -> None:
    save_model(tmp_path, language_model(LLAMA))
    model = load_language_model(tmp_path)
    model(tokens()).sum().backward()
    assert all(parameter.grad is not None and parameter.is_contiguous() for parameter in model.parameters())
    with torch.no_grad():
        model.trunk.token_embedding.weight.zero_()
    assert load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"].any()


@pytest.mark.parametrize("config", [LLAMA, OWN], ids=["llama", "own"])
def test_weights_can_come_beside_a_config(config: ModelConfig, tmp_path: Path) -> None:
    language, scalar = language_model(config), scalar_model(config)
    save_config(tmp_path / "language", language)
    save_config(tmp_path / "scalar", scalar)
    loaded = load_language_model(tmp_path / "language", state=language.state_dict())
    torch.testing.assert_close(loaded(tokens()), language(tokens()))
    statistics = {"score_mean": torch.tensor([0.25]), "score_std": torch.tensor([4.0])}  # as checkpoints hold them
    loaded_scalar = load_scalar_model(tmp_path / "scalar", state={**scalar.state_dict(), **statistics})
    torch.testing.assert_close(loaded_scalar(tokens()), scalar(tokens()))
    assert (loaded_scalar.score_mean, loaded_scalar.score_std) == (0.25, 4.0)
    with pytest.raises(UserError, match=r"missing: trunk\.token_embedding\.weight"):
        load_language_model(tmp_path / "language", state={})


def test_a_given_state_is_written(tmp_path: Path) -> None:
    model = language_model(LLAMA)
    with torch.device("meta"):
        sharded = LanguageModel(LLAMA, VOCAB_SIZE)
    save_model(tmp_path, sharded, state=model.state_dict())
    torch.testing.assert_close(load_language_model(tmp_path)(tokens()), model(tokens()))


def test_several_files_with_an_index(tmp_path: Path) -> None:
    model = language_model(LLAMA)
    save_model(tmp_path, model, max_file_bytes=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    loaded = load_language_model(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(tokens()).logits, model(tokens()), atol=1e-4, rtol=0
    )
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(UserError, match=r"names files that are not there: model-00002"):
        load_language_model(tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_become_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = language_model(LLAMA).to(dtype)
    save_model(tmp_path, model)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    loaded = load_language_model(tmp_path).state_dict()
    for name, tensor in model.state_dict().items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], tensor.float())


def test_tied_head_may_be_in_the_file(tmp_path: Path) -> None:
    model = language_model(LLAMA)
    save_model(tmp_path, model)
    edit_weights(tmp_path, **{"lm_head.weight": model.head_weight.detach().clone()})
    torch.testing.assert_close(load_language_model(tmp_path)(tokens()), model(tokens()))


def test_files_of_the_bare_trunk_are_read(tmp_path: Path) -> None:
    model = language_model(GPT2)
    save_model(tmp_path, model)
    bare = {
        name.removeprefix("transformer."): tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    mask = torch.ones(1, 1, 64, 64).tril()
    save_file(
        {**bare, "h.0.attn.bias": mask, "h.1.attn.masked_bias": torch.tensor(-1e4)}, tmp_path / "model.safetensors"
    )
    torch.testing.assert_close(load_language_model(tmp_path)(tokens()), model(tokens()))


def test_older_config_keys_are_read(tmp_path: Path) -> None:
    save_model(tmp_path, language_model(LLAMA))
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("rope_parameters", "head_dim", "llmtrain", "dtype"):
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps({**config, "rope_theta": 500000, "rope_scaling": None}))
    assert read_config(tmp_path)[0].rope_theta == 500_000


def test_own_layout_says_what_it_is(tmp_path: Path) -> None:
    save_model(tmp_path, language_model(OWN), extra_config=TOKEN_IDS)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "llmtrain"
    assert "only llmtrain reads this folder" in config["note"]
    assert config["eos_token_id"] == 1
    assert json.loads((tmp_path / "generation_config.json").read_text()) == TOKEN_IDS


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mamba"}, r"model_type 'mamba' is not supported; supported: gpt2, llama, mistral"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1.0}}, "rope_type='longrope'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "su", "factor": 2.0}}, "rope_type='su'"),
        (
            {"rope_scaling": {"rope_type": "yarn"}, "rope_parameters": None},
            r"rope_scaling\.yarn\.factor: Field required",
        ),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"sliding_window": 128}, "sliding_window=128"),
        ({"attention_dropout": 0.5}, "attention_dropout=0.5"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"vocab_size": None}, "vocab_size=None"),
        ({"num_hidden_layers": "2"}, "num_layers: Input should be a valid integer"),
        ({"hidden_act": "relu", "sliding_window": 4}, r"(?s)hidden_act='relu'.*sliding_window=4"),
    ],
)
def test_unsupported_options_are_named(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    save_model(tmp_path, language_model(LLAMA))
    edit_config(tmp_path, **changes)
    with pytest.raises(UserError, match=words):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"activation_function": "relu"}, "activation_function='relu'"),
        ({"attn_pdrop": 0.3}, "embd_pdrop, attn_pdrop and resid_pdrop that differ"),
    ],
)
def test_unsupported_options_of_gpt2_are_named(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    save_model(tmp_path, language_model(GPT2))
    edit_config(tmp_path, **changes)
    with pytest.raises(UserError, match=words):
        read_config(tmp_path)


def test_all_tensors_that_do_not_fit_are_listed_at_once(tmp_path: Path) -> None:
    save_model(tmp_path, language_model(LLAMA))
    extra = {"model.extra": torch.zeros(2), "model.norm.weight": torch.zeros(7)}
    edit_weights(tmp_path, drop="model.layers.0.self_attn.k_proj.weight", **extra)
    with pytest.raises(UserError) as caught:
        load_language_model(tmp_path)
    assert "missing: model.layers.0.self_attn.k_proj.weight" in str(caught.value)
    assert "not part of the architecture: model.extra" in str(caught.value)
    assert "model.norm.weight is [7], expected [32]" in str(caught.value)


def test_pickles_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path, language_model(LLAMA))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled weights only"):
        load_language_model(tmp_path)


def test_broken_weights_are_named(tmp_path: Path) -> None:
    save_model(tmp_path, language_model(LLAMA))
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read as safetensors"):
        load_language_model(tmp_path)


def test_the_wrong_kind_of_model_is_named(tmp_path: Path) -> None:
    save_model(tmp_path / "language", language_model(LLAMA))
    save_model(tmp_path / "reward", scalar_model(LLAMA))
    with pytest.raises(UserError, match="holds a reward model"):
        load_language_model(tmp_path / "reward")
    with pytest.raises(UserError, match="holds no reward model"):
        load_scalar_model(tmp_path / "language")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("{folder}", "is no model folder: it has no config.json"),
        ("{folder}/absent", "there is no folder"),
        ("./absent", "there is no folder"),
        ("no-such/model", "could not be fetched from the hub"),
    ],
)
def test_folders_that_are_none(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        read_config(name.format(folder=tmp_path))


def test_invalid_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
        read_config(tmp_path)
