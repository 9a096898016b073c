"""Stochastic depth against a loop over rows, in expectation, and where there is none."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.small import drawn, normal, with_parts

from llmtrain.models.attention import Context
from llmtrain.models.formats import load_language_model, save_model
from llmtrain.models.heads import LanguageModel
from llmtrain.models.transformer import Block, Transformer

PLAIN: dict[str, Any] = {"positions": "none", "num_layers": 4}
DEPTH = 0.4


def block(layer: int, **parts: Any) -> Block:
    made: Block = drawn(Block(with_parts(**PLAIN, **{"stochastic_depth": DEPTH, **parts}), layer))
    return made.train()


def test_rows_go_past_branches_as_in_a_loop() -> None:
    """Sequential, parallel and post-norm; layer l of L leaves branches out with probability p l / L."""
    hidden = normal(64, 5, 24)
    for layer in range(4):
        for parts in ({}, {"block": "parallel"}, {"norm_placement": "post"}):
            made, rate = block(layer, **parts), DEPTH * (layer + 1) / 4
            torch.manual_seed(7)
            kept = [(torch.rand(64, 1, 1) >= rate).flatten().tolist() for _ in range(2)]
            expected = []
            for row, first, second in zip(hidden.split(1), *kept, strict=True):
                attention, feed_forward = first / (1 - rate), second / (1 - rate)
                normed = [made.attention_norm, made.feed_forward_norm]
                if "norm_placement" in parts:
                    row = normed[0](row + attention * made.attention(row, Context()))
                    expected.append(normed[1](row + feed_forward * made.feed_forward(row)))
                    continue
                changed = row + attention * made.attention(normed[0](row), Context())
                read = row if "block" in parts else changed
                expected.append(changed + feed_forward * made.feed_forward(normed[1](read)))
            torch.manual_seed(7)
            torch.testing.assert_close(made(hidden, Context()), torch.cat(expected), atol=1e-12, rtol=1e-12)
            assert 0 < sum(kept[0]) < 64


def test_in_expectation_it_is_the_whole_block() -> None:
    """Branches side by side, so that each is there by itself: the mean over rows, within four standard errors."""
    made, rows = block(3, block="parallel"), 4096
    hidden = normal(1, 3, 24).expand(rows, -1, -1)
    torch.manual_seed(0)
    found = made(hidden, Context())
    error = 4 * found.std(dim=0) / rows**0.5
    assert ((found.mean(dim=0) - made.eval()(hidden[:1], Context())[0]).abs() <= error).all()


def test_nothing_is_drawn_without_it_or_in_evaluation() -> None:
    hidden = normal(6, 5, 24)
    whole = block(3).eval()(hidden, Context())
    for made in (block(3).eval(), block(3, stochastic_depth=0.0)):
        state = torch.get_rng_state()
        assert torch.equal(made(hidden, Context()), whole)
        assert torch.equal(torch.get_rng_state(), state)


def test_gradients_reach_what_is_kept_only() -> None:
    made, hidden = block(3), normal(2, 5, 24)
    seed = next(
        seed for seed in range(100)
        if (torch.manual_seed(seed), (torch.rand(2, 1, 1) < DEPTH).all())[1] and (torch.rand(2, 1, 1) >= DEPTH).all()
    )  # fmt: skip
    torch.manual_seed(seed)
    made(hidden, Context()).square().sum().backward()
    assert not made.attention.qkv.weight.grad.any()
    assert made.feed_forward.down.weight.grad.any()


@pytest.mark.parametrize("parts", [{}, {"positions": "alibi", "norm": "layernorm"}], ids=["family", "own"])
def test_a_folder_keeps_it_but_for_a_policy(tmp_path: Path, parts: dict[str, Any]) -> None:
    """A policy of reinforcement learning is read without dropout; that is without this too."""
    save_model(tmp_path, LanguageModel(with_parts(stochastic_depth=DEPTH, head_dim=None, **parts), 61))
    assert load_language_model(tmp_path).config.stochastic_depth == DEPTH
    assert load_language_model(tmp_path, dropout=0.0).config.stochastic_depth == 0.0


def test_rows_of_the_whole_trunk_differ_only_in_training() -> None:
    trunk = drawn(Transformer(with_parts(stochastic_depth=DEPTH), 61))
    tokens = torch.arange(12)[None].expand(8, -1)
    assert (trunk(tokens) - trunk(tokens)[:1]).abs().max() < 1e-12
    torch.manual_seed(0)
    assert len(trunk.train()(tokens).flatten(1).round(decimals=6).unique(dim=0)) > 1
