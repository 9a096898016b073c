"""`llmtrain show`: print what a stage's model will really see: its rows in the run's order, and what is learned."""

from collections.abc import Callable, Iterator, Mapping
from itertools import count, groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmtrain.commands import plans
from llmtrain.config.compose import load_config
from llmtrain.config.schema import AlignConfig, PretrainConfig, RewardConfig, RowsConfig, SftConfig, ShowConfig
from llmtrain.data.batches import RowOrder, TokenBatches
from llmtrain.data.encoding import TokenRow, load_conversations, load_pairs, load_prompts
from llmtrain.data.packing import PackedConversations
from llmtrain.data.preparation import prepare_sources
from llmtrain.data.sequences import text_rows
from llmtrain.data.tokenizers import Tokenizer, load_tokenizer
from llmtrain.engine.display import show_log
from llmtrain.models.formats import read_config
from llmtrain.stages import assembly, handover, pretrain, sft

LEARNED = "green"  # on a terminal; elsewhere what is learned stands between these:
MARKS = ("«", "»")


def run(config: ShowConfig) -> None:
    """Show the mixture and the first rows of a stage. Raises what the stage would raise for its config or data."""
    show_log(is_main=True)
    console = Console()
    planned = load_config(config.stage, config.overrides, later=("data",))
    if isinstance(planned, PretrainConfig) and plans.is_elsewhere(planned):
        rows = plans.planned_rows(planned)
        console.print(plans.plan_table(planned, rows))
        _warn(console, {row["source"]: row["run_epochs"] or 0.0 for row in rows})
        console.print("Not all of this text is on this machine, so no rows are shown.")
        return
    stage = handover.resolve_parents(load_config(config.stage, config.overrides))
    if isinstance(stage, PretrainConfig):
        show_text(stage, config.rows, console)
    else:
        show_rows(stage, config.rows, console)


def show_text(config: PretrainConfig, rows: int, console: Console) -> None:
    """The mixture of a pretraining run, and its first rows."""
    cache, length = _cache(config.runs_dir), config.train.sequence_length
    tokenizer = pretrain.build_tokenizer(config, cache)
    prepared = prepare_sources(config.data, tokenizer=tokenizer, cache_dir=cache)
    sources = {name: source.train for name, source in prepared.items()}
    parameters = 0
    if config.train.tokens_per_parameter:
        parameters = sum(each.numel() for each in pretrain.build_model(config, tokenizer).parameters())
    found = {name: text_rows(source, config.data, length, tokenizer.pad_id) for name, source in sources.items()}
    sizes = {name: len(each) for name, each in found.items()}
    mixture, steps = assembly.plan(config.data, config.train, sizes, parameters=parameters, tokens_per_row=length)
    batch_rows = assembly.rows_per_step(config.train)
    batches = TokenBatches(found, RowOrder(mixture, sizes, batch_rows, config.seed), sequence_length=length)
    counts = {name: source.summary.documents for name, source in sources.items()}
    _print_mixture(console, batches.order, batches.counts(steps), counts, ("documents", "tokens"), steps)
    for number, (source, row) in enumerate(islice(_places(batches.order), rows)):
        name = batches.order.names[source]
        title = f"row {number}: {name}, row {row}, {length} tokens"
        _print_row(console, title, tokenizer, found[name][row].tokens, found[name][row].mask)


def show_rows(config: SftConfig | RewardConfig | AlignConfig, rows: int, console: Console) -> None:
    """The mixture of conversations, pairs or prompts, and the first rows of the run."""
    folder = handover.model_folder(assembly.parent(config))
    tokenizer = sft.build_tokenizer(config) if isinstance(config, SftConfig) else load_tokenizer(folder)
    length = min(config.train.sequence_length, read_config(folder)[0].max_sequence_length)
    load, sides = _loader(config)
    found = load(config.data, tokenizer, split="train", max_length=length, cache_dir=_cache(config.runs_dir))
    if config.data.packing:
        found = {name: PackedConversations(each, length) for name, each in found.items()}
    sizes = {name: len(each) for name, each in found.items()}
    mixture, steps = assembly.plan(config.data, config.train, sizes)
    order = RowOrder(mixture, sizes, config.train.batch_rows or 1, config.seed)
    _print_mixture(console, order, order.counts(steps, "rows"), sizes, ("rows", "rows"), steps)
    _print_sampled_pairs(console, config.data)
    for number, (source, row) in enumerate(islice(_places(order), rows)):
        name = order.mixture.names[source]
        for side, (tokens, mask) in sides(found[name][row]).items():
            title = f"row {number}: {name}, {side}, {len(tokens)} tokens, {int(mask.sum())} of them learned"
            _print_row(console, title, tokenizer, tokens, mask)


def _loader(config: SftConfig | RewardConfig | AlignConfig) -> tuple[Callable[..., Any], Callable[[Any], Any]]:
    """How the rows of a stage are loaded, and what parts of a row are printed: name → TokenRow."""
    if isinstance(config, SftConfig) and config.data.packing:
        return load_conversations, lambda row: {f"conversation {n}": each for n, each in enumerate(row)}
    if isinstance(config, SftConfig):
        return load_conversations, lambda row: {"conversation": row}
    if isinstance(config, AlignConfig) and config.method.name == "ppo":
        return load_prompts, lambda row: {"prompt": _prompt_row(row.tokens)}
    return load_pairs, lambda row: row._asdict()


def _prompt_row(tokens: list[int]) -> TokenRow:
    return TokenRow(np.array(tokens, dtype=np.int32), np.zeros(len(tokens), dtype=np.bool_))


def _places(order: RowOrder) -> Iterator[tuple[int, int]]:
    """Source and row number of each row of the run, in order."""
    for step in count():
        yield from zip(*(each.tolist() for each in order(step)), strict=True)


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


def _print_row(
    console: Console, title: str, tokenizer: Tokenizer, tokens: NDArray[Any], mask: NDArray[np.bool_]
) -> None:
    console.print(Text(title, style="bold"))
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


def _cache(runs_dir: str) -> Path:
    return Path(runs_dir) / "cache"
