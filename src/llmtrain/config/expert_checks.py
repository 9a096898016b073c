"""Combinations of keys of experts that do not fit together, or of which one has no effect; see `checks.py`."""

from collections.abc import Callable, Iterator

from llmtrain.config.plain import Finding
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


def decoders(view: View) -> Iterator[Finding]:
    """What balance is judged over is known of text that is read from left to right."""
    if view[KEY] is not None and view["model.architecture"] != "decoder":
        yield finding("experts are for decoders here; leave it away", KEY, "model.architecture")


def sparse_layers(view: View) -> Iterator[Finding]:
    """Some layer has experts; a width that no layer has is not set."""
    if view[KEY] is None:
        return
    first, layers = view[f"{KEY}.first_layer"], view["model.num_layers"]
    if first >= layers:
        problem = f"no layer has experts: the last of model.num_layers={layers} is {layers - 1}, counted from 0"
        yield finding(problem, f"{KEY}.first_layer", "model.num_layers")
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
    """A new model's capacity is shared by tokens that a row has."""
    if view[KEY] is None or view[f"{KEY}.capacity_factor"] is None or view["model.init_from"] is not None:
        return
    group, length = view[f"{KEY}.capacity_group_tokens"], view["train.sequence_length"]
    if group > length:
        problem = f"{group} tokens are more than a row has, so there is room for more than its even share"
        yield finding(f"{problem}: train.sequence_length={length}", f"{KEY}.capacity_group_tokens")


EXPERT_CHECKS: tuple[Callable[[View], Iterator[Finding]], ...] = (
    decoders, chosen_experts, sparse_layers, router, capacity,
)  # fmt: skip
