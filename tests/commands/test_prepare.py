from pathlib import Path

import pytest

from llmtrain.commands import prepare
from llmtrain.data.shards import Manifest, PreparedSource, PreparedTokens, SplitSummary


def test_no_figure_is_cut_off(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    train = SplitSummary(98_765_432, 123_456_789_012, 45_678_901_234, "")
    held_out = SplitSummary(1_234_567, 1, 2, "")
    manifest = Manifest("web/", "", {}, 100_000_000, 1_234_567, {}, {}, train, held_out, ())
    folder = Path("runs/cache/tokens-0123456789abcdef")
    source = PreparedSource(*(PreparedTokens(folder, manifest, split) for split in ("train", "validation")))
    monkeypatch.setenv("COLUMNS", "60")
    prepare.show({"a_source_with_a_long_name": source})
    printed = capsys.readouterr().out
    for said in ("100,000,000", "98,765,432", "123,456.8", "45,678,901,234", "2.70", "a_source_with_a_long_name"):
        assert f" {said} " in printed
    assert printed.endswith("a_source_with_a_long_name: runs/cache/tokens-0123456789abcdef\n")
