"""Parts of an architecture that do not fit together, or of which one has no effect."""

import math
from collections.abc import Iterator

from llmtrain.config.plain import Finding
from llmtrain.config.schema import MUP_OPTIMIZERS
from llmtrain.config.view import View, finding, no_effect

ROPE = ("rope_theta", "rope_local_theta", "rope_scaling", "partial_rotary_factor")


def _changed(view: View, key: str, why: str, *others: str) -> Iterator[Finding]:
    """`no_effect` for a key of the model."""
    yield from no_effect(view, f"model.{key}", why, *(f"model.{other}" for other in others))


def attention_shape(view: View) -> Iterator[Finding]:
    """Heads divide the width where it gives their size, key-value heads divide the heads, rope turns pairs."""
    hidden, heads, kv_heads = view["model.hidden_size"], view["model.num_heads"], view["model.num_kv_heads"]
    given, share = view["model.head_dim"], view["model.partial_rotary_factor"]
    rotated = int((given or hidden // heads) * share)
    if given is None and hidden % heads:
        problem = f"{heads} does not divide model.hidden_size={hidden}; change one, or give model.head_dim"
        yield finding(problem, "model.num_heads", "model.hidden_size")
    elif view["model.positions"] == "rope" and (rotated == 0 or rotated % 2):
        per_head = f"{hidden} / {heads} heads = {hidden // heads} per head" if given is None else f"{given} per head"
        of_them = f", of which {share:g} are {rotated}" if share != 1.0 else ""
        keys = ("model.hidden_size", "model.num_heads") if given is None else ("model.head_dim",)
        keys = ("model.partial_rotary_factor", *keys) if share != 1.0 else keys
        yield finding(f"{per_head}{of_them}; rope needs an even number", *keys)
    if kv_heads is not None and heads % kv_heads:
        yield finding(f"{kv_heads} does not divide model.num_heads={heads}", "model.num_kv_heads", "model.num_heads")


def rotary(view: View) -> Iterator[Finding]:
    """Only rotary positions have frequencies."""
    positions = view["model.positions"]
    for key in ROPE if positions != "rope" else ():
        yield from _changed(view, key, f"model.positions={positions} has no frequencies", "positions")


def rope_scaling(view: View) -> Iterator[Finding]:
    """Bounds stand in their order; dynamic scaling is for generation."""
    scaling = view["model.rope_scaling"]
    if scaling is None or view["model.positions"] != "rope":
        return
    key = "model.rope_scaling"
    for low, high in (("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")):
        if low in scaling and scaling[low] >= scaling[high]:
            problem = f"{scaling[low]:g} is not below {key}.{high}={scaling[high]:g}"
            yield finding(problem, f"{key}.{low}", f"{key}.{high}")
    if scaling["name"] != "dynamic":
        return
    head_dim = view["model.head_dim"] or view["model.hidden_size"] // view["model.num_heads"]
    if int(head_dim * view["model.partial_rotary_factor"]) == 2:
        yield finding("dynamic needs heads of which more than 2 dimensions are rotated", f"{key}.name")
    longest, length = scaling["original_max_sequence_length"], view["train.sequence_length"]
    if length > longest:
        problem = (
            f"{length} is longer than {key}.original_max_sequence_length={longest}: dynamic scaling is for generation,"
            " for its angles depend on the longest row beside; train with yarn, llama3 or linear"
        )
        yield finding(problem, "train.sequence_length", f"{key}.original_max_sequence_length")


def windows(view: View) -> Iterator[Finding]:
    """Which layers have a window is said of a window that some have, and that is shorter than the sequences."""
    window, pattern, layers = view["model.sliding_window"], view["model.attention_pattern"], view["model.num_layers"]
    longest = view["model.max_sequence_length"]
    if window is None:
        for key in ("attention_pattern", "rope_local_theta"):
            yield from _changed(view, key, "no layer has a window: give model.sliding_window", "sliding_window")
        return
    if window >= longest:
        problem = f"has no effect: {window} positions are all of model.max_sequence_length={longest}"
        yield finding(problem, "model.sliding_window", "model.max_sequence_length")
    if pattern is not None and "sliding" not in pattern[:layers]:
        yield finding("has no effect: no layer is sliding", "model.sliding_window", "model.attention_pattern")
    elif pattern is not None and len(pattern) > layers:
        problem = f"has {len(pattern)} entries for model.num_layers={layers}"
        yield finding(problem, "model.attention_pattern", "model.num_layers")


def norms(view: View) -> Iterator[Finding]:
    """Parallel blocks are pre-norm; RMSNorm has no biases."""
    block, placement, norm = view["model.block"], view["model.norm_placement"], view["model.norm"]
    if block != "sequential" and placement != "pre":
        problem = f"{placement} does not go with model.block={block}, whose norms stand before both parts: take pre"
        yield finding(problem, "model.norm_placement", "model.block")
    if norm != "layernorm":
        yield from _changed(view, "norm_bias", f"model.norm={norm} has no biases", "norm")


def embeddings(view: View) -> Iterator[Finding]:
    """Sines come in pairs; a scale is a positive number."""
    hidden, scale = view["model.hidden_size"], view["model.embedding_scale"]
    if view["model.positions"] == "sinusoidal" and hidden % 2:
        problem = f"{hidden} is odd; sinusoidal positions are pairs of sine and cosine"
        yield finding(problem, "model.hidden_size", "model.positions")
    if isinstance(scale, int | float) and scale <= 0:
        yield finding(f"{scale} is not above 0", "model.embedding_scale")


def initialisation(view: View) -> Iterator[Finding]:
    """Some kinds say the deviation themselves, and count on scales; muP has zeros where they can be left."""
    kind = view["model.init.name"]
    if kind in ("scaled", "small", "t5"):
        yield from _changed(view, "init_std", f"{kind} says how large weights are by their shapes", "init.name")
    if kind == "t5":
        yield from _t5(view)
    if kind != "mup":
        return
    if view["model.architecture"] != "decoder":
        yield finding("mup has rules for decoders alone", "model.init.name", "model.architecture")
    if view["model.experts"] is not None:
        yield finding("mup has no rule for the routers of experts", "model.init.name", "model.experts")
    if view["model.init.zero_head"] and view["model.tied_embeddings"]:
        problem = "the head is the embedding, which is not to be zero; set model.tied_embeddings=false"
        yield finding(problem, "model.init.zero_head", "model.tied_embeddings")
    if view["model.init.zero_query"] and view["model.qk_norm"] != "none":
        yield finding("queries of zero cannot be normalised", "model.init.zero_query", "model.qk_norm")


def _t5(view: View) -> Iterator[Finding]:
    """Queries begin with the scale of the scores in them, and embeddings too large to be a head as they are."""
    scale, hidden = view["model.attention_scale"], view["model.hidden_size"]
    if scale != 1.0:
        problem = "t5 has the scale of attention's scores in the queries' weights: set model.attention_scale=1.0"
        yield finding(problem, "model.init.name", "model.attention_scale")
    if view["model.tied_embeddings"] and not math.isclose(view["model.logit_scale"], hidden**-0.5, rel_tol=1e-3):
        problem = (
            f"embeddings of t5 begin with deviation 1, and one is the head: set model.logit_scale={hidden**-0.5:.4g}, "
            f"which is 1 / sqrt(model.hidden_size={hidden}), or model.tied_embeddings=false"
        )
        yield finding(problem, "model.init.name", "model.logit_scale", "model.tied_embeddings")


def mup_optimizer(view: View) -> Iterator[Finding]:
    """The learning rates of muP depend on what the optimizer makes of a gradient."""
    if view["model.init.name"] == "mup" and view["optimizer._target_"] not in MUP_OPTIMIZERS:
        problem = f"model.init.name=mup has its learning rates for {' or '.join(MUP_OPTIMIZERS)} only"
        yield finding(problem, "optimizer._target_", "model.init.name")


def shape_of_network(view: View) -> Iterator[Finding]:
    """What encoders alone have; cross-attention needs a place between the two branches."""
    architecture, block = view["model.architecture"], view["model.block"]
    if architecture != "encoder_decoder":
        why = f"model.architecture={architecture} has no encoder beside a decoder"
        yield from _changed(view, "encoder_layers", why, "architecture")
    elif block != "sequential":
        problem = f"{block} leaves no place for cross-attention, which stands between both parts: take sequential"
        yield finding(problem, "model.block", "model.architecture")
    if architecture != "encoder":
        for key in ("num_segments", "pooler", "mlm_head"):
            yield from _changed(view, key, f"it is for model.architecture=encoder, not {architecture}", "architecture")


def tables_of_positions(view: View) -> Iterator[Finding]:
    """Only learned positions have rows to begin behind; buckets are for relative ones, and reach beyond the first."""
    positions = view["model.positions"]
    if positions != "learned":
        yield from _changed(view, "position_offset", f"model.positions={positions} has no table", "positions")
    if positions != "relative":
        for key in ("relative_buckets", "relative_max_distance"):
            yield from _changed(view, key, f"model.positions={positions} has no buckets", "positions")
        return
    buckets, farthest = view["model.relative_buckets"], view["model.relative_max_distance"]
    exact = buckets // (4 if view["model.architecture"] == "encoder" else 2)
    if buckets % 4:
        problem = f"{buckets} is no multiple of 4: it is halved for two directions, and again for far distances"
        yield finding(problem, "model.relative_buckets")
    if farthest <= exact:
        problem = f"{farthest} is not above {exact}, the distances with buckets of their own"
        yield finding(problem, "model.relative_max_distance", "model.relative_buckets")


def first_norm(view: View) -> Iterator[Finding]:
    """The embedding's norm stands for one that the first block would have."""
    placement = view["model.norm_placement"]
    if view["model.embedding_norm"] == "first" and placement not in ("pre", "sandwich"):
        problem = f"first is in the place of a norm that model.norm_placement={placement} has not: take added"
        yield finding(problem, "model.embedding_norm", "model.norm_placement")


MODEL_CHECKS = (
    attention_shape, rotary, rope_scaling, windows, norms, embeddings, shape_of_network, tables_of_positions,
    first_norm, initialisation, mup_optimizer,
)  # fmt: skip
