"""Prints what a stage's model will really see, or what a run's has seen."""

from collections.abc import Mapping
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmtrain.commands import plans
from llmtrain.commands.seen import Seen, as_if_here, check_reproducible, rows_in_order, rows_of_step, what_is_seen
from llmtrain.config.compose import load_config, read_yaml
from llmtrain.config.errors import ConfigError, DataError
from llmtrain.config.schema import (
    AlignConfig,
    LoraConfig,
    PretrainConfig,
    RewardConfig,
    RowsConfig,
    SftConfig,
    ShowConfig,
    StageConfig,
)  # fmt: skip
from llmtrain.config.validate import validate
from llmtrain.data.batches import RowOrder
from llmtrain.data.ledger import Ledger
from llmtrain.data.tokenizers import Tokenizer
from llmtrain.models.formats import read_config
from llmtrain.models.heads import LanguageModel, ScalarModel, trained_share
from llmtrain.models.lora import adapt
from llmtrain.models.meta import on_meta
from llmtrain.stages import handover

LEARNED = "green"  # on a terminal; elsewhere what is learned stands between these:
MARKS = ("«", "»")
SCHEMAS = {"pretrain": PretrainConfig, "sft": SftConfig, "reward": RewardConfig, "align": AlignConfig}


def show_stage(config: ShowConfig, console: Console) -> None:
    """The mixture of a stage and its first rows; only the mixture where the text is not on this machine."""
    overrides = [f"runs_dir={config.runs_dir}", *config.overrides]
    planned = load_config(config.stage, overrides, later=("data",))
    if isinstance(planned, PretrainConfig) and plans.is_elsewhere(planned):
        rows = plans.planned_rows(planned)
        console.print(plans.plan_table(planned, rows))
        _warn(console, {row["source"]: row["run_epochs"] or 0.0 for row in rows})
        console.print("Not all of this text is on this machine, so no rows are shown.")
        return
    stage = handover.resolve_parents(load_config(config.stage, overrides))
    seen = what_is_seen(stage)
    units = ("documents", "tokens") if isinstance(stage, PretrainConfig) else ("rows", "rows")
    steps = seen.plan.steps
    _print_mixture(console, seen.order, seen.counts(steps), seen.amounts, units, steps)
    if not isinstance(stage, PretrainConfig):
        _print_sampled_pairs(console, stage.data)
    if isinstance(stage.adapter, LoraConfig):
        _print_trained(console, stage, stage.adapter)
    for number, (name, row) in enumerate(islice(rows_in_order(seen.order), config.rows)):
        _print_parts(console, seen, f"row {number}", name, row, divmod(number, seen.order.batch_rows))


def show_run(config: ShowConfig, console: Console) -> None:
    """The rows of a step of a run with their documents, or the steps at which a document was seen.

    Raises ConfigError for what is no run, DataError where its data is not what it was.
    """
    folder, ledger = run_folder(str(config.run), config.runs_dir), None
    stage = as_if_here(config_of(folder), folder)
    check_reproducible(stage)
    for checkpoint in sorted((folder / "checkpoints").glob("step-*/mixture.json")):
        ledger = Ledger.read(checkpoint.parent)
    seen = what_is_seen(stage, ledger)
    if config.step is not None:
        if config.step > seen.plan.steps:
            raise ConfigError(f"step={config.step}: the run has {seen.plan.steps} steps")
        for number, (name, row) in enumerate(rows_of_step(seen.order, config.step - 1)):
            title = f"step {config.step}, row {number}"
            _print_parts(console, seen, title, name, row, (config.step - 1, number), with_places=True)
    if config.document is not None:
        _print_steps_of(console, seen, config.document)


def run_folder(run: str, runs_dir: str) -> Path:
    """The folder of a run, by its name or as it is. Raises ConfigError where there is none."""
    places = [Path(run), Path(runs_dir) / run]
    for place in places:
        if (place / "lineage.json").is_file():
            return place
    raise ConfigError(f"run={run}: no run in {' or '.join(map(str, places))}: there is no lineage.json")


def config_of(folder: Path) -> PretrainConfig | SftConfig | RewardConfig | AlignConfig:
    """The config that a run was started with. Raises ConfigError where it is none any more."""
    stage = handover.read_lineage(folder).get("stage")
    if stage not in SCHEMAS:
        raise ConfigError(f"{folder / 'lineage.json'}: stage: expected one of {', '.join(SCHEMAS)}, found {stage!r}")
    found, findings = validate(SCHEMAS[stage], read_yaml(str(folder / "config.yaml")))
    if findings:
        first = findings[0]
        raise ConfigError(f"{folder / 'config.yaml'}: {'.'.join(first.path)}: {first.problem}")
    config: PretrainConfig | SftConfig | RewardConfig | AlignConfig = found
    return config


def _print_parts(
    console: Console, seen: Seen, title: str, name: str, row: int, when: tuple[int, int], with_places: bool = False
) -> None:
    if name not in seen.amounts:
        console.print(Text(f"{title}: {name}, row {row}: this source is no longer in the run's config"))
        return
    for part, tokens, mask in seen.parts(name, row, when):
        said = f"{title}: {name}, {part}, {len(tokens)} tokens, {int(mask.sum())} of them learned"
        _print_row(console, said, seen.tokenizer, tokens, mask, seen.places(name, row) if with_places else [])


def _print_steps_of(console: Console, seen: Seen, document: str) -> None:
    """At which steps a document, named as FILE:NUMBER, was or will be seen."""
    file, _, number = (
        document.replace(", line ", ":")
        .replace(", row ", ":")
        .replace(", part ", ":")
        .replace(", document ", ":")
        .rpartition(":")
    )
    if not file or not number.isdigit():
        raise ConfigError(f"document={document}: expected FILE:NUMBER, as in web.jsonl:12 for line 12 of web.jsonl")
    found = {name: rows for name in seen.amounts if (rows := seen.rows_from(name, file, int(number)))}
    if not found:
        raise DataError(
            f"document={document}: no row of the run comes from there: it is held out, was left out, or is no part of "
            f"its sources: {', '.join(seen.amounts)}"
        )
    for name, rows in found.items():
        steps = sorted({step + 1 for row in rows for step in seen.order.steps_of(name, row, seen.plan.steps)})
        said = ", ".join(map(str, steps)) if steps else f"at none of the {seen.plan.steps} steps"
        console.print(Text(f"{document} is in {len(rows)} row(s) of {name}, seen at step: {said}"), soft_wrap=True)


def _print_mixture(
    console: Console, order: RowOrder, used: dict[str, float], sizes: Mapping[str, int | None], units: tuple[str, str],
    steps: int,
) -> None:  # fmt: skip
    """One line for each source: its weight, its size where it is known, and what the run uses of it."""
    size_unit, used_unit = units
    table = Table(title=f"{steps:,} steps", title_justify="left")
    for heading in ("source", "weight", size_unit, f"{used_unit} used", "epochs"):
        table.add_column(heading, justify="left" if heading == "source" else "right")
    for name, share in order.mixture.shares.items():
        amount, epochs = used[f"data/{name}/{used_unit}"], used[f"data/{name}/epochs"]
        size = "" if sizes[name] is None else f"{sizes[name]:,}"
        table.add_row(name, f"{share:.2%}", size, f"{amount:,.0f}", f"{epochs:.2f}")
    console.print(table)
    phases = [phase for phase in order.mixture.phases if phase.start < steps * order.batch_rows]
    for start, shares in phases[1:]:
        said = ", ".join(f"{name} {share:.2%}" for name, share in shares.items())
        console.print(f"from step {start // order.batch_rows:,} on: {said}")
    _warn(console, {name: used[f"data/{name}/epochs"] for name in order.mixture.names})


def _warn(console: Console, epochs: dict[str, float]) -> None:
    for warning in plans.repeated(epochs):
        console.print(Text(warning, style="yellow"))


def _print_sampled_pairs(console: Console, data: RowsConfig) -> None:
    if data.sampled_pairs:
        share = data.sampled_pairs.share
        console.print(f"Besides these, {share:.0%} of the pairs will be against wrong answers sampled from the model.")


def _print_trained(console: Console, stage: StageConfig, adapter: LoraConfig) -> None:
    """How much of the model is trained."""
    architecture, vocab_size = read_config(handover.model_folder(handover.parent(stage)))
    with on_meta():
        model = (ScalarModel if isinstance(stage, RewardConfig) else LanguageModel)(architecture, vocab_size)
    adapt(model, adapter)
    console.print(Text(f"adapter=lora: {trained_share(model)}"))


def _print_row(
    console: Console, title: str, tokenizer: Tokenizer, tokens: NDArray[Any], mask: NDArray[np.bool_],
    places: list[str],
) -> None:  # fmt: skip
    console.print(Text(title, style="bold"))
    for place in places:
        console.print(Text(f"  from {place}", style="dim"), soft_wrap=True)
    console.print(learned_text(tokenizer, tokens, mask, marks=not console.is_terminal), soft_wrap=True)
    console.print()


def learned_text(tokenizer: Tokenizer, tokens: NDArray[Any], mask: NDArray[np.bool_], marks: bool) -> Text:
    """The text of a row [length], what `mask` [length] says is learned in colour, or between marks."""
    text = Text()
    pairs = zip(tokens.tolist(), mask.tolist(), strict=True)
    for learned, group in groupby(pairs, key=lambda pair: pair[1]):
        piece = tokenizer.decode([token for token, _ in group], skip_special=False)
        if learned and marks:
            piece = piece.join(MARKS)
        text.append(piece, style=LEARNED if learned else "")
    return text
