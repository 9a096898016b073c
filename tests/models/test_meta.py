"""Models on the meta device against those that are built with numbers."""

import pytest
import torch
from tests.tiny import MODELS, tiny_model

from llmtrain.models.heads import LanguageModel, ScalarModel
from llmtrain.models.meta import on_meta


@pytest.mark.parametrize("kind", [LanguageModel, ScalarModel])
@pytest.mark.parametrize("name", MODELS)
def test_names_shapes_and_types_are_the_same(name: str, kind: type[LanguageModel | ScalarModel]) -> None:
    built = kind(tiny_model(name), 50)
    with on_meta():
        shapes = kind(tiny_model(name), 50)
    assert all(each.is_meta for each in shapes.state_dict().values())
    found, expected = (
        [(name, each.shape, each.dtype, each.requires_grad) for name, each in model.state_dict(keep_vars=True).items()]
        for model in (shapes, built)
    )
    assert found == expected


def test_layers_draw_again_outside() -> None:
    with on_meta():
        torch.nn.Linear(8, 8)
    outside = torch.nn.Linear(8, 8)
    assert outside.weight.device.type == "cpu"
    assert outside.weight.std() > 0.1  # uniform within ± 1 / sqrt(8)
    assert outside.bias.std() > 0.1
