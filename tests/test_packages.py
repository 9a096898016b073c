"""What a wheel holds: an editable install would not notice a package that pyproject.toml leaves out."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_package_is_in_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    sources = sorted((ROOT / "src").glob("llmtrain/**/__init__.py"))
    found = [".".join(each.parent.relative_to(ROOT / "src").parts) for each in sources]
    assert sorted(listed) == sorted([*found, "llmtrain.configs"])
