"""Combinations of keys of experts that do not fit together, or of which one has no effect; see `checks.py`."""

from collections.abc import Callable, Iterator

from llmtrain.config.plain import Finding
from llmtrain.config.schema import SpanCorruptionConfig
from llmtrain.config.view import View, finding, no_effect

KEY = "model.experts"


def chosen_experts(view: View) -> Iterator[Finding]:
    """A token is sent to some of the experts, with weights that the router can learn."""
    if view[KEY] is None:
        return
    number, chosen = view[f"{KEY}.num_experts"], view[f"{KEY}.experts_per_token"]
    if chosen > number:
        problem = f"{chosen} experts for each token are more than there are: {KEY}.num_experts={number}"
        yield finding(problem, f"{KEY}.experts_per_token", f"{KEY}.num_experts")
    if chosen == 1 and view[f"{KEY}.normalise_weights"]:
        problem = "the weight of a single expert is always 1 then, and the router learns nothing; set it to false"
        yield finding(problem, f"{KEY}.normalise_weights", f"{KEY}.experts_per_token")
    if chosen == number:
        why = f"a token goes through all of {KEY}.num_experts={number}, so their load is even"
        for key in ("balance_loss", "balance_bias_rate"):
            yield from no_effect(view, f"{KEY}.{key}", why, f"{KEY}.experts_per_token")


def sparse_layers(view: View) -> Iterator[Finding]:
    """Some layer has experts; a width that no layer has is not set."""
    if view[KEY] is None:
        return
    first, key, layers = view[f"{KEY}.first_layer"], "model.num_layers", view["model.num_layers"]
    if (view["model.encoder_layers"] or 0) > layers:
        key, layers = "model.encoder_layers", view["model.encoder_layers"]
    if first >= layers:
        problem = f"no layer has experts: the last of {key}={layers} is {layers - 1}, counted from 0"
        yield finding(problem, f"{KEY}.first_layer", key)
    every_layer = first == 0 and (view[f"{KEY}.layer_step"] == 1 or layers == 1)
    if every_layer and view[f"{KEY}.ffn_hidden_size"] is not None:
        why = f"no layer is dense, and {KEY}.ffn_hidden_size is the width of the experts"
        yield from no_effect(view, "model.ffn_hidden_size", why, f"{KEY}.ffn_hidden_size")


def router(view: View) -> Iterator[Finding]:
    """Options of what the router does not have."""
    if view[KEY] is None:
        return
    if view[f"{KEY}.capacity_factor"] is None:
        why = f"nothing is dropped; set {KEY}.capacity_factor"
        yield from no_effect(view, f"{KEY}.capacity_group_tokens", why)
    if view[f"{KEY}.scores"] == "sigmoid":
        why = "it holds down the normaliser of a softmax, and sigmoid scores have none"
        yield from no_effect(view, f"{KEY}.z_loss", why, f"{KEY}.scores")


def capacity(view: View) -> Iterator[Finding]:
    """A new model's capacity is shared by tokens that a row has, in the decoder beside an encoder too."""
    if view[KEY] is None or view[f"{KEY}.capacity_factor"] is None or view["model.init_from"] is not None:
        return
    group, length = view[f"{KEY}.capacity_group_tokens"], view["train.sequence_length"]
    if group > length:
        problem = f"{group} tokens are more than a row has, so there is room for more than its even share"
        yield finding(f"{problem}: train.sequence_length={length}", f"{KEY}.capacity_group_tokens")
    elif view["model.architecture"] == "encoder_decoder" and group > (targets := _targets(view, length)):
        problem = f"{group} tokens are more than the {targets} that the decoder reads of train.sequence_length={length}"
        yield finding(f"{problem}: there is room for more than its even share", f"{KEY}.capacity_group_tokens")


def _targets(view: View, inputs: int) -> int:
    """Tokens of the decoder's rows where the encoder's have `inputs`."""
    if view["objective.name"] == "auto":
        return SpanCorruptionConfig().lengths_for(inputs).targets
    noise, length = view["objective.noise_density"], view["objective.mean_span_length"]
    return SpanCorruptionConfig(noise_density=noise, mean_span_length=length).lengths_for(inputs).targets


EXPERT_CHECKS: tuple[Callable[[View], Iterator[Finding]], ...] = (
    chosen_experts, sparse_layers, router, capacity,
)  # fmt: skip
