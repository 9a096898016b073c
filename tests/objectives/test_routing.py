"""The losses of routers against formulas and Transformers; the balance that adapts."""

import dataclasses

import pytest
import torch
from torch import Tensor

from llmtrain.objectives.masked import MaskedBatch
from llmtrain.objectives.next_token import NextToken, TokenBatch
from llmtrain.objectives.routing import (
    Routed,
    Routing,
    Stack,
    balance_loss_sum,
    balanced,
    loads,
    statistics,
    z_loss_sum,
)
from llmtrain.objectives.sequence_to_sequence import SequencePairBatch, SequenceToSequence

EXPERTS, CHOICES = 5, 2


def routing(rows: int = 3, length: int = 8, choices: int = CHOICES) -> Routing:
    logits = torch.randn(rows, length, EXPERTS, generator=torch.Generator().manual_seed(0))
    probabilities = logits.softmax(dim=-1)
    return Routing(logits, probabilities, probabilities.topk(choices, dim=-1).indices)


def first(lengths: list[int], width: int) -> Tensor:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("choices", [1, 2])
def test_balance_loss_equals_transformers_row_by_row(choices: int) -> None:
    """Theirs lets the shares sum to the number of choices; padding counts in neither."""
    modeling = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    made, counted = routing(choices=choices), first([8, 3, 5], 8)
    expected = torch.zeros(())
    for row, mask in enumerate(counted):
        theirs = modeling.load_balancing_loss_func((made.logits[row],), EXPERTS, choices, mask[None])
        expected = expected + mask.sum() * theirs / choices
    torch.testing.assert_close(balance_loss_sum(made, counted), expected, atol=1e-6, rtol=1e-6)


def test_balance_loss_is_the_papers_formula() -> None:
    """N Σ f P with f the share of tokens and P the mean probability: Switch, equations 4 to 6."""
    made = routing(rows=1, choices=1)
    shares = [float((made.chosen == expert).double().mean()) for expert in range(EXPERTS)]
    means = made.probabilities.double().mean(dim=(0, 1)).tolist()
    expected = EXPERTS * sum(share * mean for share, mean in zip(shares, means, strict=True))
    assert float(balance_loss_sum(made, first([8], 8)) / 8) == pytest.approx(expected, rel=1e-6)


def test_an_even_load_has_loss_one_and_the_worst_has_as_many_as_experts() -> None:
    even = torch.full((1, EXPERTS, EXPERTS), 1 / EXPERTS)
    spread = Routing(even.log(), even, torch.arange(EXPERTS)[None, :, None])
    assert float(balance_loss_sum(spread, first([EXPERTS], EXPERTS)) / EXPERTS) == pytest.approx(1.0)
    certain = torch.nn.functional.one_hot(torch.zeros(1, EXPERTS, dtype=torch.int64), EXPERTS).float()
    crowded = Routing(certain.log(), certain, torch.zeros(1, EXPERTS, 1, dtype=torch.int64))
    assert float(balance_loss_sum(crowded, first([EXPERTS], EXPERTS)) / EXPERTS) == pytest.approx(EXPERTS)


def test_losses_are_sums_over_rows() -> None:
    made, counted = routing(), first([8, 3, 0], 8)
    for loss in (balance_loss_sum, z_loss_sum):
        parts = [
            loss(Routing(made.logits[[row]], made.probabilities[[row]], made.chosen[[row]]), counted[[row]])
            for row in range(3)
        ]
        torch.testing.assert_close(loss(made, counted), torch.stack(parts).sum())
        assert parts[2] == 0


def test_z_loss_is_the_squared_log_sum_exp() -> None:
    made, counted = routing(), first([8, 3, 5], 8)
    squares = made.logits.double().exp().sum(dim=-1).log().square()
    expected = sum(squares[row, :length].sum() for row, length in enumerate([8, 3, 5]))
    torch.testing.assert_close(z_loss_sum(made, counted).double(), expected, atol=1e-5, rtol=1e-5)


def test_loads_and_statistics() -> None:
    made, counted = routing(), first([8, 3, 5], 8)
    expected = torch.zeros(3, EXPERTS)
    entropy = 0.0
    for row, position in counted.nonzero().tolist():
        for expert in made.chosen[row, position].tolist():
            expected[row, expert] += 1
        probabilities = made.probabilities[row, position].double()
        entropy -= float((probabilities * probabilities.log()).sum())
    assert torch.equal(loads(made, counted), expected)
    kept = torch.ones_like(made.chosen, dtype=torch.bool)
    kept[0, 0], kept[1, 4] = False, False  # the second is padding
    found = statistics([Routing(made.logits, made.probabilities, made.chosen, kept)], counted)
    assert float(found["entropy"][0]) == pytest.approx(entropy, rel=1e-5)
    assert float(found["dropped"][0]) == 1.0


def test_biases_move_against_the_load() -> None:
    moved = balanced(torch.tensor([0.0, 0.1, 0.2]), torch.tensor([9.0, 4.0, 5.0]), 0.01)
    torch.testing.assert_close(moved, torch.tensor([-0.01, 0.11, 0.21]))
    assert torch.equal(balanced(torch.zeros(2), torch.tensor([3.0, 3.0]), 0.01), torch.zeros(2))


def test_tokens_count_that_stand_before_the_last_that_is_learned() -> None:
    mask = torch.tensor([[False, True, False, True, False], [False] * 5])
    batch = TokenBatch(tokens=torch.ones(2, 5, dtype=torch.int64), loss_mask=mask, source=torch.zeros(2))
    [(stack, counted)] = batch.counted_tokens().items()
    assert (stack, counted.int().tolist()) == ("decoder", [[1, 1, 1, 0, 0], [0] * 5])


def test_all_tokens_of_an_encoder_count_but_padding() -> None:
    """Of what is written beside it, those up to the last that a learned token is predicted from."""
    tokens, one = torch.ones(2, 5, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64)
    masked = MaskedBatch(tokens=tokens, places=one, targets=one, loss_mask=one == 0, source=one[:, 0])
    assert masked.counted_tokens()["encoder"].int().tolist() == [[1] * 5] * 2
    masked = dataclasses.replace(masked, lengths=torch.tensor([5, 2]))
    [(stack, counted)] = masked.counted_tokens().items()
    assert (stack, counted.int().tolist()) == ("encoder", [[1] * 5, [1, 1, 0, 0, 0]])
    learned = torch.tensor([[False, True, False], [False] * 3])
    pairs = SequencePairBatch(
        inputs=tokens, tokens=tokens[:, :3], targets=tokens[:, :3], loss_mask=learned, source=one[:, 0],
        input_lengths=torch.tensor([1, 4]),
    )  # fmt: skip
    found = pairs.counted_tokens()
    assert found.keys() == {"encoder", "decoder"}
    assert found["encoder"].int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 1, 1, 0]]
    assert found["decoder"].int().tolist() == [[1, 1, 0], [0, 0, 0]]


class Layer:
    """Stands for a layer that routes as told."""

    def __init__(self, made: Routing, balance_loss: float, z_loss: float, stack: Stack = "decoder") -> None:
        self.stack: Stack = stack
        self.made, self.balance_loss, self.z_loss, self.num_experts = made, balance_loss, z_loss, EXPERTS
        self.routings: list[Routing] | None = None
        self.seen: list[Tensor] = []

    def adapt(self, load: Tensor) -> None:
        self.seen.append(load)


def test_an_objective_has_the_auxiliary_losses_beside_its_own(kit) -> None:
    tokens, mask = kit.ragged_rows(3, 8, seed=0)
    batch = TokenBatch(tokens=tokens, loss_mask=mask, source=torch.zeros(3, dtype=torch.int64))
    made = routing()
    layers = [Layer(made, 0.1, 0.0), Layer(made, 0.0, 0.2)]

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = kit.language_model(0)

        def forward(self, tokens, **arguments):
            for layer in layers:
                layer.routings.append(made)
            return self.inner(tokens, **arguments)

    model, plain = Model(), NextToken()
    cpu = torch.device("cpu")
    objective = Routed(plain, layers, lambda value: 2 * value, cpu)  # two processes that see the same
    loss, metrics = objective(model, batch)
    counted = batch.counted_tokens()["decoder"]
    expected = 0.1 * balance_loss_sum(made, counted) + 0.2 * z_loss_sum(made, counted)
    torch.testing.assert_close(loss, torch.stack([plain(model.inner, batch)[0], expected]))
    assert objective.weight(batch).tolist() == [float(mask[:, 1:].sum()), float(counted.sum())]
    mean = metrics["router/balance_loss"]
    torch.testing.assert_close(mean[0] / mean[1], balance_loss_sum(made, counted) / counted.sum())
    assert all(layer.routings is None for layer in layers)

    objective(model, batch)  # a second micro-batch of the same update
    load = 4 * loads(made, counted).sum(dim=0)
    found = objective.after_update()
    assert torch.equal(layers[0].seen[0], load)
    assert torch.equal(layers[1].seen[0], load)
    assert float(found["router/share_max"][0]) == pytest.approx(float(load.max() / load.sum()))
    assert float(found["router/share_min"][0]) == pytest.approx(float(load.min() / load.sum()))
    objective(model, batch)  # the next update begins anew
    objective.after_update()
    assert torch.equal(layers[0].seen[1], load / 2)


def test_each_stack_has_a_mean_of_its_own() -> None:
    """One layer over inputs of up to 8 tokens and two over targets of up to 5: terms, weights, metrics, loads."""
    read, written = routing(), routing(length=5, choices=1)
    layers = [Layer(written, 0.2, 0.0), Layer(read, 0.1, 0.3, "encoder"), Layer(written, 0.0, 0.4)]
    targets, one = torch.ones(3, 5, dtype=torch.int64), torch.ones(3, dtype=torch.int64)
    batch = SequencePairBatch(
        inputs=torch.ones(3, 8, dtype=torch.int64), tokens=targets, targets=targets, loss_mask=first([2, 5, 4], 5),
        source=one, input_lengths=torch.tensor([8, 3, 5]),
    )  # fmt: skip

    class Model(torch.nn.Module):
        def forward(self, tokens, read, **arguments):
            for layer in layers:
                layer.routings.append(layer.made)
            return read(torch.ones(3, 5, 4), torch.ones(6, 4))

    objective = Routed(SequenceToSequence(), layers, lambda value: value, torch.device("cpu"))
    loss, metrics = objective(Model(), batch)
    reading, writing = first([8, 3, 5], 8), first([2, 5, 4], 5)
    of_encoder = 0.1 * balance_loss_sum(read, reading) + 0.3 * z_loss_sum(read, reading)
    of_decoder = 0.2 * balance_loss_sum(written, writing) + 0.4 * z_loss_sum(written, writing)
    torch.testing.assert_close(loss[1:], torch.stack([of_decoder, of_encoder]))
    assert objective.weight(batch).tolist() == [11.0, 11.0, 16.0]
    for stack, made, counted, tokens in (("encoder", read, reading, 16), ("decoder", written, writing, 22)):
        value, weight = metrics[f"router/{stack}/z_loss"]
        assert float(weight) == tokens  # of two layers in the decoder
        torch.testing.assert_close(value / weight, z_loss_sum(made, counted) / counted.sum())
    assert "router/z_loss" not in metrics
    found = objective.after_update()
    for stack, made, counted in (("encoder", read, reading), ("decoder", written, writing)):
        load = loads(made, counted).sum(dim=0)
        assert float(found[f"router/{stack}/share_max"][0]) == pytest.approx(float(load.max() / load.sum()))
    assert torch.equal(layers[1].seen[0], loads(read, reading).sum(dim=0))
