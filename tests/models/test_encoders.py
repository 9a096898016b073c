"""Encoders and encoder-decoders: their parts against slow formulas in float64, and what sees what."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from tests.models.small import LENGTH, drawn, normal, with_parts
from torch import Tensor

from llmtrain.config.schema import ExpertsConfig, ModelConfig
from llmtrain.generation.sampler import generate
from llmtrain.models.attention import Attention, Context, Source
from llmtrain.models.document_attention import Documents
from llmtrain.models.heads import EncoderDecoder, LanguageModel, make_model
from llmtrain.models.transformer import Block, Transformer

VOCAB_SIZE = 31
BERT = with_parts(
    architecture="encoder", positions="learned", norm="layernorm", norm_placement="post", embedding_norm="added",
    activation="gelu", bias=True, num_segments=2, pooler=True, mlm_head=True, num_kv_heads=None,
)  # fmt: skip
MODERN = with_parts(
    architecture="encoder", norm="layernorm", embedding_norm="first", activation="geglu", mlm_head=True,
    sliding_window=4, attention_pattern=["full", "sliding"], rope_local_theta=50.0,
)  # fmt: skip
RELATIVE = with_parts(architecture="encoder", positions="relative", attention_scale=1.0, relative_buckets=8)
SPARSE = dataclasses.replace(MODERN, experts=ExpertsConfig(num_experts=3, shared_experts=1, capacity_factor=1.0))
ENCODERS = {"bert": BERT, "modern": MODERN, "relative": RELATIVE, "sparse": SPARSE}
T5 = dataclasses.replace(
    RELATIVE, architecture="encoder_decoder", encoder_layers=1, activation="geglu_tanh", tied_embeddings=False
)
FIRST = with_parts(
    architecture="encoder_decoder", positions="sinusoidal", norm="layernorm", norm_placement="post", activation="relu",
    bias=True, embedding_scale="sqrt_hidden_size",
)  # fmt: skip
SANDWICHED = with_parts(
    architecture="encoder_decoder", norm_placement="sandwich", qk_norm="full", attention_softcap=3.0, sliding_window=5
)
SWITCH = dataclasses.replace(
    T5, activation="relu", encoder_layers=None, experts=ExpertsConfig(
        num_experts=3, experts_per_token=1, normalise_weights=False, first_layer=1, capacity_factor=1.0,
        capacity_group_tokens=4,
    ),
)  # fmt: skip
BOTH = {"t5": T5, "first": FIRST, "sandwiched": SANDWICHED, "switch": SWITCH}
EVERY_ENCODER = pytest.mark.parametrize("name", ENCODERS)
EVERY_PAIR = pytest.mark.parametrize("name", BOTH)
LENGTHS = torch.tensor([LENGTH, 6])


def built(config: ModelConfig) -> LanguageModel:
    model = make_model(dataclasses.replace(config, init_std=0.2), VOCAB_SIZE)
    return model.initialise(torch.Generator().manual_seed(0)).eval()


def pair(name: str) -> EncoderDecoder:
    model = built(BOTH[name])
    assert isinstance(model, EncoderDecoder)
    return model


def row_of_tokens(length: int = LENGTH, seed: int = 5) -> Tensor:
    return torch.randint(0, VOCAB_SIZE, (2, length), generator=torch.Generator().manual_seed(seed))


def padding() -> Tensor:
    """Documents of rows of `LENGTHS`."""
    return (torch.arange(LENGTH) >= LENGTHS[:, None]).int()


# Parts


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize(("softcap", "scale", "norm"), [(None, None, "none"), (1.5, 0.9, "none"), (None, None, "head")])
def test_cross_attention_is_that_of_loops(kv_heads: int, softcap: float | None, scale: float | None, norm: str) -> None:
    config = with_parts(
        architecture="encoder_decoder", num_kv_heads=kv_heads, attention_softcap=softcap, attention_scale=scale,
        qk_norm=norm, bias=True,
    )  # fmt: skip
    attention, hidden, states = (
        drawn(Attention(config, 0, crosses=True)),
        normal(2, 5, 24),
        normal(2, LENGTH, 24, seed=2),
    )
    mask = torch.arange(LENGTH) < LENGTHS[:, None, None, None]
    found = attention(hidden, Context(source=Source(states, mask)))
    expected, group, factor = torch.zeros(2, 5, 6, 4, dtype=torch.float64), 6 // kv_heads, scale or 0.5
    keys, values = attention.key_value(states).split(kv_heads * 4, dim=-1)
    for row, i, head in torch.cartesian_prod(torch.arange(2), torch.arange(5), torch.arange(6)).tolist():
        here = slice(4 * (head // group), 4 * (head // group) + 4)
        query, key = attention.query(hidden[row, i])[4 * head : 4 * head + 4], keys[row, : LENGTHS[row], here]
        if norm == "head":
            query, key = attention.query_norm(query), attention.key_norm(key)
        scores = torch.stack([query @ each * factor for each in key])
        if softcap:
            scores = torch.tensor([softcap * math.tanh(score / softcap) for score in scores.tolist()]).double()
        weights = scores.softmax(0)
        expected[row, i, head] = sum(w * v for w, v in zip(weights, values[row, : LENGTHS[row], here], strict=True))
    torch.testing.assert_close(found, attention.output(expected.flatten(2)), atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize(
    ("placement", "formula"),
    [
        ("pre", lambda b, a, c, f, x: (h := (g := x + a(b.attention_norm(x))) + c(b.cross_attention_norm(g)))
         + f(b.feed_forward_norm(h))),
        ("post", lambda b, a, c, f, x: b.feed_forward_norm(
            (h := b.cross_attention_norm((g := b.attention_norm(x + a(x))) + c(g))) + f(h))),
        ("reordered", lambda b, a, c, f, x: (
            h := (g := x + b.attention_output_norm(a(x))) + b.cross_attention_output_norm(c(g))
        ) + b.feed_forward_output_norm(f(h))),
    ],
)  # fmt: skip
def test_cross_attention_stands_between(placement: str, formula: object) -> None:
    block = drawn(Block(with_parts(architecture="encoder_decoder", norm_placement=placement), 0))
    hidden, context = normal(2, 5, 24), Context(source=Source(normal(2, 7, 24, seed=2)))
    expected = formula(  # type: ignore[operator]
        block, lambda x: block.attention(x, context), lambda x: block.cross_attention(x, context), block.feed_forward,
        hidden,
    )  # fmt: skip
    torch.testing.assert_close(block(hidden, context), expected, atol=1e-10, rtol=0)


@torch.no_grad()
def test_embeddings_heads_and_pooler_of_bert() -> None:
    model, tokens = drawn(LanguageModel(dataclasses.replace(BERT, position_offset=2), VOCAB_SIZE)), row_of_tokens()
    segments, trunk, head = (torch.arange(LENGTH) > 6).long().expand(2, -1), model.trunk, model.mlm_head
    tables = trunk.token_embedding.weight, trunk.segment_embedding.weight, trunk.position_embedding.weight
    assert len(tables[2]) == 64 + 2
    summed = tables[0][tokens] + tables[1][segments] + tables[2][2 : LENGTH + 2]
    centred = summed - summed.mean(-1, keepdim=True)
    norm = trunk.embedding_norm
    normed = centred / (centred.square().mean(-1, keepdim=True) + BERT.norm_eps).sqrt() * norm.weight + norm.bias
    torch.testing.assert_close(trunk._embed(tokens, torch.arange(LENGTH)[None], segments), normed, atol=1e-10, rtol=0)
    logits, follows = model(tokens, segments=segments, pooled=True)
    hidden = trunk(tokens, segments=segments)
    first = torch.tanh(hidden[:, 0] @ model.pooler.weight.T + model.pooler.bias)
    torch.testing.assert_close(follows, first @ model.next_sentence.weight.T + model.next_sentence.bias)
    inner = hidden @ head.dense.weight.T + head.dense.bias
    inner = inner * 0.5 * (1 + torch.erf(inner / 2**0.5))
    expected = head.norm(inner) @ tables[0].T + head.bias
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(model(tokens, segments=segments), expected)


def test_segments_are_the_first_where_none_are_said() -> None:
    model, tokens = built(BERT), row_of_tokens()
    torch.testing.assert_close(model(tokens), model(tokens, segments=torch.zeros_like(tokens)), atol=0, rtol=0)
    assert not torch.allclose(model(tokens), model(tokens, segments=torch.ones_like(tokens)))


def test_the_norm_behind_the_embeddings_stands_for_the_first_of_the_blocks() -> None:
    trunk = Transformer(MODERN, VOCAB_SIZE)
    assert [block.attention_norm is None for block in trunk.blocks] == [True, False]
    hidden = trunk._embed(row_of_tokens(), torch.arange(LENGTH)[None])
    torch.testing.assert_close(trunk.blocks[0]._before(None, hidden), hidden)
    assert float(hidden.detach().std()) == pytest.approx(1.0, abs=0.05)


# What sees what


@EVERY_ENCODER
def test_an_encoder_sees_both_ways(name: str) -> None:
    model, tokens = built(ENCODERS[name]), row_of_tokens()
    changed = tokens.clone()
    changed[:, LENGTH // 2] = (changed[:, LENGTH // 2] + 1) % VOCAB_SIZE
    difference = (model(changed) - model(tokens)).abs().amax(dim=-1)
    assert (difference > 1e-4).all()


@EVERY_ENCODER
@pytest.mark.parametrize("masked", [False, True], ids=["one by one", "masked"])
def test_padding_is_not_seen(name: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if masked:  # as on other devices, and with dropout
        of = Documents.of
        monkeypatch.setattr(Documents, "of", lambda numbers, dropout, **kind: of(numbers, 0.1, **kind))
    model, tokens = built(ENCODERS[name]), row_of_tokens()
    padded = model(tokens, documents=padding())
    torch.testing.assert_close(padded[1:, :6], model(tokens[1:, :6]), atol=1e-5, rtol=0)
    torch.testing.assert_close(padded[:1], model(tokens[:1]), atol=1e-5, rtol=0)


def test_a_window_both_ways_reaches_as_far_on_either_side() -> None:
    model = built(dataclasses.replace(MODERN, num_layers=1, attention_pattern=None))
    tokens = row_of_tokens()
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % VOCAB_SIZE
    moved = (model(changed) - model(tokens)).abs().amax(dim=(0, 2)) > 1e-6
    assert moved.nonzero().flatten().tolist() == list(range(3, 10))


def test_a_prefix_is_seen_by_all_of_it_and_nothing_else_is_seen_before_its_turn() -> None:
    model = built(with_parts())
    tokens, prefix = row_of_tokens(), torch.arange(LENGTH) < torch.tensor([[5], [9]])
    before = model(tokens, prefix=prefix)
    for row, length in enumerate((5, 9)):
        for place in range(LENGTH):
            changed = tokens.clone()
            changed[row, place] = (changed[row, place] + 1) % VOCAB_SIZE
            moved = (model(changed, prefix=prefix) - before).abs().amax(dim=-1) > 1e-6
            first = 0 if place < length else place
            assert moved[row].tolist() == [seeing >= first for seeing in range(LENGTH)]
            assert not moved[1 - row].any()
    causal, nothing = model(tokens), model(tokens, prefix=torch.zeros_like(prefix))
    torch.testing.assert_close(nothing, causal, atol=1e-5, rtol=0)


@EVERY_PAIR
def test_what_a_text_and_its_source_see(name: str) -> None:
    model, source, tokens = pair(name), row_of_tokens(seed=7), row_of_tokens(9)
    before = model(tokens, source=source, source_lengths=LENGTHS)
    ahead, beyond, within = tokens.clone(), source.clone(), source.clone()
    ahead[:, 4:] = (ahead[:, 4:] + 1) % VOCAB_SIZE
    beyond[1, 6:] = (beyond[1, 6:] + 1) % VOCAB_SIZE
    within[1, 5] = (within[1, 5] + 1) % VOCAB_SIZE
    after = model(ahead, source=source, source_lengths=LENGTHS)
    torch.testing.assert_close(after[:, :4], before[:, :4], atol=1e-5, rtol=0)
    torch.testing.assert_close(model(tokens, source=beyond, source_lengths=LENGTHS), before, atol=1e-5, rtol=0)
    assert ((model(tokens, source=within, source_lengths=LENGTHS) - before)[1].abs().amax(dim=-1) > 1e-4).all()
    alone = model(tokens[1:], source=source[1:, :6])
    torch.testing.assert_close(before[1:], alone, atol=1e-5, rtol=0)


def every_parameter_learns(model: LanguageModel, loss: Tensor) -> None:
    loss.backward()
    still = [name for name, each in model.named_parameters() if each.grad is None or not each.grad.any()]
    assert not still


@EVERY_ENCODER
def test_every_parameter_of_an_encoder_learns(name: str) -> None:
    model, tokens = built(ENCODERS[name]), row_of_tokens()
    has_pooler = model.config.pooler
    segments = (torch.arange(LENGTH) > 6).long().expand(2, -1) if has_pooler else None
    found = model(tokens, segments=segments, pooled=has_pooler)
    logits, follows = found if has_pooler else (found, torch.zeros(1))
    every_parameter_learns(model, logits.logsumexp(dim=-1).sum() + follows[..., 0].sum())


@EVERY_PAIR
def test_every_parameter_of_both_learns(name: str) -> None:
    model = pair(name)
    logits = model(row_of_tokens(9), source=row_of_tokens(seed=7), source_lengths=LENGTHS)
    every_parameter_learns(model, logits.logsumexp(dim=-1).sum())


@EVERY_PAIR
def test_bfloat16_autocast_is_close(name: str) -> None:
    model, source, tokens = pair(name), row_of_tokens(seed=7), row_of_tokens(9)
    expected = model(tokens, source=source, source_lengths=LENGTHS)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(tokens, source=source, source_lengths=LENGTHS)
    assert (found.float() - expected).square().mean().sqrt() < 0.03 * expected.std()


@pytest.mark.slow
@EVERY_PAIR
def test_both_compile_in_one_graph(name: str) -> None:
    model, source, tokens = pair(name), row_of_tokens(seed=7), row_of_tokens(9)
    compiled = torch.compile(model, fullgraph=True)
    found = compiled(tokens, source=source, source_lengths=LENGTHS)
    torch.testing.assert_close(found, model(tokens, source=source, source_lengths=LENGTHS), atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@EVERY_ENCODER
def test_encoders_compile_in_one_graph(name: str) -> None:
    model, tokens = built(ENCODERS[name]), row_of_tokens()
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(
        compiled(tokens, documents=padding()), model(tokens, documents=padding()), atol=1e-5, rtol=1e-4
    )


@EVERY_PAIR
def test_dropout_acts_in_training_only(name: str) -> None:
    model, source, tokens = pair(name), row_of_tokens(seed=7), row_of_tokens(9)
    dropped = EncoderDecoder(dataclasses.replace(model.config, dropout=0.3), VOCAB_SIZE)
    dropped.load_state_dict(model.state_dict())
    expected = model(tokens, source=source, source_lengths=LENGTHS)
    torch.testing.assert_close(dropped.eval()(tokens, source=source, source_lengths=LENGTHS), expected)
    assert not torch.allclose(dropped.train()(tokens, source=source, source_lengths=LENGTHS), expected)


def test_scalar_outputs_are_read_where_they_are_asked_for() -> None:
    """`read` gets the bias of the head, and the states that stand before it."""
    model, tokens = built(BERT), row_of_tokens()

    def read(hidden: Tensor, head_weight: Tensor, bias: Tensor) -> Tensor:
        return F.linear(hidden, head_weight, bias)

    torch.testing.assert_close(model(tokens, read=read), model(tokens), atol=0, rtol=0)


@EVERY_PAIR
def test_greedy_answers_are_those_without_a_cache(name: str) -> None:
    model, source = pair(name), row_of_tokens(seed=7)
    sources = [row[:length].tolist() for row, length in zip(source, LENGTHS.tolist(), strict=True)]
    answers = generate(model, sources, max_new_tokens=7, stop_tokens=set(), temperature=0.0, start_token=1)
    for tokens, answer in zip(sources, answers, strict=True):
        written = [1]
        while len(written) < 8:
            logits = model(torch.tensor([written]), source=torch.tensor([tokens]))[0, -1]
            written.append(int(logits.argmax()))
        assert answer == written[1:]
