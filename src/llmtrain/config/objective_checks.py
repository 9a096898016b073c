"""Objectives that do not go with the model, the data or the tokenizer, or of which a key has no effect."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from llmtrain.config.fields import alternatives, tag_of
from llmtrain.config.plain import Finding
from llmtrain.config.schema import SENTINELS, NamedObjective, SpanCorruptionConfig, UsualObjectiveConfig
from llmtrain.config.view import NotValid, View, finding, no_effect

ARCHITECTURES = {tag_of(member): member.architecture for member in alternatives(NamedObjective)}
SHORTEST_INPUTS = 3  # one token of text, a sentinel, an end token
SMALLEST_VOCABULARY = 300  # the 256 bytes, the special tokens that there are always, and some merges


def _objective(view: View) -> dict[str, Any]:
    """The keys of the objective, or of the one that auto stands for; nobody knows yet where a folder says it."""
    if view["objective.name"] != "auto":
        named: dict[str, Any] = view["objective"]
        return named
    if view["model.init_from"] is not None:
        raise NotValid
    return dataclasses.asdict(UsualObjectiveConfig().of(view["model.architecture"], view["model.pooler"]))


def architecture(view: View) -> Iterator[Finding]:
    """Hidden tokens are for models that see both ways, spans for those that read and then write, the rest writes."""
    if view.command != "pretrain" or view["model.init_from"] is not None:
        return
    name, there = _objective(view)["name"], view["model.architecture"]
    wanted = ARCHITECTURES[name]
    if there != wanted:
        others = [each for each, kind in ARCHITECTURES.items() if kind == there]
        cure = f"set model.architecture={wanted}, or choose objective={' or '.join(others)}"
        problem = f"{name} is for architecture {wanted}, and the model's is {there}: {cure}"
        yield finding(problem, "objective.name", "model.architecture")


def pooler(view: View) -> Iterator[Finding]:
    """Two segments are told apart and judged by parts of their own, which nothing else trains."""
    if view.command != "pretrain" or view["model.init_from"] is not None or view["model.architecture"] != "encoder":
        return
    has_two = _objective(view).get("next_sentence", False)
    if has_two and not view["model.pooler"]:
        yield finding("judges by a pooler: set model.pooler=true", "objective.next_sentence", "model.pooler")
    if has_two and view["model.num_segments"] < 2:
        yield finding("has two segments: set model.num_segments=2", "objective.next_sentence", "model.num_segments")
    if not has_two:
        why = "only objective.next_sentence=true trains it: set that, or model.pooler=false"
        yield from no_effect(view, "model.pooler", why, "objective.next_sentence")


def masked(view: View) -> Iterator[Finding]:
    """Shares of a whole; two segments of running text, of which any may be asked for."""
    objective = _objective(view)
    if objective["name"] != "masked":
        return
    replaced, drawn = objective["replace_rate"], objective["random_rate"]
    if replaced + drawn > 1:
        problem = f"{replaced:g} + {drawn:g} are more than 1; the two are shares of the masked tokens"
        yield finding(problem, "objective.replace_rate", "objective.random_rate")
    if objective["next_sentence"]:
        key = "objective.next_sentence"
        yield from _running_text(view, key, "two segments are cut from running text")
        if view["data.streaming"]:
            problem = "the second segment may come from anywhere, which a stream cannot be asked for; leave one away"
            yield finding(problem, key, "data.streaming")


def spans(view: View) -> Iterator[Finding]:
    """Spans are taken out of running text, and each needs a sentinel."""
    objective = _objective(view)
    if objective["name"] != "span_corruption":
        return
    yield from _running_text(view, "objective.name", "span_corruption reads running text, of one document or several")
    length = view["train.sequence_length"]
    if length < SHORTEST_INPUTS:
        yield finding(f"{length} is too short: span_corruption needs {SHORTEST_INPUTS}", "train.sequence_length")
        return
    found = SpanCorruptionConfig(
        noise_density=objective["noise_density"], mean_span_length=objective["mean_span_length"]
    ).lengths_for(length)
    if found.inputs != length:
        problem = f"so much is taken out that no text comes to train.sequence_length={length} tokens: lower it"
        yield finding(problem, "objective.noise_density", "objective.mean_span_length")
    if found.spans > SENTINELS and view["tokenizer.path"] is None and view["model.init_from"] is None:
        problem = (
            f"{found.text} tokens of text have {found.spans} spans, and there are {SENTINELS} sentinels: "
            "raise objective.mean_span_length, or lower objective.noise_density or train.sequence_length"
        )
        yield finding(problem, "objective.mean_span_length", "train.sequence_length")


def sentinels_fit(view: View) -> Iterator[Finding]:
    """Sentinels are tokens of the vocabulary."""
    wanted = [*view["tokenizer.special_tokens_for"]]
    if view.command == "pretrain":
        wanted.append(_objective(view)["name"])
    if "span_corruption" not in wanted or view["tokenizer.path"] is not None:
        return
    if view.command == "pretrain" and view["model.init_from"] is not None:
        return
    size, least = view["tokenizer.vocab_size"], SMALLEST_VOCABULARY + SENTINELS
    if size < least:
        problem = f"{size} has no room for the {SENTINELS} sentinels of span_corruption; give {least} or more"
        yield finding(problem, "tokenizer.vocab_size", "objective.name")


def prefix(view: View) -> Iterator[Finding]:
    """The shortest prefix is not longer than the longest."""
    if view["objective.name"] != "prefix":
        return
    low, high = view["objective.min_share"], view["objective.max_share"]
    if low > high:
        yield finding(f"{low:g} is above objective.max_share={high:g}", "objective.min_share", "objective.max_share")


def length_warmup(view: View) -> Iterator[Finding]:
    """Rows that are cut are those of next tokens."""
    name = _objective(view)["name"]
    if view.command == "pretrain" and name != "next_token" and view["train.length_warmup"] is not None:
        problem = f"rows are cut for next_token only, not for {name}: leave it away"
        yield finding(problem, "train.length_warmup", "objective.name")


def special_tokens(view: View) -> Iterator[Finding]:
    """A tokenizer that comes with the model is not trained."""
    if view.command == "pretrain" and view["model.init_from"] is not None and view["tokenizer.path"] is None:
        why = "the tokenizer comes with model.init_from"
        yield from no_effect(view, "tokenizer.special_tokens_for", why, "model.init_from")


def _running_text(view: View, key: str, why: str) -> Iterator[Finding]:
    if view["data.sequences"] != "blocks":
        yield finding(f"{why}: set data.sequences=blocks", "data.sequences", key)
    if not view["data.attend_across_documents"]:
        yield finding(f"{why}: leave data.attend_across_documents=true", "data.attend_across_documents", key)


OBJECTIVE_CHECKS: tuple[Callable[[View], Iterator[Finding]], ...] = (
    architecture, pooler, masked, spans, sentinels_fit, prefix, length_warmup, special_tokens,
)  # fmt: skip
