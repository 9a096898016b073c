"""Span corruption: the lengths of the T5 code, spans that put together are the text, all divisions as likely."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch

from llmtrain.config.schema import SpanCorruptionConfig
from llmtrain.data.corruption import row_key
from llmtrain.data.spans import SpanCorruption
from llmtrain.objectives.next_token import TokenBatch
from llmtrain.objectives.sequence_to_sequence import SequencePairBatch

END, START, SENTINELS = 1, 0, list(range(2000, 3000))


def corrupted(
    rows: int, length: int, config: SpanCorruptionConfig, step: int = 0, **options: bool
) -> SequencePairBatch:
    tokens = torch.arange(10, 10 + length).repeat(rows, 1) + 1000 * torch.arange(rows)[:, None] % 7
    batch = TokenBatch(tokens, torch.ones(rows, length, dtype=torch.bool), torch.arange(rows))
    spans = SpanCorruption(config, SENTINELS, eos_id=END, start_id=START, **options)
    return spans(batch, [row_key(1, 0, row) for row in range(rows)])


def helper_of_t5(inputs_length: int, noise_density: float, mean_noise_span_length: float) -> tuple[int, int]:
    """Tokens of text, and of targets, for inputs of this length: `random_spans_helper`, with one token for each span
    and an end token on both sides, without its special case of half of the tokens."""

    def lengths(tokens: int) -> tuple[int, int]:
        noise = round(tokens * noise_density)
        spans = round(noise / mean_noise_span_length)
        return tokens - noise + spans + 1, noise + spans + 1

    tokens = inputs_length - 1
    while lengths(tokens + 1)[0] <= inputs_length:
        tokens += 1
    return tokens, lengths(tokens)[1]


@pytest.mark.parametrize(("density", "mean"), [(0.15, 3.0), (0.15, 10.0), (0.25, 2.0), (0.5, 3.5), (0.1, 1.0)])
def test_lengths_are_those_of_the_t5_code_and_exact(density: float, mean: float) -> None:
    config = SpanCorruptionConfig(noise_density=density, mean_span_length=mean)
    for inputs in range(100, 1100, 37):
        found = config.lengths_for(inputs)
        assert (found.text, found.targets) == helper_of_t5(inputs, density, mean)
        assert found.inputs == inputs
    assert SpanCorruptionConfig().lengths_for(512)[:] == (568, 85, 28, 512, 114)  # T5's own


@pytest.mark.parametrize(("density", "mean"), [(0.01, 1.0), (0.15, 3.0), (0.15, 50.0), (0.4, 1.0), (0.6, 5.0)])
def test_every_length_of_inputs_is_met(density: float, mean: float) -> None:
    config = SpanCorruptionConfig(noise_density=density, mean_span_length=mean)
    for inputs in (*range(8, 40), 512):
        lengths = config.lengths_for(inputs)
        assert lengths.inputs == inputs
        batch = corrupted(2, lengths.text, config)
        assert (batch.inputs.shape[1], batch.targets.shape[1]) == (inputs, lengths.targets)


@pytest.mark.parametrize("density", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("mean", [1.0, 3.0, 50.0])
def test_inputs_are_never_longer(density: float, mean: float) -> None:
    config = SpanCorruptionConfig(noise_density=density, mean_span_length=mean)
    for inputs in range(3, 200):
        lengths = config.lengths_for(inputs)
        assert inputs - 1 <= lengths.inputs <= inputs
        assert 1 <= lengths.spans <= min(lengths.noise, lengths.text - lengths.noise)


@pytest.mark.parametrize("length", [2, 3, 7, 34, 568])
@pytest.mark.parametrize(("density", "mean"), [(0.15, 3.0), (0.5, 2.0), (0.8, 4.0)])
def test_spans_and_text_put_together_are_the_row(length: int, density: float, mean: float) -> None:
    config = SpanCorruptionConfig(noise_density=density, mean_span_length=mean)
    rows = 9
    batch, lengths = corrupted(rows, length, config), config.lengths(length)
    for row in range(rows):
        inputs, targets = batch.inputs[row].tolist(), batch.targets[row].tolist()
        assert inputs[-1] == targets[-1] == END
        assert batch.tokens[row].tolist() == [START, *targets[:-1]]
        spans: dict[int, list[int]] = {}
        for token in targets[:-1]:
            if token in SENTINELS:
                spans[token] = []
            else:
                spans[next(reversed(spans))].append(token)
        assert list(spans) == SENTINELS[: lengths.spans]
        assert all(spans.values())
        assert inputs[0] not in SENTINELS
        together: list[int] = []
        for token in inputs[:-1]:
            together += spans.pop(token, [token])
        first = 10 + 1000 * row % 7
        assert together == list(range(first, first + length))
        assert not spans
    assert batch.loss_mask.all()
    assert batch.input_lengths is None


def test_every_division_is_as_likely() -> None:
    # 8 tokens, of which 4 are taken out in 2 spans: 3 ways to divide the ones, 3 for the others
    config = SpanCorruptionConfig(noise_density=0.5, mean_span_length=2.0)
    spans = SpanCorruption(config, SENTINELS, eos_id=END, start_id=START)
    rows = 9 * 1000
    found = Counter(map(tuple, spans.noise(8, [row_key(0, 0, row) for row in range(rows)]).tolist()))
    expected = {
        tuple(np.repeat([False, True, False, True], [kept, noise, 4 - kept, 4 - noise]).tolist())
        for kept in (1, 2, 3) for noise in (1, 2, 3)
    }  # fmt: skip
    assert set(found) == expected
    assert all(abs(count - 1000) < 4.5 * 1000**0.5 for count in found.values())


def test_all_subsets_of_borders_are_as_likely() -> None:
    config = SpanCorruptionConfig(noise_density=0.5, mean_span_length=2.0)  # 12 tokens: 6 in 3 spans
    noise = SpanCorruption(config, SENTINELS, eos_id=END, start_id=START).noise(12, list(range(8000)))
    sizes = Counter(tuple(np.flatnonzero(np.diff(row.astype(int))).tolist()) for row in noise)
    assert len(sizes) == len(list(combinations(range(5), 2))) ** 2
    assert max(sizes.values()) < 80 + 6 * 80**0.5


def test_the_text_alone_is_what_is_measured() -> None:
    batch, learned = (corrupted(3, 60, SpanCorruptionConfig(), text_only=flag) for flag in (True, False))
    assert torch.equal(batch.targets, learned.targets)
    assert not torch.isin(batch.predicted(), torch.tensor([*SENTINELS, END])).any()
    assert int(batch.loss_mask.sum()) == 3 * SpanCorruptionConfig().lengths(60).noise
