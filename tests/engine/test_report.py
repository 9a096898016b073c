import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llmtrain.engine.charts import MAX_POINTS, line_chart, thin, ticks
from llmtrain.engine.report import SHOWN_STEPS, write_pipeline_report, write_report

VOID = {"meta", "br", "hr", "img", "input", "link"}
NASTY = "<script>alert(\"1\")</script> & 'x'"


class Page(HTMLParser):
    """A parsed page: fails on tags that are not closed in order; collects tags, attributes and text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.text += " "

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def fill(
    folder: Path, stage: str = "pretrain", parents: dict | None = None, finished: str | None = "2026-01-01"
) -> Path:
    folder.mkdir(parents=True)
    rows = [{"step": 0, "eval/prose/loss": 7.5, "eval/accuracy": 0.0}]
    rows += [
        {
            "step": step, "train/loss": 7 / step, "train/grad_norm": 1.0, "train/learning_rate": 1e-3,
            "perf/tokens_per_second": 12345.0, "perf/mfu": 0.25, "perf/seconds/total": 0.5, "perf/seconds/data": 0.1,
            "perf/seconds/forward_backward": 0.3, "perf/peak_memory_gib": 1.5,
            "data/prose/tokens": 75.0 * step, "data/code/tokens": 25.0 * step,
        }
        for step in range(1, 1001)
    ]  # fmt: skip
    rows[-1] |= {"eval/prose/loss": 2.125, "eval/accuracy": 0.875}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = "{prose: {path: a, weight: 3}, code: {path: b}}"
    (folder / "config.yaml").write_text(
        f"run: {folder.name}\nruns_dir: runs\ndata: {{sources: {sources}}}\n# {NASTY}\n"
    )
    mixture = {"shares": {"prose": 0.75, "code": 0.25}}
    lineage = {
        "mixture": mixture,
        "stage": stage,
        "run": folder.name,
        "parents": parents or {},
        "finished": finished,
        "seconds": 95.0,
    }
    (folder / "lineage.json").write_text(json.dumps(lineage | {"code": {"libraries": {"torch": "2.13.0"}}}))
    samples = {
        "before": [{"prompt": NASTY, "answer": "b<i>ad"}],
        "after": [{"prompt": NASTY, "answer": "7", "expected": "seven"}],
    }
    (folder / "samples.json").write_text(json.dumps(samples))
    return folder


def test_report_tells_what_the_folder_holds(tmp_path: Path) -> None:
    path = write_report(fill(tmp_path / "pretrain"))
    assert path == tmp_path / "pretrain" / "report.html"
    text = re.sub(r"\s+", " ", Page(path).text)
    for expected in (
        "accuracy 0 → 0.875",  # headline, before and after
        "prose/loss 7.5 → 2.125",
        "tokens trained on 100k",
        "tokens per second (median) 12.3k",
        "MFU (median) 25.0 %",
        "time 1:35",
        "prose 75.00 % 75.00 % 75,000",  # share asked for, share realised, tokens
        "code 25.00 % 25.00 % 25,000",
        "expected seven",
        "llmtrain sft model.init_from=",
        "code.libraries.torch 2.13.0",
    ):
        assert expected in text


def test_report_needs_nothing_from_outside_and_runs_nothing(tmp_path: Path) -> None:
    page = Page(write_report(fill(tmp_path / "x")))
    assert not {"script", "link", "img", "iframe", "image", "use"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "srcset", "onload", "onclick")]
    assert "http" not in page.source.replace("http-equiv", "")
    assert "url(" not in page.source
    assert "@import" not in page.source


def test_everything_from_the_run_is_escaped(tmp_path: Path) -> None:
    page = Page(write_report(fill(tmp_path / "a<b>")))
    assert "<script" not in page.source
    assert NASTY in page.text
    assert "b<i>ad" in page.text
    assert page.tags.count("i") == page.source.count('<i style="')


def test_the_time_is_told_by_phase(tmp_path: Path) -> None:
    page = Page(write_report(fill(tmp_path / "x")))
    cells = re.findall(
        r"<tr><td>([a-z ]+)</td><td class=\"n\">([\d.]+)</td><td class=\"n\">([\d.]+) %</td></tr>", page.source
    )
    assert cells == [("forward backward", "300.0", "60.0"), ("data", "100.0", "20.0"), ("other", "100.0", "20.0")]
    assert "1.5 GiB" in page.text


def test_curves_of_one_quantity_share_a_chart(tmp_path: Path) -> None:
    page = Page(write_report(fill(tmp_path / "x")))
    titles = re.findall(r"<figcaption><b>(.*?)</b>", page.source)
    assert titles == [
        "loss", "grad_norm", "learning_rate", "accuracy", "perf/mfu",
        "perf/peak_memory_gib", "perf/seconds", "perf/tokens_per_second",
    ]  # fmt: skip
    legend = page.source.split("<figcaption><b>loss</b>")[1].split("</figcaption>")[0]
    assert "train <b>0.007</b>" in legend
    assert "eval prose <b>2.125</b>" in legend


@pytest.mark.parametrize("missing", ["metrics.jsonl", "config.yaml", "lineage.json", "samples.json"])
def test_missing_parts_are_left_out(tmp_path: Path, missing: str) -> None:
    folder = fill(tmp_path / "x")
    (folder / missing).unlink()
    headings = {
        "metrics.jsonl": "Curves",
        "config.yaml": "Config",
        "lineage.json": "Lineage",
        "samples.json": "Samples before and after",
    }
    text = Page(write_report(folder)).text
    assert [heading for heading in headings.values() if heading not in text] == [headings[missing]]


def rollout(step: int, row: int, **values: object) -> dict[str, object]:
    return {
        "step": step, "row": row, "prompt": NASTY, "answer": f"answer {step}/{row}", "expected": "42", "reward": 0.25,
        "reward/length": -0.5, "reward/rule": 0.75, "tokens": 7, "finished": True, "kl": None,
    } | values  # fmt: skip


def write_rollouts(folder: Path, rows: list[dict[str, object]]) -> Path:
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write_report(folder)


def test_sampled_answers_are_shown_in_the_order_of_steps(tmp_path: Path) -> None:
    folder = fill(tmp_path / "x")
    assert "Answers sampled" not in Page(write_report(folder)).text
    rows = [rollout(1, 0), rollout(1, 4, kl=1.5), rollout(10, 0, finished=False, expected=None)]
    page = Page(write_rollouts(folder, rows))
    text = re.sub(r"\s+", " ", page.text)
    assert "step prompt answer reward length rule tokens finished KL" in text
    # the prompt's own space at the end is one
    assert f"1 {NASTY}expected: 42 answer 1/0 0.25 -0.5 0.75 7 yes {NASTY}expected: 42 answer 1/4" in text
    assert "7 yes 1.5" in text
    assert f"10 {NASTY} answer 10/0 0.25 -0.5 0.75 7 cut off" in text
    assert "more steps" not in text
    assert "<script" not in page.source


def test_of_many_steps_with_answers_some_are_shown_the_first_and_the_last_among_them(tmp_path: Path) -> None:
    text = Page(write_rollouts(fill(tmp_path / "x"), [rollout(step, 0) for step in range(1, 101)])).text
    shown = [int(step) for step in re.findall(r"answer (\d+)/0", text)]
    assert len(shown) == SHOWN_STEPS
    assert (shown[0], shown[-1]) == (1, 100)
    assert shown == sorted(set(shown))
    assert f"{100 - SHOWN_STEPS} more steps" in text


def test_a_single_reward_is_shown_once(tmp_path: Path) -> None:
    row = rollout(1, 0)
    del row["reward/length"]
    text = re.sub(r"\s+", " ", Page(write_rollouts(fill(tmp_path / "x"), [row])).text)
    assert "answer reward tokens" in text


def test_steps_that_went_wrong_are_shown_with_their_rows(tmp_path: Path) -> None:
    folder = fill(tmp_path / "x")
    assert "Steps that went wrong" not in Page(write_report(folder)).text
    row = {"kind": "spike", "remedy": "rollback", "text": f"train/loss jumped {NASTY}", "back_to": 16}
    (folder / "faults.jsonl").write_text(json.dumps({"step": 21} | row | {"rows": {"b": [3, 1]}}) + "\n")
    page = Page(write_report(folder))
    said = "went back to the checkpoint of step 16; the rows since then are left out."
    assert f"21 train/loss jumped {NASTY} {said} b 3, 1" in re.sub(r"\s+", " ", page.text)
    assert "<script" not in page.source


def test_warnings_are_shown_in_words(tmp_path: Path) -> None:
    folder = fill(tmp_path / "x")
    assert "Warnings" not in Page(write_report(folder)).text
    row = {"step": 40, "rule": "kl", "text": f"far from its reference {NASTY}"}
    (folder / "warnings.jsonl").write_text(json.dumps(row) + "\n")
    page = Page(write_report(folder))
    assert f"40 health.kl far from its reference {NASTY}" in re.sub(r"\s+", " ", page.text)
    assert "<script" not in page.source


def test_a_model_that_is_not_the_last_one_is_shown_with_its_own_numbers(tmp_path: Path) -> None:
    folder = fill(tmp_path / "x")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows[600] |= {"eval/accuracy": 0.9}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lineage = json.loads((folder / "lineage.json").read_text())
    (folder / "lineage.json").write_text(json.dumps(lineage | {"step": 600}))
    text = re.sub(r"\s+", " ", Page(write_report(folder)).text)
    assert "accuracy 0 → 0.9 " in text
    assert "1000 steps · model of step 600" in text
    (folder / "lineage.json").write_text(json.dumps(lineage | {"step": 1000}))
    text = re.sub(r"\s+", " ", Page(write_report(folder)).text)
    assert "accuracy 0 → 0.875 " in text
    assert "model of step" not in text


def test_an_empty_folder_still_gets_a_page(tmp_path: Path) -> None:
    assert Page(write_report(tmp_path)).text.strip().startswith(tmp_path.name)


def test_commands_and_parents_follow_the_road(tmp_path: Path) -> None:
    base = fill(tmp_path / "pretrain")
    sft = fill(tmp_path / "sft", "sft", {"model": {"folder": str(base), "sha256": "11ff"}})
    reward = fill(tmp_path / "my reward", "reward", {"model": {"folder": str(sft), "sha256": "22ee"}})
    text = Page(write_report(reward)).text
    assert f"llmtrain align method=ppo model.init_from={sft} reward_model='{reward}'" in text
    assert "llmtrain generate" not in text
    assert "11ff" in text  # the grandparent
    assert "22ee" in text
    assert f"llmtrain reward model.init_from={sft}\n" in Page(write_report(sft)).text


def test_a_run_that_is_its_own_parent_does_not_hang(tmp_path: Path) -> None:
    folder = tmp_path / "sft"
    assert "ab12" in Page(write_report(fill(folder, "sft", {"model": {"folder": str(folder), "sha256": "ab12"}}))).text


def test_an_unfinished_run_says_how_to_go_on(tmp_path: Path) -> None:
    text = Page(write_report(fill(tmp_path / "night", finished=None))).text
    assert "has not finished" in text
    assert "run=night" in text
    assert "How to continue" not in text


def test_pipeline_report_puts_stages_side_by_side(tmp_path: Path) -> None:
    fill(tmp_path / "pretrain")
    fill(tmp_path / "sft", "sft")
    summary = {
        "pretrain": {"loss": 2.5, "before": {"loss": 7.5}, "seconds": 10.0},
        "sft": {"loss": 1.5, "accuracy": 0.75, "before": {"loss": 2.5, "accuracy": 0.25}, "seconds": 20.0},
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    page = Page(write_pipeline_report(tmp_path))
    text = re.sub(r"\s+", " ", page.text)
    assert "before → after pretrain sft loss 7.5 → 2.5 2.5 → 1.5 accuracy 0.25 → 0.75 seconds 10 20" in text
    assert ("href", "#sft") in page.attributes
    assert ("id", "sft") in page.attributes
    assert text.count("Curves") == 2


def test_chart_leaves_out_what_is_not_finite() -> None:
    chart = line_chart("loss", {"train": [(1, 2.0), (2, math.nan), (3, math.inf), (4, 1.0)], "eval": [(4, math.nan)]})
    assert re.findall(r"polyline points=\"(.*?)\"", chart)[0].count(" ") == 1
    assert "eval" not in chart
    assert "nan" not in chart
    assert line_chart("loss", {"train": []}) == ""


def test_chart_spans_its_values() -> None:
    chart = line_chart("loss", {"train": [(0, 1.0), (10, 3.0)]})
    (first, last) = re.findall(r"polyline points=\"(.*?)\"", chart)[0].split()
    assert float(first.split(",")[0]) < float(last.split(",")[0])
    assert float(first.split(",")[1]) > float(last.split(",")[1])  # SVG counts downwards
    assert line_chart("flat", {"x": [(0, 0.0), (1, 0.0)]}).count("polyline") == 1
    assert line_chart("one", {"x": [(3, 5.0)]}).count("circle") == 1


def test_thin_keeps_the_mean_and_the_last_point() -> None:
    points = [(float(step), float(step % 2)) for step in range(2001)]
    few = thin(points)
    assert len(few) <= MAX_POINTS
    assert few[-1] == points[-1]
    assert all(0.3 < value < 0.7 for _, value in few[:-1])
    assert thin(points[:10]) == points[:10]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 400, [0, 100, 200, 300, 400]),
        (1.9, 7.3, [2, 4, 6]),
        (0, 3e-4, [0, 1e-4, 2e-4, 3e-4]),
        (-1.0, 1.0, [-1, -0.5, 0, 0.5, 1]),
        (5, 5, [5]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)
