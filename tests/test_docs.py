"""What the documents point at is there."""

import re
from pathlib import Path

from llmtrain.config import schema
from llmtrain.config.fields import entries

ROOT = Path(__file__).parents[1]


def test_the_tests_named_in_the_table_of_details_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "rlhf_details.md").read_text(encoding="utf-8")))
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 15
    assert sorted(name for name in named if f"def {name}(" not in code) == []


def test_the_keys_named_in_the_table_of_details_exist() -> None:
    keys = {".".join(entry.path) for entry in entries(schema.AlignConfig)}
    keys |= {key.removeprefix("method.") for key in keys if key.startswith("method.")}
    rows = [line.split("|") for line in (ROOT / "docs" / "rlhf_details.md").read_text(encoding="utf-8").splitlines()]
    here = " ".join(row[3] for row in rows if len(row) == 6)
    named = set(re.findall(r"`([a-z_.]+)`", here))
    assert len(named) > 15
    assert sorted(named - keys - {"llmtrain reward"}) == []
