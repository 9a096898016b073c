"""What is said of objectives before anything is read or built."""

from pathlib import Path

import pytest

from llmtrain.config.compose import load_config
from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import MaskedConfig, NextTokenConfig, SpanCorruptionConfig, UsualObjectiveConfig

ENCODER, PAIR = "model.architecture=encoder", "model.architecture=encoder_decoder"
MASKED, SPANS = ["objective=masked", ENCODER], ["objective=span_corruption", PAIR]
TWO = [*MASKED, "objective.next_sentence=true", "model.pooler=true", "model.num_segments=2"]
CASES = {
    "masked decoder": (
        ["objective=masked"],
        "objective.name: masked is for architecture encoder, and the model's is decoder: set model.architecture=encoder"
        ", or choose objective=next_token or prefix or fill_in_the_middle",
    ),
    "spans of an encoder": (["objective=span_corruption", ENCODER], "or choose objective=masked"),
    "next tokens of both": (
        ["objective=next_token", PAIR],
        "next_token is for architecture decoder, and the model's is encoder_decoder",
    ),
    "prefix of an encoder": (["objective=prefix", ENCODER], "prefix is for architecture decoder"),
    "more than all": (
        [*MASKED, "objective.replace_rate=0.8", "objective.random_rate=0.3"],
        "objective.replace_rate: 0.8 + 0.3 are more than 1",
    ),
    "key of another": ([*MASKED, "+objective.noise_density=0.3"], "objective=masked has the keys"),
    "name": (["objective.name=maskd"], "did you mean masked?"),
    "two segments of a stream": (
        [*TWO, "data.streaming=true"],
        "objective.next_sentence: the second segment may come from anywhere, which a stream cannot be asked for",
    ),
    "two segments of documents": ([*TWO, "data.sequences=documents"], "data.sequences: two segments are cut from"),
    "two segments apart": ([*TWO, "data.attend_across_documents=false"], "leave data.attend_across_documents=true"),
    "no pooler": ([*TWO, "model.pooler=false"], "objective.next_sentence: judges by a pooler: set model.pooler=true"),
    "no segments": ([*TWO, "model.num_segments=0"], "has two segments: set model.num_segments=2"),
    "pooler for nothing": ([*MASKED, "model.pooler=true"], "only objective.next_sentence=true trains it"),
    "spans of documents": ([*SPANS, "data.sequences=documents"], "span_corruption reads running text"),
    "spans apart": ([*SPANS, "data.attend_across_documents=false"], "leave data.attend_across_documents=true"),
    "too many spans": (
        [*SPANS, "objective.mean_span_length=1", "objective.noise_density=0.25", "train.sequence_length=512"],
        "objective.mean_span_length: 511 tokens of text have 128 spans",
    ),
    "all but nothing taken out": (
        [*SPANS, "objective.noise_density=0.98"],
        "objective.noise_density: so much is taken",
    ),
    "no room for sentinels": (
        [*SPANS, "tokenizer.vocab_size=350"],
        "tokenizer.vocab_size: 350 has no room for the 100 sentinels of span_corruption; give 400 or more",
    ),
    "shares": (
        ["objective=prefix", "objective.min_share=0.6", "objective.max_share=0.5"],
        "objective.min_share: 0.6 is above objective.max_share=0.5",
    ),
    "spans as usual": ([PAIR, "data.sequences=documents"], "data.sequences: span_corruption reads running text"),
    "cut rows": (
        ["objective=prefix", "train.length_warmup.start_length=64", "train.length_warmup.steps=9"],
        "train.length_warmup: rows are cut for next_token only, not for prefix",
    ),
    "tokenizer that is there": (
        ["tokenizer.path=PATH", "tokenizer.special_tokens_for=[masked]"],
        "tokenizer.special_tokens_for: has no effect: the tokenizer of tokenizer.path is trained already",
    ),
    "kinds of tokens": (["tokenizer.special_tokens_for=[mask]"], "special_tokens_for.0: 'mask'"),
    "smoothing": (["objective.label_smoothing=1.0"], "it takes a number >= 0 and < 1"),
}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_fit_is_told(case: str, tmp_path: Path) -> None:
    overrides, said = CASES[case]
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError) as caught:
        load_config("pretrain", [text.replace("PATH", "tokenizer.json") for text in overrides])
    assert said in str(caught.value)


def test_objectives_from_yaml() -> None:
    assert load_config("pretrain").objective == UsualObjectiveConfig()
    assert load_config("pretrain", ["objective=next_token"]).objective == NextTokenConfig()
    assert load_config("pretrain", ["objective.z_loss=1e-4", ENCODER]).objective == UsualObjectiveConfig(z_loss=1e-4)
    masked = load_config("pretrain", [*TWO, "objective.mask_rate=0.3", "objective.z_loss=1e-4"]).objective
    assert masked == MaskedConfig(mask_rate=0.3, next_sentence=True, z_loss=1e-4)
    spans = load_config("pretrain", [*SPANS, "objective.noise_density=0.5", "objective.mean_span_length=5"]).objective
    assert spans == SpanCorruptionConfig(noise_density=0.5, mean_span_length=5.0)
    assert load_config("sft", ["objective.label_smoothing=0.1"], later=["model.init_from"]).objective.label_smoothing
    prepared = load_config("prepare", ["tokenizer.special_tokens_for=[masked,fill_in_the_middle]"]).tokenizer
    assert prepared.special_tokens_for == ["masked", "fill_in_the_middle"]


def test_the_usual_objective_of_an_architecture() -> None:
    usual = UsualObjectiveConfig(label_smoothing=0.1)
    assert usual.of("decoder", False) == NextTokenConfig(label_smoothing=0.1)
    assert usual.of("encoder", False) == MaskedConfig(label_smoothing=0.1)
    assert usual.of("encoder", True) == MaskedConfig(label_smoothing=0.1, next_sentence=True)
    assert usual.of("encoder_decoder", False) == SpanCorruptionConfig(label_smoothing=0.1)


def test_a_model_of_a_folder_is_checked_with_the_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    load_config("pretrain", ["objective=masked", f"model.init_from={tmp_path / 'model'}"])
