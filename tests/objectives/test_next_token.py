"""Next-token prediction: against Transformers' own loss, for each source, and whatever the micro-batches."""

import dataclasses
import math

import pytest
import torch
from torch import nn

from llmtrain.objectives.next_token import NextToken, TokenBatch, next_tokens


@pytest.fixture
def batch(kit) -> TokenBatch:
    tokens, mask = kit.ragged_rows(rows=8, width=11, seed=1)
    return TokenBatch(tokens, mask, torch.tensor([0, 1, 0, 1, 1, 0, 2, 2]))


def test_next_tokens_moves_to_the_left():
    tokens, mask = torch.tensor([[5, 6, 7]]), torch.tensor([[True, False, True]])
    targets, counts = next_tokens(tokens, mask)
    assert targets.tolist() == [[6, 7, 0]]
    assert counts.tolist() == [[False, True, False]]


def test_a_uniform_model_has_loss_log_vocab(kit, batch):
    model = kit.language_model(0)
    model.head.data.zero_()
    loss, metrics = NextToken()(model, batch)
    assert (loss / NextToken().weight(batch)).item() == pytest.approx(math.log(kit.vocab), rel=1e-6)
    total, weight = metrics["loss"]
    assert total.item() == pytest.approx(loss.item())
    assert weight == batch.loss_mask.sum()


def test_losses_of_the_sources_add_up(kit, batch):
    names = ("prose", "code", "unseen", "absent")
    _, metrics = NextToken(source_names=names)(kit.language_model(0), batch)
    parts = [metrics[f"data/{name}/loss"] for name in names]
    for index in (0, 1):
        torch.testing.assert_close(sum(part[index] for part in parts), metrics["loss"][index])
    assert parts[1][1] == batch.loss_mask[batch.source == 1].sum()
    assert parts[3][1] == 0


def test_z_loss_is_minimised_and_not_reported(kit, batch):
    model = kit.language_model(0)
    plain, plain_metrics = NextToken()(model, batch)
    penalised, metrics = NextToken(z_loss=0.1)(model, batch)
    assert penalised > plain
    torch.testing.assert_close(metrics["loss"], plain_metrics["loss"])


@pytest.mark.parametrize("micro_batch_rows", [1, 2, 4])
def test_micro_batches_do_not_change_the_gradient(kit, batch, micro_batch_rows):
    model, objective = kit.language_model(0), NextToken(z_loss=0.01)
    whole = kit.gradients(objective, model, batch)
    kit.assert_same_gradients(kit.gradients(objective, model, batch, micro_batch_rows), whole)


def test_loss_and_gradient_of_transformers(kit, batch):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=kit.vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        )
    ).train()

    class Readable(nn.Module):
        def __init__(self):
            super().__init__()
            self.llama = llama

        def forward(self, tokens, *, read, documents=None):
            return read(self.llama.model(tokens).last_hidden_state, self.llama.lm_head.weight)

    model = Readable()
    found = kit.gradients(NextToken(), model, batch)
    loss, _ = NextToken()(model, batch)
    model.zero_grad()
    labels = torch.where(batch.loss_mask, batch.tokens, -100)
    wanted = llama(batch.tokens, labels=labels).loss
    wanted.backward()
    assert (loss / NextToken().weight(batch)).item() == pytest.approx(wanted.item(), rel=1e-5)
    kit.assert_same_gradients(found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def test_the_whole_objective_compiles_without_graph_breaks(kit, batch):
    torch.compiler.reset()
    model, objective = kit.language_model(0), NextToken(z_loss=0.01, source_names=("prose", "code"))
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    loss, metrics = compiled(model, batch)
    wanted, wanted_metrics = objective(model, batch)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(metrics, wanted_metrics)
    found = torch.autograd.grad(loss, model.head)
    torch.testing.assert_close(found, torch.autograd.grad(wanted, model.head))


def test_label_smoothing_is_minimised_and_not_reported(kit, batch):
    model = kit.language_model(0)
    found, metrics = NextToken(label_smoothing=0.2)(model, batch)
    plain, plain_metrics = NextToken()(model, batch)
    torch.testing.assert_close(metrics["loss"], plain_metrics["loss"])
    logits = model(batch.tokens, read=lambda hidden, head: hidden @ head.T)[:, :-1]
    labels = batch.tokens[:, 1:].masked_fill(~batch.loss_mask[:, 1:], -100)
    wanted = nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), label_smoothing=0.2, ignore_index=-100, reduction="sum"
    )
    torch.testing.assert_close(found, wanted)
    assert found != plain


def test_a_prefix_is_handed_to_the_model_and_not_predicted(kit, batch):
    prefix = torch.zeros_like(batch.loss_mask)
    prefix[:, :3] = True
    with_prefix = dataclasses.replace(batch, prefix=prefix, loss_mask=batch.loss_mask & ~prefix)
    seen = {}

    def model(tokens, **options):
        seen.update(options)
        return options["read"](torch.zeros(*tokens.shape, 4), torch.zeros(kit.vocab, 4))

    loss, metrics = NextToken()(model, with_prefix)
    assert seen["prefix"] is prefix
    assert metrics["loss"][1] == with_prefix.loss_mask.sum() < batch.loss_mask.sum()
    assert loss.item() == pytest.approx(math.log(kit.vocab) * int(with_prefix.loss_mask.sum()), rel=1e-6)
    seen.clear()
    NextToken()(model, batch)
    assert "prefix" not in seen
