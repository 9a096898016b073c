"""Objectives of pretraining as a stage builds them: what is measured, what is refused, what a run leaves behind."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import OBJECTIVES, TINY

from llmtrain import cli
from llmtrain.config.compose import load_config
from llmtrain.config.errors import ConfigError, DataError
from llmtrain.config.schema import PretrainConfig
from llmtrain.data.sequences import TextRow
from llmtrain.data.tokenizers import Tokenizer, train_tokenizer
from llmtrain.models.formats import load_language_model, save_model
from llmtrain.models.heads import make_model
from llmtrain.stages import pretrain
from llmtrain.stages.evaluators import evaluate_bits_per_byte
from llmtrain.stages.tasks import build_task, check_model, check_rows

TEXT = "the quick brown fox jumps over lazy dogs and walks home. "
SHORT = ["train.steps=2", "schedule.warmup_steps=0", "engine.compile=false"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([TEXT * 9], 420, objectives=("masked", "span_corruption", "fill_in_the_middle"))


def config_of(name: str, *overrides: str) -> PretrainConfig:
    config: PretrainConfig = load_config("pretrain", [*TINY["pretrain"], *OBJECTIVES.get(name, []), *overrides])
    return config


class Rows(list[TextRow]):
    """Held-out rows of one length."""

    def __init__(self, tokenizer: Tokenizer, length: int, count: int = 5) -> None:
        ids = np.array([*tokenizer.encode(TEXT * 3), tokenizer.eos_id])
        mask = np.arange(length) > 0
        super().__init__(TextRow(np.resize(np.roll(ids, 7 * row), length), mask, None) for row in range(count))


@pytest.mark.parametrize("name", [*OBJECTIVES, "next_token"])
def test_bits_per_byte_are_those_of_the_predicted_text(name: str, tokenizer: Tokenizer) -> None:
    config = config_of(name)
    task = build_task(config, tokenizer)
    model = make_model(config.model, tokenizer.vocab_size).initialise(torch.Generator().manual_seed(0)).eval()
    counts = np.arange(tokenizer.vocab_size)
    domain = pretrain.domain(config, tokenizer, task, Rows(tokenizer, task.row_length), 0, counts)  # type: ignore[arg-type]
    assert domain is not None
    predicted = torch.cat([batch.predicted() for batch in domain.batches])  # type: ignore[attr-defined]
    text = sum(len(tokenizer.decode([token]).encode()) for token in predicted.tolist())
    assert domain.num_bytes == text > 20
    unigram = (counts + 1) / (counts + 1).sum()
    bits = -np.log2(unigram[predicted.numpy()]).sum()
    assert domain.unigram_bits_per_byte == pytest.approx(bits / text, rel=1e-9)
    measure = evaluate_bits_per_byte(model, task.measure, {"a": domain}, torch.device("cpu"), task.metrics)
    with torch.no_grad():
        found = measure()
    # weights near zero make every token about as likely
    uniform = len(predicted) * math.log2(tokenizer.vocab_size) / text
    assert found["eval/a/bits_per_byte"] == pytest.approx(uniform, rel=0.05)
    assert set(found) - {"eval/a/bits_per_byte", "eval/a/unigram_bits_per_byte"} == {
        f"eval/a/{metric}" for metric in task.metrics
    }


def test_held_out_rows_are_corrupted_alike_in_every_run(tokenizer: Tokenizer) -> None:
    found = []
    for seed in (1, 2):
        config = config_of("masked", f"seed={seed}")
        task = build_task(config, tokenizer)
        counts = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        domain = pretrain.domain(config, tokenizer, task, Rows(tokenizer, task.row_length), 3, counts)  # type: ignore[arg-type]
        assert domain is not None
        found.append(torch.cat([batch.places for batch in domain.batches]))  # type: ignore[attr-defined]
    assert torch.equal(*found)


def test_fill_in_the_middle_is_measured_from_left_to_right(tokenizer: Tokenizer) -> None:
    config = config_of("infilling")
    task, rows = build_task(config, tokenizer), Rows(tokenizer, 32)
    domain = pretrain.domain(config, tokenizer, task, rows, 0, np.zeros(tokenizer.vocab_size, dtype=np.int64))  # type: ignore[arg-type]
    assert domain is not None
    assert domain.batches[0].tokens.tolist() == [row.tokens.tolist() for row in rows[:4]]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("name", "length"), [("span-corruption", 34), ("two-segments", 29), ("masked", 32)])
def test_rows_of_text_are_as_long_as_it_takes(name: str, length: int, tokenizer: Tokenizer) -> None:
    task = build_task(config_of(name), tokenizer)
    assert task.row_length == length


def test_a_tokenizer_without_special_tokens_is_named(tmp_path: Path) -> None:
    plain = train_tokenizer([TEXT * 9], 300)
    plain.save(tmp_path / "plain")
    masked = config_of("masked")
    config = dataclasses.replace(masked, tokenizer=dataclasses.replace(masked.tokenizer, path=str(tmp_path / "plain")))
    with pytest.raises(DataError, match=r"objective=masked needs .* the tokenizer of tokenizer.path=\S*plain"):
        build_task(config, plain)


def test_models_of_folders_are_checked(tokenizer: Tokenizer, tmp_path: Path) -> None:
    def started(name: str, objective: str) -> tuple[PretrainConfig, Any]:
        save_model(tmp_path / name, make_model(config_of(name).model, tokenizer.vocab_size))
        tokenizer.save(tmp_path / name)
        config = load_config("pretrain", [f"objective={objective}", f"model.init_from={tmp_path / name}"])
        return config, load_language_model(tmp_path / name)

    with pytest.raises(ConfigError, match=r"masked is for architecture encoder, and the model .* architecture decoder"):
        check_model(*started("prefix", "masked"))
    config, model = started("masked", "masked")
    check_model(config, model)
    asks = dataclasses.replace(config, objective=dataclasses.replace(config.objective, next_sentence=True))
    with pytest.raises(ConfigError, match=r"objective.next_sentence: the model .* has no pooler"):
        check_model(asks, model)
    with pytest.raises(ConfigError, match="name the objective: objective=masked"):
        check_model(*started("masked", "auto"))
    check_model(*started("prefix", "auto"))
    config, model = started("two-segments", "masked")
    check_model(config, model)
    assert not any(each.requires_grad for each in model.pooler.parameters())
    assert model.head_weight.requires_grad


def test_two_segments_need_two_rows(tokenizer: Tokenizer) -> None:
    config = config_of("two-segments")
    check_rows(config, {"a": Rows(tokenizer, 29, count=2)})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=r"data.sources.a has 1 row\(s\) of text, and two are needed"):
        check_rows(config, {"a": Rows(tokenizer, 29, count=1)})  # type: ignore[dict-item]
    check_rows(config_of("masked"), {"a": Rows(tokenizer, 32, count=1)})  # type: ignore[dict-item]


def test_a_run_of_an_encoder(tmp_path: Path) -> None:
    command = ["pretrain", *TINY["pretrain"], *OBJECTIVES["two-segments"], *SHORT, f"runs_dir={tmp_path}", "run=a"]
    assert cli.main(command) == 0
    rows = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").open()]
    for name in ("masked_accuracy", "next_sentence_accuracy"):
        assert 0 <= rows[-1][f"eval/prose/{name}"] <= 1
        assert 0 <= rows[-1][f"train/{name}"] <= 1
    assert rows[-1]["data/prose/tokens"] % 29 == 0  # of text; the model reads 32
    assert json.loads((tmp_path / "a" / "samples.json").read_text()) == {"before": [], "after": []}
    assert load_language_model(tmp_path / "a" / "model").config.architecture == "encoder"


def test_a_run_of_an_encoder_decoder_shows_what_it_fills_in(tmp_path: Path) -> None:
    command = ["pretrain", *TINY["pretrain"], *OBJECTIVES["span-corruption"], *SHORT, f"runs_dir={tmp_path}", "run=a"]
    assert cli.main(command) == 0
    samples = json.loads((tmp_path / "a" / "samples.json").read_text())
    assert len(samples["before"]) == len(samples["after"]) == 3  # of each source one
    for sample in samples["after"]:
        assert sample["prompt"].count("<extra_id_") == sample["expected"].count("<extra_id_") == 2
        assert sample["expected"].startswith("<extra_id_0>")
        assert sample["answer"]
