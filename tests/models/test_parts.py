"""Each part of the network against a slow formula in float64."""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.models.small import CONFIG, LENGTH, drawn, normal, with_parts
from torch import Tensor

from llmtrain.config.schema import ModelConfig, YarnScalingConfig
from llmtrain.models.attend import attend_one, attend_one_capped, with_sinks
from llmtrain.models.attention import Attention, Context
from llmtrain.models.document_attention import Documents
from llmtrain.models.experts import make_feed_forward
from llmtrain.models.heads import LanguageModel
from llmtrain.models.masks import added, score_mask
from llmtrain.models.norms import make_norm
from llmtrain.models.positions import alibi_slopes, relative_buckets, sinusoids
from llmtrain.models.transformer import Block, Transformer

# Attention


def bucket_by_hand(distance: int, count: int, farthest: int, *, both_ways: bool) -> int:
    """Of a query that stands so far behind its key: Raffel et al. 2020 (arXiv 1910.10683), one number at a time."""
    first = 0
    if both_ways:
        count //= 2
        first, distance = (count if distance < 0 else 0), abs(distance)
    distance = max(distance, 0)
    exact = count // 2
    if distance < exact:
        return first + distance
    growth = math.log(distance / exact) / math.log(farthest / exact)
    return first + min(exact + int(growth * (count - exact) + 1e-6), count - 1)


def attended_by_loops(
    config: ModelConfig, query: Tensor, key: Tensor, value: Tensor, window: int | None, documents: Tensor | None,
    prefix: Tensor | None = None, relative: Tensor | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Queries [B, Q, T, D] over [B, K, T, D], one number after the other."""
    found, group = torch.zeros_like(query), query.shape[1] // key.shape[1]
    scale, both_ways = config.attention_scale or query.shape[-1] ** -0.5, config.architecture == "encoder"
    for row, head, i in torch.cartesian_prod(*(torch.arange(size) for size in query.shape[:3])).tolist():
        seen = [j for j in range(key.shape[2]) if j <= i or both_ways or (prefix is not None and prefix[row, j])]
        seen = [j for j in seen if window is None or -window < i - j < window]
        seen = [j for j in seen if documents is None or documents[row, i] == documents[row, j]]
        scores = []
        for j in seen:
            score = float(query[row, head, i] @ key[row, head // group, j]) * scale
            if config.attention_softcap:
                score = config.attention_softcap * math.tanh(score / config.attention_softcap)
            if config.positions == "alibi":
                score -= alibi_slopes(config.num_heads)[head] * abs(i - j)
            if relative is not None:
                bucket = bucket_by_hand(
                    i - j, config.relative_buckets, config.relative_max_distance, both_ways=both_ways
                )
                score += float(relative[bucket, head])
            scores.append(score)
        if sinks is not None:
            scores.append(float(sinks[head]))
        weights = torch.tensor(scores, dtype=torch.float64).softmax(0)[: len(seen)]
        found[row, head, i] = sum(w * value[row, head // group, j] for w, j in zip(weights, seen, strict=True))
    return found


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"sliding_window": 4},
    "window as long as the row": {"sliding_window": LENGTH},
    "window of one": {"sliding_window": 1},
    "alibi": {"positions": "alibi"},
    "alibi in a window": {"positions": "alibi", "sliding_window": 5},
    "softcap": {"attention_softcap": 1.5},
    "softcap in a window": {"attention_softcap": 1.5, "sliding_window": 4},
    "softcap and alibi": {"attention_softcap": 1.5, "positions": "alibi"},
    "sinks": {"attention_sinks": True},
    "sinks, alibi in a window": {"attention_sinks": True, "positions": "alibi", "sliding_window": 4},
    "sinks, scale, softcap": {"attention_sinks": True, "attention_scale": 0.9, "attention_softcap": 1.5},
    "scale": {"attention_scale": 0.9},
    "scale, softcap, window": {"attention_scale": 0.9, "attention_softcap": 1.5, "sliding_window": 4},
    "relative": {"positions": "relative", "relative_buckets": 8, "relative_max_distance": 9},
    "relative, softcap, window": {"positions": "relative", "attention_softcap": 1.5, "sliding_window": 9},
}
BOTH_WAYS = {f"both ways, {kind}": {"architecture": "encoder", **parts} for kind, parts in KINDS.items()}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def context_of(config: ModelConfig, documents: Tensor | None = None, prefix: Tensor | None = None) -> Context:
    """What a model gives its first layer; positions are learned or ALiBi's, so that nothing is rotated."""
    trunk = drawn(Transformer(config, 5))
    numbers = None if documents is None else Documents.of(documents, 0.0, is_causal=config.is_causal)
    return trunk._context(config.windows[0], torch.arange(LENGTH)[None], LENGTH, LENGTH, numbers, None, prefix)


def table_of(config: ModelConfig) -> Tensor | None:
    """That of `context_of`'s relative positions."""
    trunk: Transformer = drawn(Transformer(config, 5))
    table = trunk._relative()
    return None if table is None else table.detach()


def with_random_sinks(attention: Attention) -> Tensor | None:
    """Those of the layer, now no zeros any more."""
    if attention.sink_bias is not None:
        attention.sink_bias.data = normal(len(attention.sink_bias), seed=4).to(attention.sink_bias.dtype)
        return attention.sink_bias.detach()
    return None


@pytest.mark.parametrize("kind", [*KINDS, *BOTH_WAYS])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "several"])
@pytest.mark.parametrize("has_prefix", [False, True], ids=["", "prefix"])
def test_attention_is_that_of_loops(kind: str, packed: bool, has_prefix: bool) -> None:
    config = with_parts(**{"positions": "none", **(KINDS | BOTH_WAYS)[kind]})
    documents = torch.tensor([[0] * 6 + [1] * 7, [0] * 1 + [1] * 2 + [2] * 10]) if packed else None
    prefix = torch.arange(LENGTH) < torch.tensor([[9], [3]]) if has_prefix else None
    attention = Attention(config, 0).double()
    query, key, value = normal(2, 6, LENGTH, 4), normal(2, 2, LENGTH, 4, seed=2), normal(2, 2, LENGTH, 4, seed=3)
    sinks = with_random_sinks(attention)
    found = attention._attend_all(query * attention.query_factor, key, value, context_of(config, documents, prefix))
    expected = attended_by_loops(
        config, query, key, value, config.windows[0], documents, prefix, table_of(config), sinks
    )
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize(("count", "farthest"), [(32, 128), (8, 20), (64, 512)])
def test_buckets_of_distances(both_ways: bool, count: int, farthest: int) -> None:
    distances = torch.arange(-700, 700)
    found = relative_buckets(distances, count, farthest, both_ways=both_ways).tolist()
    expected = [bucket_by_hand(each, count, farthest, both_ways=both_ways) for each in distances.tolist()]
    assert found == expected
    assert set(found) == set(range(count)) - ({count // 2} if both_ways else set())  # nothing ahead is at distance 0


@EVERY_KIND
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_one_query_at_a_time_is_the_last_row(kind: str, kv_heads: int) -> None:
    """What the cache does for one token more, against loops; the columns behind hold other numbers."""
    config = with_parts(**{"positions": "none", **KINDS[kind]})
    query, key, value = normal(2, 6, 1, 4), normal(2, kv_heads, 32, 4, seed=2), normal(2, kv_heads, 32, 4, seed=3)
    places = torch.tensor([[8], [25]])
    relative = table_of(config)
    seen = score_mask(config, config.windows[0], places, torch.arange(32), relative=relative)
    mask = added(seen, torch.float32).detach()
    attention = Attention(dataclasses.replace(config, num_kv_heads=kv_heads), 0)
    scaled, keys, values = query.float() * attention.query_factor, key.float(), value.float()
    if (sinks := with_random_sinks(attention)) is not None:
        keys, values, mask = with_sinks(keys, values, mask, sinks)
    if config.attention_softcap:
        found = attend_one_capped(scaled, keys, values, mask, config.attention_softcap)
    else:
        found = attend_one(scaled, keys, values, mask)
    for row, place in enumerate(places.flatten().tolist()):
        queries = torch.zeros(1, 6, place + 1, 4, dtype=torch.float64)
        queries[0, :, place] = query[row, :, 0]
        before = slice(row, row + 1), slice(None), slice(place + 1)
        expected = attended_by_loops(
            config, queries, key[before], value[before], config.windows[0], None, None, relative, sinks
        )
        torch.testing.assert_close(found[row, :, 0].double(), expected[0, :, place], atol=2e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["head", "full"])
@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm", "zero_centred_rmsnorm"])
def test_query_key_norm(kind: Any, norm: Any) -> None:
    config = with_parts(qk_norm=kind, norm=norm, positions="none", bias=True)
    attention = drawn(Attention(config, 0))
    hidden = normal(1, LENGTH, 24)
    query, key, value = attention.qkv(hidden).split((24, 8, 8), dim=-1)
    query_norm, key_norm = attention.query_norm, attention.key_norm
    if kind == "head":
        heads = [query_norm(part) for part in query.split(4, dim=-1)], [key_norm(part) for part in key.split(4, dim=-1)]
    else:
        heads = query_norm(query).split(4, dim=-1), key_norm(key).split(4, dim=-1)
    query, key = (torch.stack(tuple(each), dim=1) for each in heads)
    value = torch.stack(value.split(4, dim=-1), dim=1)
    expected = attended_by_loops(config, query, key, value, None, None).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention(hidden, Context()), attention.output(expected), atol=1e-6, rtol=0)


# Norms, feed-forward parts, blocks, heads


def test_zero_centred_norm() -> None:
    norm, hidden = drawn(make_norm(with_parts(norm="zero_centred_rmsnorm"))), normal(2, 3, 24)
    root = (sum(hidden[..., d] ** 2 for d in range(24)) / 24 + CONFIG.norm_eps).sqrt()
    torch.testing.assert_close(norm(hidden), (1 + norm.weight) * hidden / root[..., None], atol=1e-6, rtol=0)


FORMULAS = {
    "swiglu": lambda x: x / (1 + math.exp(-x)),
    "geglu": lambda x: x * 0.5 * (1 + math.erf(x / 2**0.5)),
    "geglu_tanh": lambda x: x * 0.5 * (1 + math.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: x * 0.5 * (1 + math.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "relu": lambda x: max(x, 0.0),
    "relu_squared": lambda x: max(x, 0.0) ** 2,
}


@torch.no_grad()
@pytest.mark.parametrize("activation", FORMULAS)
def test_feed_forward_parts(activation: Any) -> None:
    part, hidden = drawn(make_feed_forward(with_parts(activation=activation, bias=True), 0)), normal(5, 24)
    function = FORMULAS[activation]
    if activation in ("swiglu", "geglu", "geglu_tanh"):
        gate, up = (hidden @ part.gate_up.weight.T + part.gate_up.bias).chunk(2, dim=-1)
        inner = gate.clone().apply_(function) * up
    else:
        inner = (hidden @ part.up.weight.T + part.up.bias).apply_(function)
    torch.testing.assert_close(part(hidden), inner @ part.down.weight.T + part.down.bias, atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("placement", "order", "formula"),
    [
        ("pre", "sequential", lambda b, a, f, x: (h := x + a(b.attention_norm(x))) + f(b.feed_forward_norm(h))),
        ("post", "sequential", lambda b, a, f, x: b.feed_forward_norm((h := b.attention_norm(x + a(x))) + f(h))),
        ("reordered", "sequential",
         lambda b, a, f, x: (h := x + b.attention_output_norm(a(x))) + b.feed_forward_output_norm(f(h))),
        ("sandwich", "sequential",
         lambda b, a, f, x: (h := x + b.attention_output_norm(a(b.attention_norm(x))))
         + b.feed_forward_output_norm(f(b.feed_forward_norm(h)))),
        ("pre", "parallel", lambda b, a, f, x: x + a(b.attention_norm(x)) + f(b.feed_forward_norm(x))),
        ("pre", "parallel_shared_norm", lambda b, a, f, x: x + a(b.attention_norm(x)) + f(b.attention_norm(x))),
    ],
)  # fmt: skip
def test_where_norms_stand(placement: Any, order: Any, formula: Any) -> None:
    block = drawn(Block(with_parts(norm_placement=placement, block=order, positions="none"), 0))
    hidden, context = normal(2, LENGTH, 24), Context()
    expected = formula(block, lambda x: block.attention(x, context), block.feed_forward, hidden)
    torch.testing.assert_close(block(hidden, context), expected, atol=1e-10, rtol=0)
    norms = {name for name, _ in block.named_parameters() if "norm" in name}
    assert len(norms) == {"sandwich": 4}.get(placement, 1 if order == "parallel_shared_norm" else 2)


def test_scales_and_cap_of_embeddings_and_logits() -> None:
    plain = with_parts(positions="none", num_layers=1)
    model = drawn(LanguageModel(plain, 11))
    config = dataclasses.replace(plain, embedding_scale="sqrt_hidden_size", logit_scale=0.3, logit_softcap=2.0)
    changed = LanguageModel(config, 11).double().eval()
    changed.load_state_dict(model.state_dict())
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        expected = F.linear(changed.trunk(tokens), changed.head_weight) * 0.3
        torch.testing.assert_close(changed(tokens), 2.0 * torch.tanh(expected / 2.0))
        model.trunk.token_embedding.weight *= 24**0.5
        torch.testing.assert_close(changed.trunk(tokens), model.trunk(tokens))


def test_positions_are_added_to_scaled_embeddings() -> None:
    config = with_parts(positions="sinusoidal", embedding_scale=3.0)
    trunk, tokens = drawn(Transformer(config, 11)), torch.arange(9)[None]
    found = trunk._embed(tokens, torch.arange(9)[None])
    expected = 3.0 * trunk.token_embedding.weight[:9] + sinusoids(torch.arange(9), 24).double()
    torch.testing.assert_close(found[0], expected)


def test_without_positions_the_order_before_is_not_seen() -> None:
    model, row = drawn(LanguageModel(with_parts(positions="none", num_layers=1), 11)), torch.tensor([[1, 2, 3, 4, 5]])
    swapped = torch.tensor([[3, 1, 2, 4, 5]])
    torch.testing.assert_close(model(row)[:, -1], model(swapped)[:, -1])
    rotated = drawn(LanguageModel(with_parts(num_layers=1), 11))
    assert not torch.allclose(rotated(row)[:, -1], rotated(swapped)[:, -1])


def test_biases_one_by_one() -> None:
    config = with_parts(norm="layernorm", qkv_bias=True, norm_bias=True)
    names = {name.split("blocks.0.")[-1] for name, _ in Transformer(config, 5).named_parameters() if "blocks.0" in name}
    assert {name for name in names if name.endswith("bias")} == {
        "attention.qkv.bias", "attention_norm.bias", "feed_forward_norm.bias",
    }  # fmt: skip
    others = dataclasses.replace(config, bias=True, qkv_bias=False, norm_bias=False)
    names = {name.split("blocks.0.")[-1] for name, _ in Transformer(others, 5).named_parameters() if "blocks.0" in name}
    assert {name for name in names if name.endswith("bias")} == {
        "attention.output.bias", "feed_forward.gate_up.bias", "feed_forward.down.bias",
    }  # fmt: skip


def test_patterns_are_repeated_over_the_layers() -> None:
    config = with_parts(num_layers=5, sliding_window=7, attention_pattern=["sliding", "sliding", "full"])
    assert config.windows == [7, 7, None, 7, 7]
    assert with_parts(sliding_window=7).windows == [7, 7]
    assert CONFIG.windows == [None, None]


def test_flops_of_a_window() -> None:
    """By counting what each position sees."""
    config = with_parts(num_layers=2, sliding_window=4, attention_pattern=["sliding", "full"])
    plain = Transformer(with_parts(), 5).flops_per_token(16) - Transformer(config, 5).flops_per_token(16)
    full, window = 16 / 2, (4 - 4 * 4 / (2 * 16))  # half a position's own score counts, as in T / 2
    assert plain == pytest.approx(12 * 24 * (full - window))


def test_norms_begin_without_weight() -> None:
    trunk = Transformer(with_parts(norm="zero_centred_rmsnorm", norm_placement="sandwich", qk_norm="head"), 5)
    drawn(trunk).float().initialise(torch.Generator().manual_seed(0))
    assert all(not parameter.any() for name, parameter in trunk.named_parameters() if "norm" in name)


# Whole models

WHOLE = {
    "gemma": with_parts(
        sliding_window=5, attention_pattern=["sliding", "full"], attention_softcap=5.0, logit_softcap=4.0,
        norm="zero_centred_rmsnorm", norm_placement="sandwich", activation="geglu_tanh",
        embedding_scale="sqrt_hidden_size", rope_local_theta=50.0, qk_norm="head",
    ),
    "olmo": with_parts(norm_placement="reordered", qk_norm="full"),
    "mpt": with_parts(positions="alibi", norm="layernorm", activation="gelu", sliding_window=6),
    "neox": with_parts(block="parallel", norm="layernorm", bias=True, partial_rotary_factor=0.5),
    "falcon": with_parts(block="parallel_shared_norm", norm="layernorm", norm_bias=True, num_kv_heads=1),
    "first": with_parts(norm_placement="post", positions="sinusoidal", activation="relu", norm="layernorm"),
    "bloom": with_parts(positions="alibi", norm="layernorm", activation="gelu_tanh", bias=True, embedding_norm="added"),
    "relative": with_parts(positions="relative", attention_scale=1.0, embedding_norm="first", relative_buckets=8),
    "sinks": with_parts(attention_sinks=True, sliding_window=5, attention_pattern=["sliding", "full"]),
    "scaled": with_parts(rope_scaling=YarnScalingConfig(factor=2.0, original_max_sequence_length=16)),
}  # fmt: skip
EVERY_MODEL = pytest.mark.parametrize("name", WHOLE)


def built(name: str) -> LanguageModel:
    config = dataclasses.replace(WHOLE[name], init_std=0.2)
    return LanguageModel(config, 31).initialise(torch.Generator().manual_seed(0)).eval()


def row_of_tokens(rows: int = 2) -> Tensor:
    return torch.randint(0, 31, (rows, LENGTH), generator=torch.Generator().manual_seed(5))


@EVERY_MODEL
def test_every_parameter_learns_and_nothing_ahead_is_seen(name: str) -> None:
    model, tokens = built(name), row_of_tokens()
    model(tokens).logsumexp(dim=-1).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    changed = tokens.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % 31
    torch.testing.assert_close(model(changed)[:, :7], model(tokens)[:, :7])


@EVERY_MODEL
@pytest.mark.parametrize("masked", [False, True], ids=["one by one", "masked"])
def test_documents_in_a_row_are_as_alone(name: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if masked:  # as on other devices, and with dropout
        of = Documents.of
        monkeypatch.setattr(Documents, "of", lambda numbers, dropout, **kind: of(numbers, 0.1, **kind))
    model, tokens = built(name), row_of_tokens(1)
    together = model(tokens, documents=torch.tensor([[0] * 4 + [1] * 9]))
    torch.testing.assert_close(together[:, :4], model(tokens[:, :4]), atol=1e-5, rtol=0)
    torch.testing.assert_close(together[:, 4:], model(tokens[:, 4:]), atol=1e-5, rtol=0)


@EVERY_MODEL
def test_bfloat16_autocast_is_close(name: str) -> None:
    model, tokens = built(name), row_of_tokens()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
        packed = model(tokens, documents=torch.zeros(2, LENGTH, dtype=torch.int32))
    expected = model(tokens)
    for found in (logits, packed):
        assert (found.float() - expected).square().mean().sqrt() < 0.03 * expected.std()


@pytest.mark.slow
@EVERY_MODEL
def test_compiles_in_one_graph(name: str) -> None:
    model, tokens = built(name), row_of_tokens()
    torch.compiler.reset()  # it compiles the same code for eight kinds of models, and no more
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(tokens), model(tokens), atol=1e-5, rtol=1e-4)


@EVERY_MODEL
def test_dropout_acts_in_training_only(name: str) -> None:
    model, tokens = built(name), row_of_tokens()
    dropped = LanguageModel(dataclasses.replace(model.config, dropout=0.3), 31)
    dropped.load_state_dict(model.state_dict())
    torch.testing.assert_close(dropped.eval()(tokens), model(tokens))
    assert not torch.allclose(dropped.train()(tokens), model(tokens))


def test_sinks_are_those_of_gpt_oss() -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    config = with_parts(positions="none", attention_sinks=True)
    attention = Attention(config, 0).double()
    sinks = with_random_sinks(attention)
    query, key, value = normal(2, 6, LENGTH, 4), normal(2, 2, LENGTH, 4, seed=2), normal(2, 2, LENGTH, 4, seed=3)
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None]
    theirs = SimpleNamespace(sinks=sinks, num_key_value_groups=3, training=False)
    expected, _ = eager_attention_forward(theirs, query, key, value, added(seen, torch.float64), scaling=0.5)
    found = attention._attend_all(query, key, value, context_of(config))
    torch.testing.assert_close(found, expected.transpose(1, 2), atol=1e-12, rtol=0)
