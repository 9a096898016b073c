"""`llmtrain prepare`: read, clean and tokenise a mixture of text, so that every run with it begins at once."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from llmtrain.config.schema import PrepareConfig
from llmtrain.data.preparation import prepare_sources
from llmtrain.data.shards import PreparedSource
from llmtrain.stages import pretrain


def run(config: PrepareConfig) -> None:
    """Prepare all sources; what is there already is used again. Raises DataError for what cannot be read."""
    cache = Path(config.runs_dir) / "cache"
    tokenizer = pretrain.corpus_tokenizer(config.data, config.tokenizer, cache)
    prepared = prepare_sources(
        config.data, tokenizer=tokenizer, cache_dir=cache, processes=config.processes
    )  # fmt: skip
    Console().print(_table(prepared))


def _table(prepared: dict[str, PreparedSource]) -> Table:
    table = Table(title="prepared", title_justify="left")
    table.add_column("source")
    for heading in ("rows", "left out", "documents", "held out", "MB", "tokens", "bytes a token"):
        table.add_column(heading, justify="right")
    table.add_column("folder", overflow="fold")
    for name, (train, validation) in prepared.items():
        manifest, summary = train.manifest, train.summary
        left_out = manifest.left_out + sum(count for count, _ in manifest.faults.values())
        table.add_row(
            name, f"{manifest.rows:,}", f"{left_out:,}", f"{summary.documents:,}", f"{validation.summary.documents:,}",
            f"{summary.bytes / 1e6:,.1f}", f"{summary.tokens:,}", f"{summary.bytes / max(summary.tokens, 1):.2f}",
            train.folder.name,
        )  # fmt: skip
    return table
