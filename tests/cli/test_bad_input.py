"""What is wrong with a command, its data or its folders is told in a short message, and nothing is left half done."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tests.tiny import COMMANDS

from llmtrain import cli

SHORT = ["train.steps=1", "schedule.warmup_steps=0"]
PRETRAIN = [*COMMANDS["pretrain"], *SHORT]
FILES = ["pretrain", "data=files", *SHORT, "train.batch_tokens=64", "train.sequence_length=8", "eval.max_rows=4",
         "model.num_layers=1", "model.hidden_size=16", "model.num_heads=2", "tokenizer.train_bytes=1000",
         "tokenizer.vocab_size=300"]  # fmt: skip
ROWS = ["data=files", *SHORT, "train.batch_rows=4", "train.sequence_length=64"]
SFT, REWARD = ["sft", *ROWS, "model.init_from=runs/pretrain"], ["reward", *ROWS, "model.init_from=runs/pretrain"]
FILE = "data.sources.files.path"
TEXTS = [{"text": f"a text with the number {number}"} for number in range(30)]
PAIRS = [{"prompt": f"{number}?", "chosen": "yes", "rejected": "no"} for number in range(30)]
PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
CHATS = [{"prompt": f"{number}?", "completion": "yes"} for number in range(30)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with finished runs `pretrain` and `reward`, damaged copies of them, and faulty data."""
    root: Path = tmp_path_factory.mktemp("place")
    make_runs(root / "runs")
    make_data(root)
    damage(root)
    return root


def make_runs(folder: Path) -> None:
    assert cli.main([*PRETRAIN, f"runs_dir={folder}"]) == 0
    assert cli.main([*COMMANDS["reward"], *SHORT, f"runs_dir={folder}"]) == 0


def make_data(root: Path) -> None:
    write(root / "texts.jsonl", TEXTS)
    write(root / "pairs.jsonl", PAIRS)
    write(root / "bodies.jsonl", [{"body": "a text"}] * 30)
    write(root / "no_chosen.jsonl", [{"prompt": "?", "rejected": "no"}] * 30)
    write(root / "empty.jsonl", [])
    write(root / "broken.jsonl", TEXTS, line_17='{"text": "the rest is miss')
    write(root / "null.jsonl", TEXTS, line_17='{"text": null}')
    write(root / "list.jsonl", TEXTS, line_17='["text"]')
    write(root / "pairs_17.jsonl", PAIRS, line_17='{"prompt": "?", "rejected": "no"}')
    write(root / "chats.jsonl", CHATS)
    write(root / "chats_17.jsonl", CHATS, line_17='{"messages": [{"role": "user", "content": "?"}]}')
    (root / "latin.jsonl").write_bytes('{"text": "é"}\n'.encode("latin-1"))
    (root / "table.parquet").write_bytes(b"no table")
    (root / "cut.jsonl.gz").write_bytes(b"\x1f\x8b\x08")
    (root / "table.xyz").write_text("what is this?")
    (root / "nothing").mkdir()
    (root / "template.jinja").write_text("{% for message %}")
    (root / "plain.jinja").write_text(PLAIN)


def write(path: Path, rows: list[dict[str, Any]], line_17: str | None = None) -> None:
    lines = [json.dumps(row) for row in rows]
    if line_17 is not None:
        lines[16] = line_17
    path.write_text("\n".join(lines))


def damage(root: Path) -> None:
    """Copies of `runs/pretrain` or its model, with one fault each."""

    def copy(name: str, of: str = "runs/pretrain/model") -> Path:
        return Path(shutil.copytree(root / of, root / name))

    shutil.rmtree(copy("unfinished", "runs/pretrain") / "model")
    (copy("no_weights") / "model.safetensors").unlink()
    pickled = copy("pickled")
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    weights = copy("cut_off") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    (copy("no_tokenizer") / "tokenizer.json").unlink()
    (copy("odd_tokenizer") / "tokenizer.json").write_text("{}")
    (copy("odd_json") / "tokenizer_config.json").write_text("{")
    (copy("odd_lineage", "runs/pretrain") / "lineage.json").write_text("{")
    config = copy("other_family") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "mamba"}))
    config = copy("absurd") / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 10**9}))
    (copy("endless") / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|end|>", "chat_template": "{{ 'a' * 10**10 }}"})
    )
    outside = copy("outside")
    (outside / "model.safetensors").unlink()
    (outside / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../../etc/passwd"}}')
    manifest = copy("traversal", "runs/pretrain/checkpoints/step-00000001") / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"sha256": {"../../../etc/passwd": "0"}}))
    (root / "named").mkdir()
    manifest.parent.rename(root / "named" / "step-00000001")
    with gzip.open(root / "bomb.jsonl.gz", "wb", compresslevel=1) as file:
        file.write(b'{"text": "' + bytes(70_000_000))
    copy("flipped", "runs/pretrain/checkpoints/step-00000001").rename(root / "step-00000001")
    shard = next((root / "step-00000001" / "state").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)


class Case(NamedTuple):
    """A command, its exit code, and what its message says."""

    arguments: list[str]
    code: int
    says: list[str]


# Told from the config and folders alone, before anything is written.
CONFIG = {
    "misspelt key": Case(["pretrain", "trian.steps=1"], 2, ["1 fault", "trian", "did you mean train?"]),
    "misspelt option": Case(["pretrain", "model=lama_tiny"], 2, ["no option lama_tiny; did you mean llama_tiny?"]),
    "wrong type": Case(["pretrain", "train.steps=many"], 2, ["train.steps: 'many'", "a whole number >= 1"]),
    "width and heads": Case(
        ["pretrain", "model.hidden_size=33", "model.num_heads=4"],
        2, ["1 fault", "model.num_heads: 4 does not divide model.hidden_size=33"],
    ),
    "several faults": Case(
        ["pretrain", "trian.steps=1", "train.steps=many", "model.hidden_size=33", "engine.precision=int8"],
        2, ["4 faults", "trian:", "train.steps:", "engine.precision:", "does not divide model.hidden_size=33"],
    ),
    "no reward model": Case(
        ["align", "method=ppo", "model.init_from=runs/pretrain"],
        2, ["reward_model: no finished reward run in", "Run `llmtrain reward` first", "reward_model=FOLDER"],
    ),
    "no parent": Case(["sft"], 2, ["model.init_from: no finished pretrain run in", "Run `llmtrain pretrain` first"]),
    "missing file": Case([*FILES, f"{FILE}=text.jsonl"], 2, [f"{FILE}: no such file: text.jsonl; did you mean"]),
    "missing folder": Case(["sft", "model.init_from=runs/pretrian"], 2, ["did you mean runs/pretrain?"]),
    "a file for a folder": Case(
        ["sft", "model.init_from=runs/pretrain/model/model.safetensors"], 2, ["is a file; name the folder"]
    ),
    "no model folder": Case(["sft", "model.init_from=nothing"], 2, ["nothing is neither a run nor a model folder"]),
    "unfinished run": Case(["sft", "model.init_from=unfinished"], 2, ["unfinished is a run that has not finished"]),
    "reward model as policy": Case(
        ["sft", "model.init_from=runs/reward"], 2, ["model.init_from: runs/reward is a reward model"]
    ),
    "policy as reward model": Case(
        ["align", "method=ppo", "model.init_from=runs/pretrain", "reward_model=runs/pretrain"],
        2, ["reward_model: runs/pretrain is a run of pretrain"],
    ),
    "broken lineage": Case(["sft", "model.init_from=odd_lineage"], 1, ["lineage.json: not valid JSON", "Restore it"]),
    "runs_dir is a file": Case(["pretrain", "runs_dir=texts.jsonl"], 2, ["runs_dir:", "is a file, not a folder"]),
    "no such class": Case(
        [*PRETRAIN, "optimizer._target_=no_such.Thing"], 2, ["optimizer._target_='no_such.Thing': cannot import"]
    ),
    "no such option of a class": Case(
        [*PRETRAIN, "+optimizer.options.momentun=1", "optimizer._target_=torch.optim.SGD"],
        2, ["optimizer.options.momentun: SGD knows no such option; did you mean momentum?"],
    ),
    "no such tracker": Case(
        [*PRETRAIN, "tracker._target_=no_such.Thing"], 2, ["tracker._target_: cannot import no_such.Thing"]
    ),
}  # fmt: skip

# Told when the data or the weights are read.
CONTENT = {
    "broken line": Case([*FILES, f"{FILE}=broken.jsonl"], 2, ["broken.jsonl, line 17: not valid JSON"]),
    "no text": Case([*FILES, f"{FILE}=null.jsonl"], 2, ["null.jsonl, line 17: column 'text' holds None"]),
    "no object": Case([*FILES, f"{FILE}=list.jsonl"], 2, ["list.jsonl, line 17: expected an object"]),
    "no data": Case([*FILES, f"{FILE}=empty.jsonl"], 2, ["empty.jsonl: no documents in there"]),
    "empty folder": Case([*FILES, f"{FILE}=./nothing"], 2, ["nothing: no data files in this folder"]),
    "unknown kind": Case([*FILES, f"{FILE}=./table.xyz"], 2, ["cannot tell what this is", ".jsonl"]),
    "missing column": Case(
        [*FILES, f"{FILE}=bodies.jsonl"], 2, ["line 1: no column 'text'; there are: body", "text_column="]
    ),
    "not UTF-8": Case([*FILES, f"{FILE}=latin.jsonl"], 2, ["latin.jsonl, line 1: not UTF-8"]),
    "no Parquet": Case([*FILES, f"{FILE}=table.parquet"], 2, ["table.parquet: cannot be read as parquet"]),
    "cut off": Case([*FILES, f"{FILE}=cut.jsonl.gz"], 2, ["cut.jsonl.gz: broken or cut off compressed file"]),
    "no chosen": Case([*REWARD, f"{FILE}=no_chosen.jsonl"], 2, ["line 1: these columns are no preference pairs"]),
    "no chosen in a row": Case(
        [*REWARD, f"{FILE}=pairs_17.jsonl"], 2, ["pairs_17.jsonl, line 17: this row has no `chosen`"]
    ),
    "no assistant": Case([*SFT, f"{FILE}=chats_17.jsonl"], 2, ["line 17: nothing", "said by the assistant"]),
    "pairs for sft": Case([*SFT, f"{FILE}=pairs.jsonl"], 2, ["line 1: these columns are no conversations"]),
    "no weights": Case(["sft", "model.init_from=no_weights"], 1, ["no_weights holds no weights"]),
    "pickle": Case(["sft", "model.init_from=pickled"], 1, ["pickled weights only", "safetensors"]),
    "cut off weights": Case(["sft", "model.init_from=cut_off"], 1, ["cannot be read as safetensors"]),
    "other family": Case(["sft", "model.init_from=other_family"], 1, ["model_type 'mamba' is not supported"]),
    "flipped bit": Case(["sft", "model.init_from=step-00000001"], 1, ["does not match its digest"]),
    "no tokenizer": Case(["sft", "model.init_from=no_tokenizer"], 2, ["no_tokenizer: no tokenizer.json there"]),
    "odd tokenizer": Case(["sft", "model.init_from=odd_tokenizer"], 2, ["odd_tokenizer/tokenizer.json: not a tok"]),
    "odd JSON": Case(["sft", "model.init_from=odd_json"], 2, ["odd_json/tokenizer_config.json: not valid JSON"]),
    "tokenizer.path": Case(
        [*FILES[:-2], f"{FILE}=texts.jsonl", "tokenizer.path=no_tokenizer"], 2, ["no_tokenizer: no tokenizer.json"]
    ),
    "chat template": Case(
        [*SFT, f"{FILE}=pairs.jsonl", "tokenizer.chat_template=template.jinja"], 2, ["no valid Jinja: line 1"]
    ),
    "absurd sizes": Case(["sft", "model.init_from=absurd"], 1, ["absurd/config.json", "num_layers: Input should be"]),
    "index that leads out": Case(["sft", "model.init_from=outside"], 1, ["only .safetensors files beside it are read"]),
    "manifest that leads out": Case(["sft", "model.init_from=named/step-00000001"], 1, ["not in its manifest"]),
    "template without end": Case(
        [*SFT[:-1], "model.init_from=endless", f"{FILE}=chats.jsonl"], 2, ["it makes a text or list longer than"]
    ),
    "a line without end": Case([*FILES, f"{FILE}=bomb.jsonl.gz"], 2, ["line 1: longer than 67,108,864 bytes"]),
    "no GPU": Case([*PRETRAIN, "engine.device=cuda"], 2, ["engine.device=cuda", "engine.device=cpu"]),
}

GENERATE = {
    "no run": Case(["generate", "prompt=x"], 2, ["model: no finished run in", "model=FOLDER"]),
    "no folder": Case(["generate", "model=runs/pretrian"], 2, ["did you mean runs/pretrain?"]),
    "reward model": Case(["generate", "model=runs/reward"], 2, ["runs/reward is a reward model"]),
    "pickle": Case(["generate", "model=pickled"], 1, ["pickled weights only"]),
    "flipped bit": Case(["generate", "model=step-00000001"], 1, ["does not match its digest"]),
    "range": Case(["generate", "model=runs/pretrain", "top_p=2"], 2, ["top_p", "2"]),
    "no effect": Case(["generate", "model=runs/pretrain", "temperature=0", "top_k=5"], 2, ["top_k: has no effect"]),
    "too long": Case(
        ["generate", "model=runs/pretrain", f"prompt={'long ' * 99}"], 1, ["leaves no room", "shorten the prompt"]
    ),
}

Refused = Callable[[Case], str]


@pytest.fixture
def refused(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    """Runs a case in `place`, its runs in `tmp_path`; checks code and message, returns the message."""
    monkeypatch.chdir(place)
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def run(case: Case) -> str:
        own = [] if any("runs_dir=" in text for text in case.arguments) else [f"runs_dir={tmp_path}"]
        code = cli.main([case.arguments[0], *own, *case.arguments[1:]])
        output, errors = capsys.readouterr()
        message = errors[errors.index("error: ") :]
        assert code == case.code, message
        assert output == ""
        for words in case.says:
            assert words in message
        assert len(message.splitlines()) <= 10, message
        return message

    return run


@pytest.mark.parametrize("name", CONFIG)
def test_wrong_configs_and_folders(name: str, refused: Refused, tmp_path: Path) -> None:
    refused(CONFIG[name])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", CONTENT)
def test_wrong_data_and_weights(name: str, refused: Refused, tmp_path: Path) -> None:
    if name == "no GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    refused(CONTENT[name])
    left = [path.name for path in tmp_path.rglob("*") if ".partial" in path.name or path.name in ("model", "step-1")]
    assert left == []


@pytest.mark.parametrize("name", GENERATE)
def test_generate(name: str, refused: Refused) -> None:
    refused(GENERATE[name])


def test_another_config_is_refused_with_the_differences(refused: Refused, place: Path) -> None:
    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (place / "runs/pretrain").rglob("*") if path.is_file()}

    before = contents()
    arguments = [*PRETRAIN, "runs_dir=runs", "optimizer.lr=0.5", "train.micro_batch_rows=1"]
    message = refused(Case(arguments, 2, ["runs/pretrain holds a run with another config", "optimizer.lr: ", "-> 0.5"]))
    assert "micro_batch_rows" not in message  # may differ
    assert contents() == before


def test_a_start_that_failed_does_not_hold_the_name(refused: Refused, tmp_path: Path) -> None:
    # the tokenizer is trained on training text alone, so it is there when line 17 is read
    arguments = [*FILES, "run=mine"]
    refused(
        Case([*arguments, f"{FILE}=texts.jsonl", "data.sources.files.validation_path=broken.jsonl"], 2, ["line 17"])
    )
    assert (tmp_path / "mine" / "tokenizer").is_dir()
    arguments += [f"{FILE}=texts.jsonl", "tokenizer.chat_template=plain.jinja", f"runs_dir={tmp_path}"]
    assert cli.main(arguments) == 0
    saved = json.loads((tmp_path / "mine" / "model" / "tokenizer_config.json").read_text())
    assert saved["chat_template"] == PLAIN


def test_a_broken_lineage_elsewhere_is_named_and_passed_over(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(place / "runs" / "pretrain", tmp_path / "pretrain")
    shutil.copytree(place / "odd_lineage", tmp_path / "odd")
    assert cli.main(["generate", f"runs_dir={tmp_path}", "max_new_tokens=1"]) == 0
    errors = capsys.readouterr().err
    assert "passed over: " in errors
    assert f"taking the newest finished run, {tmp_path / 'pretrain'}" in errors


@pytest.mark.parametrize("arguments", [["pretrain"], ["pretrain", "run=texts.jsonl"]])
def test_what_the_machine_refuses_is_a_message(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def execute(command: str, config: Any) -> None:
        raise OSError(28, "No space left on device", "runs/cache/x")

    monkeypatch.setattr(cli, "execute", execute)
    assert cli.main(arguments) == 1
    assert capsys.readouterr().err == "error: runs/cache/x: No space left on device\n"
