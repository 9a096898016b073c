"""Context parallelism: what cannot be computed by positions of a row."""

from collections.abc import Callable, Iterator

from llmtrain.config.plain import Finding
from llmtrain.config.view import View, finding

KEY = "engine.context_parallel"
# Objectives of `pretrain` whose loss is a sum over the tokens that positions predict.
BY_POSITION = ("auto", "next_token", "prefix", "fill_in_the_middle")


def context(view: View) -> Iterator[Finding]:
    """What does not go with processes that share the positions of rows."""
    if view[KEY] == 1:
        return
    if view.command not in ("pretrain", "sft"):
        yield finding(f"is for pretrain and sft: the loss of {view.command} is of whole rows. Leave it at 1", KEY)
    for name in ("tensor_parallel", "expert_parallel"):
        if view[f"engine.{name}"] > 1:
            yield finding(f"does not go with engine.{name}: leave one of them at 1", KEY, f"engine.{name}")
    if view["engine.sharding"] != "ddp":
        problem = "processes that share positions hold the model whole: use engine.sharding=ddp"
        yield finding(problem, KEY, "engine.sharding")
    if view["engine.compile"] is True:
        problem = "with context parallelism nothing is compiled: set it to auto or false"
        yield finding(problem, "engine.compile", KEY)
    if view["train.micro_batch_rows"] == "auto":
        yield finding(
            "auto measures rows that one process computes whole; give a number", "train.micro_batch_rows", KEY
        )
    if view["adapter.name"] != "none":
        yield finding("adapters are not trained by positions: leave one of them away", KEY, "adapter.name")


def objective(view: View) -> Iterator[Finding]:
    """The loss is counted where it is predicted."""
    name = view["objective.name"]
    if view[KEY] > 1 and view.command == "pretrain" and name not in BY_POSITION:
        yield finding(f"does not go with objective={name}: its loss is of whole rows", KEY, "objective.name")


def decoders(view: View) -> Iterator[Finding]:
    """A new model is a decoder whose parts go position by position."""
    if view[KEY] == 1 or view.command != "pretrain" or view["model.init_from"] is not None:
        return
    architecture = view["model.architecture"]
    if architecture != "decoder":
        yield finding(f"does not go with model.architecture={architecture}", KEY, "model.architecture")
    if view["model.experts"] is not None:
        yield finding("does not go with experts, whose balance is one of whole rows", KEY, "model.experts")
    if view["model.stochastic_depth"] > 0:
        yield finding("does not go with stochastic depth, which leaves out whole rows", KEY, "model.stochastic_depth")


CONTEXT_CHECKS: tuple[Callable[[View], Iterator[Finding]], ...] = (context, objective, decoders)
