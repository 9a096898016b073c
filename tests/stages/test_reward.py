"""What the reward stage measures and stores, and its rows."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import finish, make_parents, starting_from

from llmtrain.config.compose import load_config
from llmtrain.config.errors import DataError
from llmtrain.config.schema import ModelConfig, RewardConfig
from llmtrain.data.encoding import RankingRow, TokenRow
from llmtrain.data.rankings import collate_rankings
from llmtrain.data.tokenizers import Tokenizer, train_tokenizer
from llmtrain.models.formats import load_scalar_model, save_model
from llmtrain.models.heads import LanguageModel, ScalarModel
from llmtrain.objectives.reward import BradleyTerry, calibration_error, correlation
from llmtrain.stages.evaluators import held_out_batches
from llmtrain.stages.pairs import read_rankings
from llmtrain.stages.planning import row_digests
from llmtrain.stages.reward import described, evaluate_rankings, spread_out, store_statistics

VOCAB, CPU = 61, torch.device("cpu")


def made_rows(count: int, seed: int) -> list[RankingRow]:
    """Rankings of two to four answers of random tokens."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        size = 2 + number % 3
        lengths = torch.randint(3, 20, (size,), generator=draw).tolist()
        tokens = [torch.randint(1, VOCAB, (length,), generator=draw).int().numpy() for length in lengths]
        answers = tuple(TokenRow(each, torch.arange(len(each)).ge(2).numpy()) for each in tokens)
        better = tuple((one, other) for one in range(size) for other in range(one + 1, size))
        rows.append(RankingRow(answers, better, (None,) * len(better)))
    return rows


@pytest.fixture
def model() -> ScalarModel:
    draw = torch.Generator().manual_seed(0)
    config = ModelConfig(num_layers=2, hidden_size=32, num_heads=2, max_sequence_length=64)
    return ScalarModel.from_language_model(LanguageModel(config, VOCAB).initialise(draw), draw)


def scores_of(model: ScalarModel, rows: list[RankingRow]) -> list[torch.Tensor]:
    """The raw scores of each row's answers, each read alone."""
    with torch.no_grad():
        return [torch.cat([model(torch.tensor(each.tokens)[None])[:, -1] for each in row.answers]) for row in rows]


def test_the_stored_model_has_mean_0_and_standard_deviation_1_on_its_reference_set(
    tmp_path: Path, model: ScalarModel
) -> None:
    rows = {"a": made_rows(70, 1), "b": made_rows(5, 2)}
    store_statistics(model, model, held_out_batches(rows, collate_rankings, 0), CPU)
    save_model(tmp_path, model)
    stored = load_scalar_model(tmp_path).eval()
    scores = stored.normalised(torch.cat(scores_of(stored, rows["a"] + rows["b"])).double())
    assert len(scores) == sum(len(row.answers) for each in rows.values() for row in each)
    assert abs(float(scores.mean())) < 1e-5
    assert float(scores.std(correction=0)) == pytest.approx(1.0, abs=1e-5)
    assert float(stored.score_std) != 1.0


@pytest.mark.parametrize(("rows", "taken"), [(3, [0, 1, 2]), (8, [0, 2, 4, 6]), (9, [0, 3, 6]), (0, [])])
def test_the_reference_set_is_taken_from_all_of_a_source(rows: int, taken: list[int]) -> None:
    numbers: list[Any] = list(range(rows))
    assert spread_out(numbers, 4) == taken


def test_held_out_rankings_are_measured_by_source(model: ScalarModel) -> None:
    rows = {"a": made_rows(70, 1), "b": made_rows(5, 2)}
    batches = held_out_batches(rows, collate_rankings, 0)
    model.eval()
    with torch.no_grad():
        values = evaluate_rankings(model, BradleyTerry(), batches, list(rows), CPU)()
    right = []
    for name, each in rows.items():
        scores = scores_of(model, each)
        leads = [[one[i] - one[j] for i, j in row.better] for one, row in zip(scores, each, strict=True)]
        lead = torch.stack([value for row in leads for value in row])
        lengths = torch.tensor([float(answer.mask.sum()) for row in each for answer in row.answers])
        assert values[f"eval/{name}/pair_accuracy"] == pytest.approx(float((lead > 0).double().mean()))
        assert values[f"eval/{name}/calibration_error"] == pytest.approx(calibration_error(lead), abs=1e-5)
        assert values[f"eval/{name}/length_correlation"] == pytest.approx(
            correlation(torch.cat(scores), lengths), abs=1e-5
        )
        right += [sum(float(value > 0) for value in row) / len(row) for row in leads]
    assert values["eval/pair_accuracy"] == pytest.approx(sum(right) / 75)
    assert len(values) == 9


def test_what_is_trained_on_is_described() -> None:
    rows = made_rows(3, 1)
    assert described({"a": rows}) == "10 pairs of 3 rankings"
    assert described({"a": rows[:1], "b": rows[:1]}) == "2 pairs"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["What is 1 + 1?"] * 5, 300)


RANKED = [{"prompt": str(number), "answers": ["a", "b", "c"], "scores": [3, 2, 0]} for number in range(8)]


def reward_config(folder: Path, rows: list[dict], *texts: str) -> RewardConfig:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config: RewardConfig = load_config("reward", ["data=files", f"data.sources.files.path={folder}/rows.jsonl", *texts])
    return config


def test_rankings_are_kept_whole_or_taken_apart(tmp_path: Path, tokenizer: Tokenizer) -> None:
    options = (tokenizer, "train", 32, tmp_path)
    whole = reward_config(tmp_path, RANKED)
    [row, *_] = found = read_rankings(whole, *options)["files"]
    assert (len(found), len(row.answers), row.margins) == (7, 3, (1.0, 3.0, 2.0))  # one is held out
    apart = read_rankings(reward_config(tmp_path, RANKED, "objective.rankings=pairs"), *options, 4)["files"]
    assert [len(each.answers) for each in apart] == [2] * 4
    assert apart[1].answers[0] is apart[0].answers[0]
    digests = [row_digests(whole.data, {"files": each})["files"]["content"] for each in (found, apart)]
    swapped = [each._replace(better=tuple((j, i) for i, j in each.better)) for each in found]
    digests.append(row_digests(whole.data, {"files": swapped})["files"]["content"])
    assert len(set(digests)) == 3


def test_a_pair_without_a_margin_is_named_where_one_is_needed(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b", "margin": 1.0}] * 4
    rows[2] = {"prompt": "q", "chosen": "a", "rejected": "b"}
    config = reward_config(tmp_path, rows, "objective.margin_weight=1")
    with pytest.raises(DataError, match=r"needs a margin .* none in data.sources.files at .*line 3: expected a number"):
        read_rankings(config, tokenizer, "train", 32, tmp_path)


def test_a_place_is_named_only_where_there_is_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = load_config("reward", ["objective.margin_weight=1", "data.sources.arithmetic.max_rows=4"])
    with pytest.raises(DataError, match=r"there is none in data.sources.arithmetic: expected a number in `margin`"):
        read_rankings(config, tokenizer, "train", 512, tmp_path)


@pytest.mark.slow
def test_a_reward_model_of_rankings_from_the_command_line(tmp_path: Path) -> None:
    runs = make_parents(tmp_path / "runs")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in RANKED * 4))
    texts = ["data=files", f"data.sources.files.path={tmp_path}/rows.jsonl", "objective.margin_weight=0.1"]
    texts += ["objective.centring_weight=0.01", "train.batch_rows=8", "data.validation_every=4", "train.steps=20"]
    texts += ["optimizer.lr=3e-3", "schedule.warmup_steps=0"]
    errors = finish(["reward", *texts, *starting_from(runs, "reward"), f"runs_dir={runs}", "run=ranked"])
    assert "72 pairs of 24 rankings" in errors
    rows = [json.loads(line) for line in (runs / "ranked" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["eval/files/pair_accuracy"] == 1.0 > rows[0]["eval/files/pair_accuracy"]
    assert "eval/files/calibration_error" in rows[-1]
    assert "eval/files/length_correlation" not in rows[-1]  # all answers are equally long
