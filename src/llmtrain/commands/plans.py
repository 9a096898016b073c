"""The table of a pretraining mixture whose text is not here yet, from the published sizes of its sources."""

from typing import Any

from rich.table import Table

from llmtrain.config.paths import is_here
from llmtrain.config.schema import PretrainConfig
from llmtrain.data.files import is_hub_id
from llmtrain.data.plans import source_weights
from llmtrain.stages.planning import num_steps, rows_per_step

BYTES_PER_TOKEN = 4.0  # of English text, with tokenizers of 32 to 128 thousand tokens: 3.5 to 4.7
MANY_EPOCHS = 4  # up to here repeated text is worth nearly as much as new one (Muennighoff et al., arXiv 2305.16264)


def is_elsewhere(config: PretrainConfig) -> bool:
    """Whether there are sources that are not on this machine, and the size of each of them is published.

    A path that is missing without that is a fault, told as for any other command.
    """
    missing = [source for source in config.data.sources.values() if not _is_here(source.path)]
    return bool(missing) and all(source.published_gib or source.published_tokens for source in missing)


def _is_here(path: str) -> bool:
    return path.startswith("embedded:") or (not is_hub_id(path) and is_here(path))


def planned_rows(config: PretrainConfig) -> list[dict[str, Any]]:
    """For each source: size in GiB, tokens, share, epochs asked for, size x epochs, and the run's epochs of it.

    What does not follow from what the config says is None. Tokens are as published, else at 4 bytes each.
    """
    sources = config.data.sources
    gib = {name: source.published_gib for name, source in sources.items()}
    tokens = {
        name: source.published_tokens or (source.published_gib * 2**30 / BYTES_PER_TOKEN if source.published_gib else 0)
        for name, source in sources.items()
    }  # fmt: skip
    sizes = {name: gib[name] or tokens[name] for name in sources} if all(gib.values()) else tokens
    weights = source_weights(config.data, {name: size or 0.0 for name, size in sizes.items()})
    budget = run_tokens(config, sum(tokens.values()))
    rows = []
    for name, source in sources.items():
        share, size = weights[name] / (sum(weights.values()) or 1.0), gib[name]
        rows.append(
            {
                "source": name, "gib": size, "tokens": tokens[name] or None, "share": share, "epochs": source.epochs,
                "effective_gib": size * source.epochs if size and source.epochs else None,
                "run_epochs": share * budget / tokens[name] if tokens[name] else None,
            }
        )  # fmt: skip
    return rows


def run_tokens(config: PretrainConfig, corpus_tokens: float) -> int:
    """Tokens that the run takes; its epochs are over the whole corpus."""
    length = config.train.sequence_length
    rows = max(1, int(corpus_tokens) // length)
    return num_steps(config.train, rows=rows, tokens_per_row=length) * rows_per_step(config.train) * length


COLUMNS = {
    "GiB": ("gib", "{:,.2f}"),
    "tokens": ("tokens", "{:,.0f}"),
    "weight": ("share", "{:.2%}"),
    "epochs": ("epochs", "{:.1f}"),
    "GiB x epochs": ("effective_gib", "{:,.2f}"),
    "epochs in this run": ("run_epochs", "{:.3g}"),
}


def plan_table(config: PretrainConfig, rows: list[dict[str, Any]]) -> Table:
    """The rows as a table, without columns that nothing is known for, and the sums of what adds up."""
    budget = run_tokens(config, sum(row["tokens"] or 0 for row in rows))
    guessed = any(row["tokens"] and not config.data.sources[row["source"]].published_tokens for row in rows)
    note = f", tokens guessed at {BYTES_PER_TOKEN:g} bytes each" if guessed else ""
    table = Table(title=f"{budget:,} tokens; sizes as published{note}", title_justify="left")
    table.add_column("source", no_wrap=True)
    columns = {
        heading: column for heading, column in COLUMNS.items() if any(row[column[0]] is not None for row in rows)
    }  # fmt: skip
    for heading in columns:
        table.add_column(heading, justify="right")
    for row in rows:
        cells = [text.format(row[key]) if row[key] is not None else "" for key, text in columns.values()]
        table.add_row(row["source"], *cells)
    sums = {key: sum(row[key] or 0 for row in rows) for key in ("gib", "tokens", "share", "effective_gib")}
    table.add_row("all", *(text.format(sums[key]) if key in sums else "" for key, text in columns.values()))
    return table


def repeated(epochs: dict[str, float]) -> list[str]:
    """A warning for each source that a run goes through more than `MANY_EPOCHS` times."""
    return [
        f"{name}: gone through {times:.1f} times; beyond {MANY_EPOCHS} epochs repeated text teaches less and less"
        for name, times in epochs.items() if times > MANY_EPOCHS
    ]  # fmt: skip
