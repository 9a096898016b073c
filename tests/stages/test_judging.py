"""What judges sampled answers, from a config."""

from pathlib import Path

import pytest
import torch

from llmtrain.config.compose import load_config
from llmtrain.config.errors import DataError
from llmtrain.config.schema import AlignConfig, ModelConfig
from llmtrain.data.encoding import PromptRow
from llmtrain.models.formats import save_model
from llmtrain.models.heads import LanguageModel, ScalarModel
from llmtrain.rewards.answers import Answer
from llmtrain.rewards.models import LearnedReward
from llmtrain.stages.judging import build_reward, check_expected

CPU = torch.device("cpu")
ANSWERS = [
    Answer(prompt_tokens=[5, 6], tokens=[7, 8], prompt="", text=text, expected="63", finished=True)
    for text in ("Answer: 63", "Answer: 6")
]


def align_config(*texts: str) -> AlignConfig:
    config: AlignConfig = load_config("align", ["method=ppo", *texts])
    return config


@pytest.fixture
def reward_model(tmp_path: Path) -> ScalarModel:
    """A reward model, saved in the folder `model`."""
    draw = torch.Generator().manual_seed(0)
    shape = ModelConfig(num_layers=1, hidden_size=16, num_heads=2, max_sequence_length=16)
    model = ScalarModel.from_language_model(LanguageModel(shape, 300).initialise(draw), draw).eval()
    model.score_mean.fill_(0.5)
    save_model(tmp_path / "model", model)
    return model


def test_rewards_alone() -> None:
    config = align_config("rewards=[exact_answer,length]", "rewards.length.weight=0.5")
    reward = build_reward(config, pad_id=0, device=CPU, say=print)
    assert reward.components(ANSWERS) == {"exact_answer": [1.0, 0.0], "length": [0.0, 0.0]}
    assert reward.weights == {"exact_answer": 1.0, "length": 0.5}
    assert reward.needs_expected == ("exact_answer",)


def test_reward_model_and_a_rule(tmp_path: Path, reward_model: ScalarModel) -> None:
    texts = ["rewards=exact_answer", f"reward_model={tmp_path}", "reward_model_weight=0.25"]
    found = build_reward(align_config(*texts), pad_id=0, device=CPU, say=print)
    scores = LearnedReward(reward_model, pad_id=0)(ANSWERS)
    assert found.components(ANSWERS) == {"reward_model": scores, "exact_answer": [1.0, 0.0]}
    assert found(ANSWERS) == [0.25 * scores[0] + 1.0, 0.25 * scores[1]]


def test_a_reward_model_alone_is_its_score(tmp_path: Path, reward_model: ScalarModel) -> None:
    found = build_reward(align_config(f"reward_model={tmp_path}"), pad_id=0, device=CPU, say=print)
    assert found(ANSWERS) == LearnedReward(reward_model, pad_id=0)(ANSWERS)


def test_a_reward_model_that_is_not_normalised_is_told_of(tmp_path: Path, reward_model: ScalarModel) -> None:
    said: list[str] = []
    config = align_config(f"reward_model={tmp_path}")
    build_reward(config, pad_id=0, device=CPU, say=said.append)
    assert said == []
    reward_model.score_mean.fill_(0.0)
    save_model(tmp_path / "model", reward_model)
    build_reward(config, pad_id=0, device=CPU, say=said.append)
    assert said == [f"reward_model: {tmp_path} is not normalised, as only a finished run of llmtrain reward is; "
                    "its scores are taken as they are"]  # fmt: skip


def test_rows_without_an_answer_are_named() -> None:
    asked, unknown = PromptRow([1], "What?", "3"), PromptRow([1], "Who?", None, "x:2")
    rows = {"a": [asked], "b": [asked, unknown]}
    exact, regex = (
        build_reward(align_config(*texts), pad_id=0, device=CPU, say=print)
        for texts in (["rewards=exact_answer"], ["rewards=regex", "rewards.regex.options.pattern=a"])
    )
    with pytest.raises(DataError, match=r"rewards.exact_answer needs .* none in data.sources.b at x:2: add a column"):
        check_expected(exact, rows)
    check_expected(regex, rows)
    check_expected(exact, {"a": rows["a"]})
