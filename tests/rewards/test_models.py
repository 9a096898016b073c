"""The learned reward reads an answer as PPO's rollouts do: the same bits."""

import dataclasses

import pytest
import torch

from llmtrain.config.schema import ModelConfig
from llmtrain.models.heads import LanguageModel, ScalarModel
from llmtrain.objectives.pairs import answer_scores
from llmtrain.rewards.answers import Answer
from llmtrain.rewards.models import LearnedReward

CONFIG = ModelConfig(num_layers=2, hidden_size=32, num_heads=2, max_sequence_length=64)
VOCAB, PAD = 61, 0


@pytest.fixture(scope="module")
def model() -> ScalarModel:
    draw = torch.Generator().manual_seed(0)
    found = ScalarModel.from_language_model(LanguageModel(CONFIG, VOCAB).initialise(draw), draw)
    found.score_mean.fill_(0.3)
    found.score_std.fill_(0.7)
    return found.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def answers() -> list[Answer]:
    draw = torch.Generator().manual_seed(1)
    lengths = [(3, 5), (9, 1), (4, 20), (2, 2), (7, 6)]
    made = [[torch.randint(1, VOCAB, (n,), generator=draw).tolist() for n in pair] for pair in lengths]
    return [
        Answer(prompt_tokens=prompt, tokens=tokens, prompt="", text="", expected=None, finished=True)
        for prompt, tokens in made
    ]


@pytest.mark.parametrize("rows", [None, 1, 2, 16])
def test_scores_are_those_of_right_padded_rows(model: ScalarModel, answers: list[Answer], rows: int | None) -> None:
    tokens = torch.full((5, 24), PAD)  # 4 + 20 tokens are the longest, a multiple of 8
    mask = torch.zeros(5, 24, dtype=torch.bool)
    for number, each in enumerate(answers):
        begin, end = len(each.prompt_tokens), len(each.prompt_tokens) + len(each.tokens)
        tokens[number, :end] = torch.tensor([*each.prompt_tokens, *each.tokens])
        mask[number, begin:end] = True
    portions = [slice(at, at + (rows or 5)) for at in range(0, 5, rows or 5)]
    scores = torch.cat([answer_scores(model(tokens[each]), mask[each]) for each in portions])
    given = LearnedReward(model, pad_id=PAD, micro_batch_rows=rows)(answers)
    assert torch.equal(torch.tensor(given), model.normalised(scores))


def test_an_answer_is_judged_alone(model: ScalarModel, answers: list[Answer]) -> None:
    reward = LearnedReward(model, pad_id=PAD)
    together = reward(answers)
    assert [reward([each])[0] for each in answers] == pytest.approx(together, abs=1e-5)
    changed = dataclasses.replace(answers[0], tokens=[*answers[0].tokens, 7])
    assert reward([changed])[0] != pytest.approx(together[0], abs=1e-5)
    assert reward([]) == []
