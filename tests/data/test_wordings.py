import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llmtrain.config.errors import DataError
from llmtrain.config.schema import RowSourceConfig, TemplateConfig
from llmtrain.data.records import Faults
from llmtrain.data.rows import CONVERSATIONS, PAIRS, read_rows

NLI = [
    TemplateConfig(
        prompt="{{ premise }} Does it follow that {{ hypothesis }}?", completion="{{ ['yes', 'maybe', 'no'][label] }}"
    ),
    TemplateConfig(
        prompt="{{ hypothesis }}: true if {{ premise | lower }}?",
        completion="{% if label == 0 %}true{% else %}false{% endif %}", system="Be brief.",
    ),
]  # fmt: skip


def source(folder: Path, rows: list[Any], templates: list[TemplateConfig]) -> RowSourceConfig:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return RowSourceConfig(path=str(folder / "a.jsonl"), templates=templates, validation_path=str(folder / "a.jsonl"))


def read(folder: Path, rows: list[Any], templates: list[TemplateConfig], faults: Faults | None = None) -> list[Any]:
    return list(read_rows(CONVERSATIONS, source(folder, rows, templates), 2, "train", folder, faults or Faults()))


def test_each_row_is_worded_by_one_of_the_templates(tmp_path: Path) -> None:
    rows = [{"premise": "A", "hypothesis": "B", "label": 0, "messages": "not read"}] * 100
    found = read(tmp_path, rows, NLI)
    said = Counter(tuple(message["content"] for message in row.messages) for row in found)
    assert set(said) == {("A Does it follow that B?", "yes"), ("Be brief.", "B: true if a?", "true")}
    assert all(35 <= count <= 65 for count in said.values())
    assert found == read(tmp_path, rows, NLI)


def test_a_bad_row_does_not_change_the_wording_of_others(tmp_path: Path) -> None:
    rows: list[Any] = [{"premise": "A", "hypothesis": str(n), "label": 1} for n in range(20)]
    whole = read(tmp_path, rows, NLI)
    faults = Faults("skip")
    assert read(tmp_path, [*rows[:5], {"premise": "A"}, *rows[6:]], NLI, faults) == whole[:5] + whole[6:]
    assert faults.counts.total() == 1


def test_pairs_are_worded_too(tmp_path: Path) -> None:
    template = TemplateConfig(prompt="{{ q }}", chosen="{{ good }}", rejected="{{ bad }}", answer="{{ good }}")
    given = source(tmp_path, [{"q": "1+1", "good": 2, "bad": 3}], [template])
    [pair] = read_rows(PAIRS, given, 2, "train", tmp_path, Faults())
    assert (pair.prompt[0]["content"], pair.chosen, pair.rejected, pair.answer) == ("1+1", "2", "3", "2")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ premise }} {{ other }}", r"line 1: templates\.0\.prompt: 'other' is undefined; .*are: premise, label"),
        ("{{ premise / 2 }}", r"line 1: templates\.0\.prompt: TypeError"),
        ("{{ premise.__class__.__mro__ }}", r"line 1: templates\.0\.prompt: .*unsafe"),
        ("\n{{ premise", r"templates\.0\.prompt is no valid Jinja: line 2"),
    ],
)
def test_faults_of_templates_are_named(tmp_path: Path, template: str, message: str) -> None:
    templates = [TemplateConfig(prompt=template, completion="x")]
    with pytest.raises(DataError, match=message):
        read(tmp_path, [{"premise": "A", "label": 0}], templates)


def test_optional_fields_can_be_asked_for(tmp_path: Path) -> None:
    templates = [TemplateConfig(prompt="{% if hint is defined %}{{ hint }} {% endif %}{{ q }}", completion="x")]
    found = read(tmp_path, [{"q": "a"}, {"q": "b", "hint": "c"}], templates)
    assert [row.messages[0]["content"] for row in found] == ["a", "c b"]
