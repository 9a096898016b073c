"""What the backward pass computes again: the same gradients, bit for bit, whatever is drawn or noted on the way."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from llmtrain.config.schema import ExpertsConfig, ModelConfig
from llmtrain.models.experts import expert_layers
from llmtrain.models.heads import make_model
from llmtrain.models.recompute import Recompute
from llmtrain.objectives.next_token import NextToken, TokenBatch
from llmtrain.objectives.routing import Routed

DENSE = ModelConfig(
    num_layers=3, hidden_size=32, num_heads=4, num_kv_heads=2, max_sequence_length=32, dropout=0.1,
    stochastic_depth=0.2,
)  # fmt: skip
EXPERTS = ExpertsConfig(
    num_experts=4, ffn_hidden_size=16, capacity_factor=1.0, capacity_group_tokens=8, balance_loss=0.1, z_loss=0.1,
    jitter=0.1,
)  # fmt: skip
CONFIGS = {
    "plain": dataclasses.replace(DENSE, dropout=0.0), "dropout": DENSE,
    "experts": dataclasses.replace(DENSE, experts=EXPERTS),
    "capped": dataclasses.replace(DENSE, attention_softcap=30.0, dropout=0.0),
    "encoder": dataclasses.replace(DENSE, architecture="encoder"),
}  # fmt: skip


def gradients(config: ModelConfig, kind: Recompute, *, compiled: bool = False) -> tuple[dict[str, Tensor], int]:
    """Gradients of a loss with the auxiliary ones of routers, and the operations of all matrix products."""
    model = make_model(config, 31).initialise(torch.Generator().manual_seed(1))
    model.trunk.recompute = kind
    tokens = torch.randint(31, (4, 32), generator=torch.Generator().manual_seed(2))
    ones = torch.ones(tokens.shape, dtype=torch.bool)
    batch = TokenBatch(tokens=tokens, loss_mask=ones, source=torch.zeros(4, dtype=torch.int64))
    objective = NextToken()
    if layers := expert_layers(model):
        objective = Routed(objective, layers, lambda value: value, torch.device("cpu"))  # type: ignore[assignment]
    torch.manual_seed(3)
    with FlopCounterMode(display=False) as counter:
        loss, _ = (torch.compile(objective) if compiled else objective)(model, batch)
        loss.sum().backward()
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return found, counter.get_total_flops()


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_the_same_and_products_are_made_again_only_where_asked(name: str) -> None:
    expected, fewest = gradients(CONFIGS[name], "none")
    kinds: tuple[Recompute, Recompute] = ("selective", "full")
    for kind in kinds:
        found, operations = gradients(CONFIGS[name], kind)
        assert found.keys() == expected.keys()
        for parameter, value in expected.items():
            assert torch.equal(found[parameter], value), f"{parameter}, {kind}"
        if kind == "full":
            assert operations > 1.15 * fewest
        elif name == "plain":  # elsewhere no kernel fuses attention, and its scores are made again
            assert operations == fewest


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["selective", "full"])
def test_it_goes_with_the_compiler(kind: Recompute) -> None:
    config = dataclasses.replace(DENSE, dropout=0.0, stochastic_depth=0.0)
    expected, _ = gradients(config, "none")
    found, _ = gradients(config, kind, compiled=True)
    for parameter, value in expected.items():
        torch.testing.assert_close(found[parameter], value, rtol=1e-4, atol=1e-5)
