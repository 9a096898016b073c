import json
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from llmtrain.commands import rows, show
from llmtrain.config.schema import ModelConfig, ShowConfig
from llmtrain.data.conversations import encode_conversation
from llmtrain.data.tokenizers import Tokenizer, train_tokenizer
from llmtrain.models.formats import save_model
from llmtrain.models.heads import LanguageModel


@pytest.fixture
def tokenizer() -> Tokenizer:
    return train_tokenizer(["What is it? It is this, and also that."] * 5, 300)


@pytest.fixture
def model(tokenizer: Tokenizer, tmp_path: Path) -> str:
    config = ModelConfig(num_layers=1, hidden_size=16, num_heads=2, max_sequence_length=128)
    folder = tmp_path / "model"
    save_model(folder, LanguageModel(config, tokenizer.vocab_size))
    tokenizer.save(folder)
    return str(folder)


def shown(capsys: pytest.CaptureFixture[str], stage: str, *overrides: str) -> str:
    show.run(ShowConfig(stage=stage, rows=2, overrides=list(overrides)))  # type: ignore[arg-type]
    return capsys.readouterr().out


def rows_file(tmp_path: Path) -> str:
    row = {"prompt": "What is it?", "completion": "It is this.", "chosen": "It is this.", "rejected": "It is that."}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 8)
    return str(tmp_path / "rows.jsonl")


def only(path: str) -> tuple[str, str]:
    return "data=files", f"data.sources.files.path={path}"


def test_pretraining_shows_mixture_and_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("This is the text of the one source.\n" * 200)
    out = shown(
        capsys, "pretrain", f"runs_dir={tmp_path}/runs", *only(f"{tmp_path}/a.txt"),
        "tokenizer.vocab_size=300", "train.steps=4", "train.sequence_length=32", "train.batch_tokens=64",
    )  # fmt: skip
    assert "100.00%" in out
    assert "256" in out  # 4 steps of 64 tokens
    assert "row 1: files, row" in out
    assert "the one source" in out


def test_packed_conversations_are_shown_row_by_row(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shown(
        capsys, "sft", f"runs_dir={tmp_path}/runs", f"model.init_from={model}", *only(rows_file(tmp_path)),
        "data.packing=true", "data.validation_every=8",
    )  # fmt: skip
    assert "row 0: files, conversation 0" in out
    assert "row 0: files, conversation 1" in out
    assert out.count("<|user|>What is it?<|assistant|>«It is this.<|end|>»") > 2


def test_conversations_show_what_is_learned(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "sft", f"runs_dir={tmp_path}/runs", f"model.init_from={model}", *only(rows_file(tmp_path)))
    assert out.count("<|user|>What is it?<|assistant|>«It is this.<|end|>»") == 2


def test_rankings_show_all_answers(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"prompt": "What is it?", "answers": ["this", "that", "also"], "scores": [2, 0, 1]}
    (tmp_path / "ranked.jsonl").write_text((json.dumps(row) + "\n") * 4)
    where = (f"model.init_from={model}", f"runs_dir={tmp_path}/runs", *only(f"{tmp_path}/ranked.jsonl"))
    out = shown(capsys, "reward", *where)
    assert "files, answer 1, better than 2, 3, " in out
    assert re.search(r"files, answer 2, \d+ tokens", out)  # better than none
    assert "files, answer 3, better than 2, " in out
    apart = shown(capsys, "reward", *where, "objective.rankings=pairs")
    assert "files, chosen, " in apart
    assert "better than" not in apart


@pytest.mark.parametrize("stage", ["reward", "align"])
def test_pairs_show_both_sides(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str], stage: str) -> None:
    method = ["method=dpo"] if stage == "align" else []
    rows = only(rows_file(tmp_path))
    out = shown(capsys, stage, f"runs_dir={tmp_path}/runs", f"model.init_from={model}", *rows, *method)
    assert "chosen, " in out
    assert "«It is this.<|end|>»" in out
    assert "«It is that.<|end|>»" in out


def test_judged_answers_say_whether_they_are_good(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(rows_file(tmp_path))
    path.write_text(path.read_text() + path.read_text().replace("What is it?", "And this?"))
    rows = only(str(path))
    out = shown(capsys, "align", f"runs_dir={tmp_path}/runs", f"model.init_from={model}", *rows, "method=kto")
    assert "good answer, " in out or "bad answer, " in out
    assert "«It is this.<|end|>»" in out or "«It is that.<|end|>»" in out


def test_on_a_terminal_colour_says_what_is_learned(tokenizer: Tokenizer) -> None:
    talk = [{"role": "user", "content": "[bold]"}, {"role": "assistant", "content": "this"}]
    ids, mask = encode_conversation(tokenizer, talk)
    text = rows.learned_text(tokenizer, np.array(ids), np.array(mask), marks=False)
    assert text.plain == "<|user|>[bold]<|assistant|>this<|end|>"
    [span] = [span for span in text.spans if span.style == rows.LEARNED]
    assert text.plain[span.start : span.end] == "this<|end|>"
    console = Console(force_terminal=True, color_system="standard", width=200)
    with console.capture() as captured:
        console.print(text)
    assert "\x1b[32mthis" in captured.get()


def pretraining(tmp_path: Path, *overrides: str) -> tuple[str, ...]:
    (tmp_path / "a.txt").write_text("This is the text of the one source, and all that it says.\n" * 200)
    return (
        f"runs_dir={tmp_path}/runs", *only(f"{tmp_path}/a.txt"), "tokenizer.vocab_size=420", "train.steps=4",
        "train.sequence_length=32", "train.batch_tokens=64", *overrides,
    )  # fmt: skip


def test_masked_rows_are_shown_as_read_and_as_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("model=bert_tiny", "objective=masked", "objective.mask_rate=0.3")
    out = shown(capsys, "pretrain", *pretraining(tmp_path, *options))
    title = r"row 0: files, row \d+, as (read|written), 32 tokens, (\d+) of them learned\n"
    read, written = re.findall(title + r"(.*?)\n\n", out, re.DOTALL)[:2]
    assert (read[0], written[0]) == ("read", "written")
    assert "<|mask|>" in read[2]
    assert "<|mask|>" not in written[2]
    assert read[1] == written[1]


def test_taken_out_spans_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, "pretrain", *pretraining(tmp_path, "model=t5_tiny"))
    assert re.search(r"row 0: files, row \d+, inputs, 32 tokens, 0 of them learned", out)
    assert re.search(r"row 0: files, row \d+, targets, 8 tokens, 8 of them learned\n«<extra_id_0>", out)
