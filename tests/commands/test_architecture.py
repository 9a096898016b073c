"""`llmtrain show model=`: sizes, costs and memory, from names and folders."""

import re
from pathlib import Path

import pytest
from tests.tiny import TINY_MODELS

from llmtrain.commands import show
from llmtrain.commands.architecture import vocabulary
from llmtrain.config.compose import load_config
from llmtrain.config.errors import ConfigError
from llmtrain.config.overrides import for_stage
from llmtrain.config.schema import ModelConfig, OptimizerConfig, ShowConfig, TokenizerConfig
from llmtrain.data.tokenizers import train_tokenizer
from llmtrain.models.formats import save_model
from llmtrain.models.heads import LanguageModel, make_model
from llmtrain.optim.optimizers import state_bytes_per_weight


def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: str, *overrides: str) -> str:
    monkeypatch.setenv("COLUMNS", "160")
    show.run(ShowConfig(model=model, overrides=list(overrides)))
    return re.sub(r"[ │┃]+", " ", capsys.readouterr().out)


def test_gpt_3_is_answered_from_shapes_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shown(
        capsys, monkeypatch, "gpt3_175b", "train.sequence_length=2048", "train.micro_batch_rows=1",
        "engine.precision=bfloat16",
    )  # fmt: skip
    assert "vocabulary of 50,257" in out
    assert "total 174,604,259,328 175G" in out
    assert "blocks.*.attention.qkv 36864 x 12288 96 43,486,543,872 24.91%" in out
    # 6 for each weight in products, 6 T H for each layer's attention
    training = 6 * (96 * 12 * 12288**2 + 50_257 * 12_288) + 6 * 96 * 2048 * 12288
    assert f"forward and backward {training / 1e12:.3g}T" in out
    assert f"forward {training / 3e9:.3g}G" in out
    assert f"{6 * 96 * 2048 * 12288 / training:.1%}" in out
    parameters = 174_604_259_328
    assert f"weights, float32 {4 * parameters / 2**30:.2f}" in out
    assert f"state of AdamW {8 * parameters / 2**30:,.2f}" in out
    # 2 float32 inputs of norms, then in bfloat16: 2 inputs of projections, queries to values, the sum over the values
    # and the two sides of GELU, of 4 H each; a log-sum-exp for each head
    layer = 2048 * (12288 * (8 + 2 * (2 + 3 + 1 + 8)) + 4 * 96)
    assert f"activations of blocks together {96 * layer / 2**30:,.2f}" in out


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_small_architecture_is_shown(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config: ModelConfig = load_config("pretrain", [f"model={name}"]).model
    built = make_model(config, 2048)
    out = shown(capsys, monkeypatch, name)
    assert f"total {sum(each.numel() for each in built.parameters()):,}" in out
    assert "GiB" in out


def test_two_lengths_show_what_attention_costs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shown(capsys, monkeypatch, "llama2_7b")
    assert "FLOPs per token rows of 256 rows of 4,096" in out
    assert "weights in bfloat16" not in out
    assert "the token embedding" not in out


def test_keys_of_pretrain_change_what_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shown(capsys, monkeypatch, "llama_tiny", "model.num_layers=2", "train.micro_batch_rows=3", "optimizer=sgd")
    assert "vocabulary of 2,048" in out
    assert "blocks.*.attention.qkv 384 x 128 2" in out
    assert "memory with 3 rows of 256, products in float32" in out
    assert "state of SGD" in out


def test_a_folder_is_shown_with_its_own_vocabulary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ModelConfig(num_layers=1, hidden_size=16, num_heads=2, max_sequence_length=512)
    model = LanguageModel(config, 77)
    save_model(tmp_path / "model", model)
    train_tokenizer(["It is this."] * 5, 300).save(tmp_path / "model")
    out = shown(capsys, monkeypatch, str(tmp_path / "model"))
    assert "vocabulary of 77" in out
    assert f"total {sum(each.numel() for each in model.parameters()):,}" in out
    assert "head the token embedding" in out


def test_the_vocabulary_is_the_tokenizers_where_the_config_names_one() -> None:
    model = ModelConfig(published_vocab_size=50_257)
    assert vocabulary(model, TokenizerConfig()) == 50_257
    assert vocabulary(model, TokenizerConfig(vocab_size=32_000)) == 32_000
    assert vocabulary(ModelConfig(), TokenizerConfig()) == 2048


def test_what_the_optimizer_keeps_is_seen_from_a_step() -> None:
    assert state_bytes_per_weight(OptimizerConfig()) == 8
    sgd = {"_target_": "torch.optim.SGD", "betas": None, "eps": None}
    assert state_bytes_per_weight(OptimizerConfig(**sgd)) == 0
    assert state_bytes_per_weight(OptimizerConfig(**sgd, options={"momentum": 0.9})) == 4
    assert state_bytes_per_weight(OptimizerConfig(options={"amsgrad": True})) == 12
    factored = state_bytes_per_weight(OptimizerConfig(_target_="torch.optim.Adafactor", betas=None, eps=None))
    assert 0 < factored < 0.1


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model=gpt3_175b", "step=3"], "step: has no effect: a model is shown"),
        (["model=gpt3_175b", "rows=5"], "rows: has no effect: a model is shown"),
        (["model=gpt3_175b", "run=x"], "run: has no effect: a model is shown"),
    ],
)
def test_what_belongs_to_rows_has_no_effect_on_a_model(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config("show", overrides)


def test_on_the_command_line_a_model_is_shows_own_key_and_the_rest_is_pretrains() -> None:
    config = load_config("show", for_stage(["model=gpt2_small", "model.num_layers=3", "train.micro_batch_rows=2"]))
    assert config.model == "gpt2_small"
    assert config.overrides == ["model.num_layers=3", "train.micro_batch_rows=2"]


def test_an_unknown_model_is_told_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no option gpt3_175") as caught:
        show.run(ShowConfig(model="gpt3_175"))
    assert "gpt3_175b" in str(caught.value)
