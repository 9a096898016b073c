"""Language, score and actor-critic models."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.config.schema import ModelConfig
from llmtrain.models.heads import ActorCritic, LanguageModel, ScalarModel, SharedActorCritic

CONFIG = ModelConfig(num_layers=2, hidden_size=32, num_heads=2, max_sequence_length=32)
VOCAB_SIZE = 40


def language_model(**changes: object) -> LanguageModel:
    config = dataclasses.replace(CONFIG, **changes)
    return LanguageModel(config, VOCAB_SIZE).initialise(torch.Generator().manual_seed(0)).eval()


def scalar_model(seed: int = 1) -> ScalarModel:
    return ScalarModel.from_language_model(language_model(), torch.Generator().manual_seed(seed))


def tokens(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("tied", [True, False])
def test_read_gets_hidden_states_and_head(tied: bool) -> None:
    model = language_model(tied_embeddings=tied)
    hidden, head_weight = model(tokens(), read=lambda hidden, head_weight: (hidden, head_weight))
    assert hidden.shape == (2, 7, 32)
    assert head_weight.shape == (VOCAB_SIZE, 32)
    assert (head_weight is model.trunk.token_embedding.weight) == tied
    torch.testing.assert_close(F.linear(hidden, head_weight), model(tokens()))


def test_scores_are_float32_under_autocast_and_causal() -> None:
    model = scalar_model()
    with torch.autocast("cpu", torch.bfloat16):
        assert model(tokens()).dtype == torch.float32
    longer = torch.cat((tokens(), tokens()), dim=1)
    assert model(longer).shape == (2, 14)
    torch.testing.assert_close(model(longer)[:, :7], model(tokens()))


def test_score_head_starts_small_and_reproducibly() -> None:
    config = dataclasses.replace(CONFIG, hidden_size=1024, num_layers=1, ffn_hidden_size=8)
    model = ScalarModel(config, VOCAB_SIZE)
    model.initialise_score(torch.Generator().manual_seed(0))
    assert model.score.weight.std().item() == pytest.approx(1025**-0.5, rel=0.1)
    assert torch.equal(scalar_model(5).score.weight, scalar_model(5).score.weight)
    assert not torch.equal(scalar_model(5).score.weight, scalar_model(6).score.weight)


def test_a_score_model_shares_nothing_with_its_source() -> None:
    source = language_model()
    before = copy.deepcopy(source.state_dict())
    model = ScalarModel.from_language_model(source, torch.Generator())
    for name, parameter in model.trunk.named_parameters():
        assert torch.equal(parameter, source.trunk.get_parameter(name))
        parameter.data.add_(1.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in source.state_dict().items())
    assert not model.training


def test_normalised_scores_use_the_stored_statistics() -> None:
    model = scalar_model()
    scores = model(tokens())
    torch.testing.assert_close(model.normalised(scores), scores)
    model.score_mean.fill_(3.0)
    model.score_std.fill_(2.0)
    torch.testing.assert_close(model.normalised(scores), (scores - 3.0) / 2.0)
    assert {"score_mean", "score_std"} <= set(model.state_dict())


def test_actor_critic_gives_both_and_trains_both() -> None:
    policy, value = language_model(), scalar_model()
    value.score_mean.fill_(0.5)
    model = ActorCritic(policy, value)
    logits, values = model(tokens())
    torch.testing.assert_close(logits, policy(tokens()))
    torch.testing.assert_close(values, value(tokens()) - 0.5)
    summed, values = model(tokens(), read=lambda hidden, head_weight: F.linear(hidden, head_weight).logsumexp(-1).sum())
    (summed + values.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert len(model.blocks) == 4


def test_shared_values_are_zero_at_first_and_read_the_policys_hidden_states() -> None:
    policy = language_model()
    model = SharedActorCritic(policy)
    logits, values = model(tokens())
    torch.testing.assert_close(logits, policy(tokens()))
    assert values.shape == (2, 7)
    assert not values.any()
    torch.nn.init.ones_(model.value.weight)
    hidden, values = model(tokens(), read=lambda hidden, head_weight: hidden)
    torch.testing.assert_close(values, hidden.sum(dim=-1))
    values.sum().backward()
    assert policy.trunk.token_embedding.weight.grad.any()


def test_a_value_model_without_a_reward_model_starts_at_zero() -> None:
    assert not scalar_model().zero_score()(tokens()).any()
