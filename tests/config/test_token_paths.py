"""Token files in a config: which paths name them, and what does not go with them."""

from pathlib import Path

import pytest

from llmtrain.config.compose import load_config
from llmtrain.config.errors import ConfigError
from llmtrain.config.token_paths import file_kinds, names_token_files

FILES = ["data=files", "data.sources.files.path=tokens.bin"]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name in (
        "tokens.bin", "prefix.idx", "prefix.bin", "text.jsonl", "packed.bin.gz", "bins/a.bin", "bins/meta.pkl",
        "both/a.npy", "both/README.md", "texts/a.json.gz", "tokenizer.json",
    ):  # fmt: skip
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(b"0")


@pytest.mark.parametrize(
    "path", ["tokens.bin", "prefix", "prefix.idx", "bins", "b*/*.bin", "not/here.npy", "s3://b/a.bin"]
)
def test_token_files(path: str) -> None:
    assert names_token_files(path)


@pytest.mark.parametrize("path", ["text.jsonl", "both", "texts", "*", "owner/name", "embedded:prose", "tokens"])
def test_no_token_files(path: str) -> None:
    assert not names_token_files(path)
    assert (file_kinds(path) == {"text", "tokens"}) == (path in ("both", "*"))


def test_a_tokenizer_is_all_that_is_needed() -> None:
    config = load_config("pretrain", [*FILES, "tokenizer.path=tokenizer.json", "data.sources.files.token_dtype=uint32"])
    assert config.data.sources["files"].token_dtype == "uint32"
    load_config("prepare", ["data=files", "data.sources.files.path=prefix", "tokenizer.path=tokenizer.json"])


@pytest.mark.parametrize(
    ("command", "overrides", "said"),
    [
        ("pretrain", [], "tokenizer.path: needs a value: token files hold the ids of a tokenizer"),
        ("prepare", [], "tokenizer.path: needs a value: token files hold the ids of a tokenizer"),
        (
            "pretrain",
            ["data.sources.files.text_column=body"],
            "text_column: has no effect: token files are read",
        ),
        (
            "pretrain",
            ["data.sources.files.max_documents=5"],
            "max_documents: has no effect: token files are read",
        ),
        ("pretrain", ["data.sources.files.cleaning.c4=true"], "cleaning: has no effect: token files are read"),
        ("pretrain", ["data.cleaning.c4=true"], "data.cleaning.c4: has no effect: all sources are token files"),
        ("pretrain", ["data.on_error=skip"], "data.on_error: has no effect: all sources are token files"),
        ("pretrain", ["data.sources.files.validation_path=text.jsonl"], "both paths of a source name the same kind"),
        (
            "pretrain",
            ["data.sources.files.token_dtype=int8"],
            "'int8' is not allowed; it takes uint16, uint32 or int32",
        ),
        ("pretrain", ["data.sources.files.path=missing.bin"], "path: no such file: missing.bin"),
        (
            "pretrain",
            ["data.sources.files.path=both"],
            "both holds text and token files: name one kind, as in",
        ),
        ("pretrain", ["data.sources.files.path=packed.bin.gz"], "token files are memory-mapped: unpack them"),
        ("pretrain", ["data.sources.files.path=s3://b/a.npy"], "token files are memory-mapped: unpack them"),
        (
            "pretrain",
            ["data.sources.files.path=text.jsonl", "data.sources.files.token_dtype=uint16"],
            "token_dtype: has no effect: the path names no token files",
        ),
    ],
)
def test_what_does_not_go_with_them(command: str, overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(command, [*FILES, *overrides])
    assert said in str(caught.value)


def test_text_beside_them_may_be_cleaned() -> None:
    more = ["data.sources.text.path=text.jsonl", "data.cleaning.c4=true", "data.on_error=skip"]
    assert load_config("pretrain", [*FILES, *more, "tokenizer.path=tokenizer.json"]).data.cleaning.c4
