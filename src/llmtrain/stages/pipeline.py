"""`llmtrain pipeline`: stages in sequence from one YAML, each fed by the ones before; goes on where it stopped."""

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llmtrain.config.compose import load_config, stage_overrides
from llmtrain.config.schema import PipelineConfig
from llmtrain.engine.report import write_pipeline_report
from llmtrain.engine.tracking import read_metrics, until_step
from llmtrain.stages import handover


def run(config: PipelineConfig) -> None:
    """Run every stage that has not finished yet, then write `summary.json` and `report.html` and print the table."""
    folder = Path(config.runs_dir) / config.run
    # all stages' configs are checked before the first one starts
    stages = {
        name: load_config(stage.command, stage_overrides(config, name), later=("model.init_from", "reward_model"))
        for name, stage in config.stages.items()
    }
    for name, stage_config in stages.items():
        finished = handover.read_lineage(handover.run_folder(stage_config)).get("finished")
        print(f"\n[{name}] {'finished earlier' if finished else stage_config.run}", file=sys.stderr, flush=True)
        if finished:  # by this config, and from the parents that are there now?
            stage_config = handover.resolve_parents(stage_config)
            handover.check_start(stage_config)
            handover.check_parents(stage_config)
        else:
            importlib.import_module(f"llmtrain.stages.{config.stages[name].command}").run(stage_config)
    if int(os.environ.get("RANK", "0")) == 0:
        summary = {name: summarise(handover.run_folder(stage_config)) for name, stage_config in stages.items()}
        (folder / "summary.json").write_text(json.dumps(summary, indent=1))
        print_table(summary)
        print(f"summary: {folder / 'summary.json'}\nreport:  {write_pipeline_report(folder)}")


def summarise(folder: Path) -> dict[str, Any]:
    """What a finished run's model measured, by name, the start under `before`, and its training time in seconds."""
    lineage = handover.read_lineage(folder)
    rows = until_step(read_metrics(folder), lineage.get("step"))
    measured = [{key: row[key] for key in row if key.startswith("eval/")} for row in rows]
    measured = [{key.removeprefix("eval/"): value for key, value in row.items()} for row in measured if row]
    first, last = (measured[0], measured[-1]) if measured else ({}, {})
    return last | {"before": first, "seconds": lineage["seconds"]}


def print_table(summary: dict[str, dict[str, Any]]) -> None:
    """The one table: for every stage, each metric before and after."""
    table = Table(title="before and after each stage")
    for column in ("stage", "metric", "before", "after"):
        table.add_column(column, justify="left" if column in ("stage", "metric") else "right")
    for name, values in summary.items():
        for key, after in values.items():
            if isinstance(after, float) and key != "seconds":
                before = values["before"].get(key)
                table.add_row(name, key, "" if before is None else f"{before:.4g}", f"{after:.4g}")
        table.add_row(name, "seconds of training", "", f"{values['seconds']:.0f}", end_section=True)
    Console(width=None if sys.stdout.isatty() else 100).print(table)
