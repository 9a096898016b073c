"""The layers of a model shared out: every parameter is somewhere, and one part after another is the whole."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from tests.models.small import LENGTH, drawn, with_parts

from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import ExpertsConfig
from llmtrain.models.heads import LanguageModel, ScalarModel, make_model

VOCAB = 31
KINDS: dict[str, dict[str, Any]] = {
    "rotary": {}, "tied": {"tied_embeddings": True}, "learned": {"positions": "learned", "embedding_norm": "added"},
    "alibi windows": {"positions": "alibi", "sliding_window": 5}, "post-norm": {"norm_placement": "post"},
    "encoder": {"architecture": "encoder", "mlm_head": True, "pooler": True, "num_segments": 2},
}  # fmt: skip


def parts_of(model: Any, borders: tuple[int, ...]) -> list[tuple[range, Any]]:
    ranges = [range(*pair) for pair in pairwise(borders)]
    parts = [(layers, copy.deepcopy(model)) for layers in ranges]
    for layers, part in parts:
        part.keep([layers])
    return parts


@pytest.mark.parametrize("kind", [*KINDS, "scores"])
def test_parts_one_after_another_are_the_whole_to_the_bit(kind: str) -> None:
    config = with_parts(num_layers=5, **KINDS.get(kind, {}))
    model = drawn(ScalarModel(config, VOCAB) if kind == "scores" else make_model(config, VOCAB))
    tokens = torch.randint(0, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    hidden = None
    for layers, part in parts_of(model, (0, 2, 3, 5)):
        hidden = part(tokens, layers=layers, hidden=hidden)
    assert torch.equal(hidden, model(tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_keeps_its_name_and_is_kept_once(kind: str) -> None:
    model = make_model(with_parts(num_layers=5, **KINDS[kind]), VOCAB)
    kept = [name for _, part in parts_of(model, (0, 2, 3, 5)) for name, _ in part.named_parameters()]
    assert set(kept) == {name for name, _ in model.named_parameters()}
    twice = {name for name in kept if kept.count(name) > 1}
    assert twice == ({"trunk.token_embedding.weight"} if model.shared_by_ends else set())


def test_a_part_may_be_of_several_pieces() -> None:
    model = make_model(with_parts(num_layers=4), VOCAB)
    model.keep([range(0, 1), range(2, 3)])
    assert {name.split(".")[2] for name, _ in model.named_parameters() if ".blocks." in name} == {"0", "2"}
    assert not any(name.startswith(("head", "trunk.final_norm")) for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architecture": "encoder_decoder"}, "an encoder-decoder"),
        ({"experts": ExpertsConfig(num_experts=4)}, "experts"),
        ({"positions": "relative"}, "positions=relative"),
    ],
)
def test_what_cannot_be_divided_is_named(changes: dict[str, Any], words: str) -> None:
    model: LanguageModel = make_model(with_parts(**changes), VOCAB)
    with pytest.raises(ConfigError, match=rf"engine\.pipeline_parallel.*{words}"):
        model.keep([range(0, 1)])
