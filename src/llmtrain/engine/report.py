"""One self-contained HTML page for a run or a pipeline, from what stands in its folder; what is missing is left out."""

import dataclasses
import functools
import importlib.resources
import json
import os
import shlex
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import yaml
from markupsafe import Markup

from llmtrain.engine.charts import Points, line_chart
from llmtrain.engine.display import clock, compact
from llmtrain.engine.faults import in_words
from llmtrain.engine.health import HealthWarning, read_warnings
from llmtrain.engine.tracking import flatten, read_faults, read_metrics, read_samples, until_step

Rows = list[dict[str, Any]]

# What a mixture's shares are counted in: the first of these that the run counted.
SHARE_MEASURES = ("samples", "rows", "tokens")
# Of more steps with sampled answers, this many are shown, evenly spread.
SHOWN_STEPS = 12


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run's folder, from its metrics, config, lineage and samples."""
    view = _view(run_folder, run_folder.name)
    return _write(run_folder, title=view.name, subtitle=view.subtitle, comparison=None, views=[view])


def write_pipeline_report(pipeline_folder: Path) -> Path:
    """Write `report.html` into a pipeline's folder: its stages side by side from `summary.json`, then each in turn."""
    summary = _json(pipeline_folder / "summary.json")
    views = [_view(pipeline_folder / name, name) for name in summary]
    subtitle = f"pipeline: {' → '.join(summary)}"
    return _write(
        pipeline_folder, title=pipeline_folder.name, subtitle=subtitle, comparison=_comparison(summary), views=views
    )


class Measured(NamedTuple):
    """A metric at its first and its last measurement; `before` is None when there was only one."""

    name: str
    before: float | None
    after: float


class Phase(NamedTuple):
    """What one part of the steps, or between them, took of the run's time."""

    name: str
    seconds: float
    share: float


class Share(NamedTuple):
    """One source of the mixture: what was asked for and what was trained on."""

    name: str
    asked: float | None
    realised: float | None
    amounts: list[float | None]


class Parent(NamedTuple):
    """A model that a run started from, directly (depth 0) or through its parents."""

    depth: int
    role: str
    stage: str
    folder: str
    sha256: str


class ShownFault(NamedTuple):
    """An update that something was wrong with, in words, and the rows of its step."""

    step: int
    noticed: str
    done: str
    rows: str


class Rollouts(NamedTuple):
    """Answers sampled on the way: the names of their rewards, the answers by step, how many steps are not shown."""

    rewards: list[str]
    steps: dict[int, Rows]
    left_out: int


@dataclasses.dataclass(kw_only=True)
class RunView:
    """What the page shows of one run."""

    name: str
    subtitle: str
    headline: list[Measured]
    facts: list[tuple[str, str]]
    phases: list[Phase]
    warnings: list[HealthWarning]
    faults: list[ShownFault]
    charts: list[Markup]
    mixture: list[Share]
    measures: list[str]
    samples: list[dict[str, str | None]]
    rollouts: Rollouts
    commands: list[str]
    unfinished: str
    ancestors: list[Parent]
    lineage: list[tuple[str, Any]]
    config: str


def _view(folder: Path, name: str) -> RunView:
    rows, lineage = read_metrics(folder), _json(folder / "lineage.json")
    config_file = folder / "config.yaml"
    text = config_file.read_text(encoding="utf-8") if config_file.is_file() else ""
    config = yaml.safe_load(text) or {}
    measures, mixture = _mixture(config, lineage, rows)
    known = flatten({key: value for key, value in lineage.items() if key not in ("parents", "seconds")})
    unfinished = f"This run has not finished. Its command with run={config.get('run', name)} goes on where it stopped."
    return RunView(
        name=name,
        subtitle=" · ".join(_subtitle(folder, lineage, rows)),
        headline=_headline(until_step(rows, lineage.get("step"))),
        facts=list(_facts(rows, lineage)),
        phases=_phases(rows),
        warnings=read_warnings(folder),
        faults=list(map(_fault, read_faults(folder))),
        charts=list(_charts(rows)),
        mixture=mixture,
        measures=measures,
        samples=_samples(_json(folder / "samples.json")),
        rollouts=_rollouts(read_samples(folder)),
        commands=_commands(folder, config, lineage) if lineage.get("finished") else [],
        unfinished=unfinished if lineage and not lineage.get("finished") else "",
        ancestors=list(_ancestors(lineage, 0, {str(folder)})),
        lineage=list(known.items()),
        config=text,
    )


def _fault(row: Mapping[str, Any]) -> ShownFault:
    rows = "; ".join(f"{source} {', '.join(map(str, numbers))}" for source, numbers in (row.get("rows") or {}).items())
    return ShownFault(row["step"], row["text"], in_words(row["remedy"], row.get("back_to")), rows)


def _subtitle(folder: Path, lineage: Mapping[str, Any], rows: Rows) -> Iterator[str]:
    if lineage.get("stage"):
        yield str(lineage["stage"])
    yield str(folder)
    if rows:
        yield f"{rows[-1]['step']} steps"
        if lineage.get("step") not in (None, rows[-1]["step"]):
            yield f"model of step {lineage['step']}"


def _series(rows: Rows, name: str) -> list[tuple[float, float]]:
    return [(row["step"], row[name]) for row in rows if name in row]


def _names(rows: Rows, *prefixes: str) -> list[str]:
    """The metrics with one of these prefixes, in the order of the prefixes, then by name."""
    every = sorted({name for row in rows for name in row})
    return [name for prefix in prefixes for name in every if name.startswith(prefix)]


def _headline(rows: Rows) -> list[Measured]:
    """The evaluations, before and after; those that are no loss come first."""
    measured = []
    for name in sorted(_names(rows, "eval/"), key=lambda name: (name.endswith("loss"), name.count("/"), name)):
        values = [value for _, value in _series(rows, name)]
        measured.append(Measured(name.removeprefix("eval/"), values[0] if len(values) > 1 else None, values[-1]))
    return measured


def _facts(rows: Rows, lineage: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    rates = [value for _, value in _series(rows, "perf/tokens_per_second")]
    mfus = [value for _, value in _series(rows, "perf/mfu")]
    tokens = [rows[-1][name] for name in _names(rows[-1:], "data/") if name.endswith("/tokens")]
    if tokens:
        yield "tokens trained on", compact(sum(tokens))
    if rates:
        yield "tokens per second (median)", compact(statistics.median(rates))
    if mfus:
        yield "MFU (median)", f"{100 * statistics.median(mfus):.1f} %"
    memory = [value for _, value in _series(rows, "perf/peak_memory_gib")]
    if memory:
        yield "peak memory of a process", f"{max(memory):.3g} GiB"
    joules = sum(row["perf/watts"] * row["perf/seconds/total"] for row in rows if "perf/watts" in row)
    if joules:
        yield "energy of a GPU", f"{joules / 3.6e6:.3g} kWh"
    if lineage.get("seconds") is not None:
        yield "time", clock(lineage["seconds"])


def _phases(rows: Rows) -> list[Phase]:
    """Where the time of the steps and between them went, the most first; what is in no phase is `other`."""
    sums = {
        name.removeprefix("perf/seconds/"): sum(value for _, value in _series(rows, name))
        for name in _names(rows, "perf/seconds/")
    }
    total = sums.pop("total", 0.0)
    if not total:
        return []
    sums["other"] = max(0.0, total - sum(sums.values()))
    return [
        Phase(name.replace("_", " "), seconds, seconds / total)
        for name, seconds in sorted(sums.items(), key=lambda item: -item[1])
    ]


def _charts(rows: Rows) -> Iterator[Markup]:
    """One chart for every quantity: `train/loss`, `eval/loss` and `eval/SET/loss` are curves of one; so are the seconds
    of phases."""
    charts: dict[str, dict[str, Points]] = {}
    for name in _names(rows, "train/", "eval/", "align/", "perf/"):
        group, *between, quantity = name.split("/")
        title = quantity if group in ("train", "eval") else name
        curve = " ".join([group, *between]) if group in ("train", "eval") else ""
        if name.startswith("perf/seconds/"):
            title, curve = "perf/seconds", quantity
        charts.setdefault(title, {})[curve] = _series(rows, name)
    # the loss first, what describes the machine last
    for title in sorted(charts, key=lambda title: (title != "loss", title.startswith("perf/"))):
        yield line_chart(title, charts[title])


def _mixture(config: Mapping[str, Any], lineage: Mapping[str, Any], rows: Rows) -> tuple[list[str], list[Share]]:
    """The measures counted for each source, and the sources with the share asked for and the realised one."""
    sources = (config.get("data") or {}).get("sources") or {}
    counted = {name: [row[name] for row in rows if name in row][-1] for name in _names(rows, "data/")}
    measures = sorted({name.rsplit("/", 1)[1] for name in counted})
    unit = next((measure for measure in SHARE_MEASURES if measure in measures), "")
    whole = sum(counted.get(f"data/{source}/{unit}", 0.0) for source in sources)
    asked = (lineage.get("mixture") or {}).get("shares") or {}
    return measures, [
        Share(
            name,
            asked.get(name),
            counted.get(f"data/{name}/{unit}", 0.0) / whole if whole else None,
            [counted.get(f"data/{name}/{measure}") for measure in measures],
        )
        for name in sources
    ]


def _samples(saved: Mapping[str, Any]) -> list[dict[str, str | None]]:
    """The answers to each prompt, from `{"before": [{prompt, answer, expected}], "after": [...]}`."""
    samples: dict[str, dict[str, str | None]] = {}
    for when in ("before", "after"):
        for row in saved.get(when) or []:
            sample = samples.setdefault(
                row["prompt"], {"prompt": row["prompt"], "expected": None, "before": None, "after": None}
            )
            sample[when] = row["answer"]
            sample["expected"] = row.get("expected", sample["expected"])
    return list(samples.values())


def _rollouts(samples: Rows) -> Rollouts:
    """The first and the last step are always shown; a single reward is the reward itself."""
    steps: dict[int, Rows] = {}
    for sample in samples:
        steps.setdefault(sample["step"], []).append(sample)
    last = len(steps) - 1
    places = {round(last * place / (SHOWN_STEPS - 1)) for place in range(SHOWN_STEPS)}
    shown = {step: rows for place, (step, rows) in enumerate(steps.items()) if place in places}
    rewards = sorted({name for sample in samples for name in sample if name.startswith("reward/")})
    return Rollouts(rewards if len(rewards) > 1 else [], shown, len(steps) - len(shown))


def _commands(folder: Path, config: Mapping[str, Any], lineage: Mapping[str, Any]) -> list[str]:
    """What one may type next with this run's model."""
    here = shlex.quote(str(folder))
    policy = ((lineage.get("parents") or {}).get("model") or {}).get("folder", "FOLDER")
    commands = {
        "pretrain": [f"llmtrain sft model.init_from={here}"],
        "sft": [f"llmtrain reward model.init_from={here}", f"llmtrain align method=dpo model.init_from={here}"],
        "reward": [f"llmtrain align method=ppo model.init_from={shlex.quote(policy)} reward_model={here}"],
        "align": [],
    }.get(lineage.get("stage", ""), [])
    if config.get("runs_dir", "runs") != "runs":
        commands = [f"{command} runs_dir={shlex.quote(config['runs_dir'])}" for command in commands]
    generate = [] if lineage.get("stage") == "reward" else [f'llmtrain generate model={here} prompt="..."']
    return [*commands, *generate]


def _ancestors(lineage: Mapping[str, Any], depth: int, seen: set[str]) -> Iterator[Parent]:
    """The parents named in a lineage, each followed by its own parents where their folder is still there."""
    for role, parent in (lineage.get("parents") or {}).items():
        folder = str(parent["folder"])
        above = _json(Path(folder) / "lineage.json")
        yield Parent(depth, role, str(above.get("stage", "")), folder, str(parent.get("sha256", "")))
        if folder not in seen:
            yield from _ancestors(above, depth + 1, seen | {folder})


def _comparison(summary: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Stages as columns, metrics as rows; a cell is (before, after)."""
    names: dict[str, None] = {}
    for values in summary.values():
        names |= dict.fromkeys(key for key, value in values.items() if _is_number(value) and key != "seconds")
    rows = [
        {"name": name, "cells": [(values.get("before", {}).get(name), values.get(name)) for values in summary.values()]}
        for name in [*names, "seconds"]
    ]
    return {"stages": list(summary), "rows": rows}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


@functools.cache
def _template() -> jinja2.Template:
    text = importlib.resources.files("llmtrain.engine").joinpath("report.html.jinja").read_text(encoding="utf-8")
    settings: dict[str, Any] = {"autoescape": True, "undefined": jinja2.StrictUndefined}
    return jinja2.Environment(trim_blocks=True, lstrip_blocks=True, **settings).from_string(text)


def _write(folder: Path, **page: Any) -> Path:
    path, aside = folder / "report.html", folder / ".report.html.partial"
    aside.write_text(_template().render(**page).strip() + "\n", encoding="utf-8")
    os.replace(aside, path)
    return path
