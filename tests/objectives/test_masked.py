"""Masked language modelling: against a float64 loop and against Transformers' BERT."""

import dataclasses

import pytest
import torch
from torch import nn

from llmtrain.models.formats import load_language_model
from llmtrain.objectives.masked import MaskedBatch, MaskedTokens

ROWS, WIDTH, PLACES, VOCAB, HIDDEN = 6, 12, 3, 37, 16


class TwoWays(nn.Module):
    """Every position sees all of its row; the first judges the two segments."""

    def __init__(self, seed=0):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.embedding = nn.Parameter(torch.randn(VOCAB, HIDDEN, generator=draw))
        self.segment = nn.Parameter(torch.randn(2, HIDDEN, generator=draw))
        self.judge = nn.Parameter(torch.randn(2, HIDDEN, generator=draw))
        self.head = nn.Parameter(torch.randn(VOCAB, HIDDEN, generator=draw) * 0.3)
        self.bias = nn.Parameter(torch.randn(VOCAB, generator=draw))

    def forward(self, tokens, *, read, documents=None, segments=None, pooled=False):
        hidden = self.embedding[tokens] + (0 if segments is None else self.segment[segments])
        hidden = torch.tanh(hidden + hidden.mean(dim=1, keepdim=True))
        found = read(hidden, self.head, bias=self.bias)
        return (found, hidden[:, 0] @ self.judge.T) if pooled else found


def batch(full=False, labels=True):
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, VOCAB, (ROWS, WIDTH), generator=draw)
    places = torch.stack([torch.randperm(WIDTH, generator=draw)[:PLACES].sort().values for _ in range(ROWS)])
    counts = torch.full((ROWS, 1), PLACES) if full else torch.tensor([[3], [1], [2], [0], [3], [2]])
    return MaskedBatch(
        tokens=tokens, places=places, targets=torch.randint(1, VOCAB, (ROWS, PLACES), generator=draw),
        loss_mask=torch.arange(PLACES) < counts, source=torch.arange(ROWS) % 2,
        segments=(torch.arange(WIDTH) > 5).long().repeat(ROWS, 1) if labels else None,
        is_other=torch.tensor([0, 1, 1, 0, 1, 0]) if labels else None,
    )  # fmt: skip


@pytest.mark.parametrize(("z_loss", "epsilon"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.2)])
@pytest.mark.parametrize("labels", [False, True])
def test_loss_and_gradient_of_a_loop(labels, z_loss, epsilon):
    model, wide, rows = TwoWays(), TwoWays().double(), batch(labels=labels)
    loss, metrics = MaskedTokens(z_loss=z_loss, label_smoothing=epsilon)(model, rows)
    hits, nll, penalty, judged = [], 0.0, 0.0, 0.0
    for row in range(ROWS):
        segments = None if rows.segments is None else rows.segments[row : row + 1]
        one = {"read": lambda hidden, head, bias: hidden @ head.T + bias, "segments": segments, "pooled": True}
        logits, label = wide(rows.tokens[row : row + 1], **one)
        logprobs = logits[0].log_softmax(-1)
        for place, target, counts in zip(rows.places[row], rows.targets[row], rows.loss_mask[row], strict=True):
            if counts:
                nll = nll - logprobs[place, target]
                penalty = penalty + z_loss * logits[0, place].logsumexp(-1) ** 2
                penalty = penalty + epsilon * (logprobs[place, target] - logprobs[place].mean())
                hits.append(bool(logits[0, place].argmax() == target))
        if rows.is_other is not None:
            judged = judged - label[0].log_softmax(-1)[rows.is_other[row]]
    wanted = nll + penalty + PLACES * judged
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=1e-6)
    weight = rows.loss_mask.sum().item()
    assert MaskedTokens().weight(rows).item() == weight == len(hits)
    assert metrics["loss"][0].item() == pytest.approx(float(nll), rel=1e-6)
    assert [float(each) for each in metrics["masked_accuracy"]] == [sum(hits), weight]
    assert ("next_sentence_loss" in metrics) == labels
    loss.backward()
    wanted.backward()
    for (name, parameter), reference in zip(model.named_parameters(), wide.parameters(), strict=True):
        if reference.grad is None:
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            torch.testing.assert_close(parameter.grad.double(), reference.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("micro_batch_rows", [1, 2, 4])
def test_micro_batches_do_not_change_the_gradient(kit, micro_batch_rows):
    objective, rows = MaskedTokens(z_loss=0.01, label_smoothing=0.1), batch()
    whole = kit.gradients(objective, TwoWays(), rows)
    kit.assert_same_gradients(kit.gradients(objective, TwoWays(), rows, micro_batch_rows), whole)


def test_metrics_of_labels_and_sources():
    model, rows = TwoWays(), batch()
    _, metrics = MaskedTokens(source_names=("prose", "code"))(model, rows)
    _, label = model(rows.tokens, segments=rows.segments, pooled=True, read=lambda *_, **__: None)
    right = (label.argmax(-1) == rows.is_other).sum().item()
    assert [float(each) for each in metrics["next_sentence_accuracy"]] == [right, ROWS]
    parts = [metrics[f"data/{name}/loss"] for name in ("prose", "code")]
    for index in (0, 1):
        torch.testing.assert_close(sum(part[index] for part in parts), metrics["loss"][index])
    weightless, _ = MaskedTokens(next_sentence_weight=0.0)(model, rows)
    torch.testing.assert_close(weightless, metrics["loss"][0])


def test_the_head_reads_the_places_alone():
    seen = []

    class Counting(TwoWays):
        def forward(self, tokens, *, read, **options):
            def counted(hidden, head, **more):
                seen.append(hidden.shape)
                return read(hidden, head, **more)

            return super().forward(tokens, read=counted, **options)

    rows, sizes = batch(full=True, labels=False), []
    original = torch.Tensor.gather

    def noted(tensor, dim, index):
        sizes.append(tuple(index.shape))
        return original(tensor, dim, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "gather", noted)
        MaskedTokens()(Counting(), rows)
    assert seen == [(ROWS, WIDTH, HIDDEN)]
    assert sizes[0] == (ROWS, PLACES, HIDDEN)


def test_num_tokens_are_those_that_are_read():
    rows = batch()
    assert rows.num_tokens() == ROWS * WIDTH
    assert len(rows[:2]) == 2
    assert rows.predicted().tolist() == rows.targets[rows.loss_mask].tolist()


def test_the_whole_objective_compiles_without_graph_breaks():
    torch.compiler.reset()
    model, rows = TwoWays(), batch()
    objective = MaskedTokens(source_names=("prose", "code"))
    loss, metrics = torch.compile(objective, fullgraph=True, backend="aot_eager")(model, rows)
    wanted, wanted_metrics = objective(model, rows)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(metrics, wanted_metrics)


@pytest.fixture(scope="module")
def berts(tmp_path_factory):
    """BERT of Transformers, and ours with the same weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=WIDTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.2,
    )  # fmt: skip
    theirs = transformers.BertForPreTraining(config).eval()
    folder = tmp_path_factory.mktemp("bert")
    theirs.save_pretrained(folder)
    return load_language_model(folder).eval(), theirs


def test_loss_is_that_of_bert(berts):
    ours, theirs = berts
    rows = batch(full=True)
    labels = torch.full((ROWS, WIDTH), -100).scatter(1, rows.places, rows.targets)
    wanted = theirs(
        input_ids=rows.tokens, token_type_ids=rows.segments, labels=labels, next_sentence_label=rows.is_other
    ).loss
    objective = MaskedTokens()
    loss = objective(ours, rows)[0] / objective.weight(rows)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    alone = dataclasses.replace(rows, is_other=None)
    found = objective(ours, alone)[1]["loss"]
    masked = theirs(input_ids=rows.tokens, token_type_ids=rows.segments).prediction_logits
    wanted = nn.functional.cross_entropy(masked.flatten(0, 1), labels.flatten())
    assert (found[0] / found[1]).item() == pytest.approx(wanted.item(), rel=1e-5)
