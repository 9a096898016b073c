"""A sequence from another: against a float64 loop and against the loss of Transformers' T5."""

import dataclasses

import pytest
import torch
from torch import nn

from llmtrain.config.schema import SpanCorruptionConfig
from llmtrain.data.spans import SpanCorruption
from llmtrain.models.formats import load_language_model
from llmtrain.objectives.next_token import TokenBatch
from llmtrain.objectives.sequence_to_sequence import SequencePairBatch, SequenceToSequence

ROWS, INPUTS, TARGETS, VOCAB, HIDDEN, START = 5, 9, 7, 37, 16, 0


class Reader(nn.Module):
    """The mean of the source's embeddings, and a running mean of the text's."""

    def __init__(self):
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(VOCAB, HIDDEN, generator=draw))
        self.head = nn.Parameter(torch.randn(VOCAB, HIDDEN, generator=draw) * 0.3)

    def forward(self, tokens, *, source, source_lengths=None, read):
        counts = torch.ones(source.shape, dtype=torch.bool)
        if source_lengths is not None:
            counts = torch.arange(source.shape[1]) < source_lengths[:, None]
        seen = (self.embedding[source] * counts[..., None]).sum(1) / counts.sum(1)[:, None]
        places = torch.arange(1, tokens.shape[1] + 1, dtype=self.head.dtype)[:, None]
        hidden = torch.tanh(self.embedding[tokens].cumsum(dim=1) / places + seen[:, None])
        return read(hidden, self.head)


def batch():
    draw = torch.Generator().manual_seed(1)
    lengths, counts = torch.tensor([9, 1, 4, 6, 9]), torch.tensor([[7], [2], [1], [5], [7]])
    mask = torch.arange(TARGETS) < counts
    targets = torch.randint(1, VOCAB, (ROWS, TARGETS), generator=draw) * mask
    inputs = torch.randint(1, VOCAB, (ROWS, INPUTS), generator=draw) * (torch.arange(INPUTS) < lengths[:, None])
    return SequencePairBatch(
        inputs=inputs, tokens=nn.functional.pad(targets[:, :-1], (1, 0), value=START), targets=targets, loss_mask=mask,
        source=torch.arange(ROWS) % 2, input_lengths=lengths,
    )  # fmt: skip


@pytest.mark.parametrize(("z_loss", "epsilon"), [(0.0, 0.0), (0.1, 0.2)])
def test_loss_and_gradient_of_a_loop(z_loss, epsilon):
    model, wide, rows = Reader(), Reader().double(), batch()
    loss, metrics = SequenceToSequence(z_loss=z_loss, label_smoothing=epsilon)(model, rows)
    nll, penalty = 0.0, 0.0
    for row in range(ROWS):
        source, text = rows.inputs[row, : rows.input_lengths[row]], [START]
        for target in rows.targets[row][rows.loss_mask[row]].tolist():
            logits = wide(torch.tensor([text]), source=source[None], read=lambda hidden, head: hidden @ head.T)[0, -1]
            nll = nll - logits.log_softmax(-1)[target]
            penalty = penalty + z_loss * logits.logsumexp(-1) ** 2
            penalty = penalty + epsilon * (logits.log_softmax(-1)[target] - logits.log_softmax(-1).mean())
            text.append(target)
    torch.testing.assert_close(loss.double(), nll + penalty, rtol=1e-6, atol=1e-6)
    weight = int(rows.loss_mask.sum())
    assert SequenceToSequence().weight(rows).item() == weight
    assert [float(each) for each in metrics["loss"]] == [pytest.approx(float(nll), rel=1e-6), weight]
    loss.backward()
    (nll + penalty).backward()
    for parameter, reference in zip(model.parameters(), wide.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.double(), reference.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("micro_batch_rows", [1, 2, 4])
def test_micro_batches_do_not_change_the_gradient(kit, micro_batch_rows):
    objective, rows = SequenceToSequence(z_loss=0.01, source_names=("a", "b")), batch()
    whole = kit.gradients(objective, Reader(), rows)
    kit.assert_same_gradients(kit.gradients(objective, Reader(), rows, micro_batch_rows), whole)


def test_losses_of_the_sources_add_up():
    _, metrics = SequenceToSequence(source_names=("a", "b"))(Reader(), batch())
    for index in (0, 1):
        torch.testing.assert_close(sum(metrics[f"data/{name}/loss"][index] for name in "ab"), metrics["loss"][index])


def test_the_whole_objective_compiles_without_graph_breaks():
    torch.compiler.reset()
    model, rows, objective = Reader(), batch(), SequenceToSequence(source_names=("a", "b"))
    loss, metrics = torch.compile(objective, fullgraph=True, backend="aot_eager")(model, rows)
    wanted, wanted_metrics = objective(model, rows)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(metrics, wanted_metrics)


@pytest.fixture(scope="module")
def t5s(tmp_path_factory):
    """T5 of Transformers, and ours with the same weights."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=START, pad_token_id=START,
    )  # fmt: skip
    theirs = transformers.T5ForConditionalGeneration(config).eval()
    folder = tmp_path_factory.mktemp("t5")
    theirs.save_pretrained(folder)
    return load_language_model(folder).eval(), theirs


def test_loss_is_that_of_t5(t5s):
    ours, theirs = t5s
    rows = batch()
    wanted = theirs(
        input_ids=rows.inputs, attention_mask=(torch.arange(INPUTS) < rows.input_lengths[:, None]).long(),
        labels=rows.targets.masked_fill(~rows.loss_mask, -100),
    ).loss  # fmt: skip
    objective = SequenceToSequence()
    loss = objective(ours, rows)[0] / objective.weight(rows)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_loss_of_corrupted_spans_is_that_of_t5(t5s):
    ours, theirs = t5s
    text = torch.randint(3, 27, (ROWS, 40), generator=torch.Generator().manual_seed(3))
    whole = TokenBatch(text, torch.ones_like(text, dtype=torch.bool), torch.zeros(ROWS, dtype=torch.int64))
    spans = SpanCorruption(SpanCorruptionConfig(), [36, 35, 34, 33], eos_id=1, start_id=START)
    rows = spans(whole, range(ROWS))
    wanted = theirs(input_ids=rows.inputs, labels=rows.targets).loss
    objective = SequenceToSequence()
    loss = objective(ours, rows)[0] / objective.weight(rows)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    measured = dataclasses.replace(rows, loss_mask=rows.targets < 30)
    assert objective.weight(measured) < objective.weight(rows)
