"""`llmtrain prepare`: read, clean and tokenise a mixture of text, so that every run with it begins at once."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from llmtrain.config.folders import CACHE
from llmtrain.config.schema import PrepareConfig
from llmtrain.data.corpus import corpus_tokenizer
from llmtrain.data.preparation import prepare_sources
from llmtrain.data.shards import PreparedSource, PreparedTokens
from llmtrain.engine.display import show_log


def run(config: PrepareConfig) -> None:
    """Prepare all sources; what is there already is used again. Raises DataError for what cannot be read."""
    show_log(is_main=True)
    cache = Path(config.runs_dir) / CACHE
    tokenizer = corpus_tokenizer(config.data, config.tokenizer, cache)
    prepared = prepare_sources(
        config.data, tokenizer=tokenizer, cache_dir=cache, processes=config.processes
    )  # fmt: skip
    show(prepared)


def show(prepared: dict[str, PreparedSource]) -> None:
    """A table of what there is, and below it where it lies."""
    console, table = Console(), _table(prepared)
    # a terminal may fold a long line, but no figure is cut off
    console.width = max(console.width, console.measure(table, options=console.options.update(max_width=999)).minimum)
    console.print(table)
    for name, source in prepared.items():
        train = source.train
        console.print(f"{name}: {train.folder if isinstance(train, PreparedTokens) else train.path}", soft_wrap=True)


def _table(prepared: dict[str, PreparedSource]) -> Table:
    table = Table(title="prepared", title_justify="left")
    table.add_column("source")
    for heading in ("rows", "left out", "documents", "held out", "MB", "tokens", "bytes a token"):
        table.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
    for name, source in prepared.items():
        table.add_row(name, *(_of_text if isinstance(source.train, PreparedTokens) else _of_tokens)(source))
    return table


def _of_text(source: PreparedSource) -> list[str]:
    train, held_out = source
    assert isinstance(train, PreparedTokens)
    manifest, documents, num_bytes = train.manifest, train.summary.documents or 0, train.summary.bytes or 0
    left_out = manifest.left_out + sum(count for count, _ in manifest.faults.values())
    return [
        f"{manifest.rows:,}", f"{left_out:,}", f"{documents:,}", f"{held_out.summary.documents:,}",
        f"{num_bytes / 1e6:,.1f}", f"{len(train):,}", f"{num_bytes / max(len(train), 1):.2f}",
    ]  # fmt: skip


def _of_tokens(source: PreparedSource) -> list[str]:
    """Token files stay where they are; how many documents they have is told only where they say it."""
    documents = ["" if each.summary.documents is None else f"{each.summary.documents:,}" for each in source]
    return ["", "", *documents, "", f"{len(source.train):,}", ""]
