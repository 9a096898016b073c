"""llmtrain generate: the text alone on standard output, from runs, checkpoints and standard input."""

import io
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.tiny import COMMANDS, ENVIRONMENT, start, tiny_model

from llmtrain import cli
from llmtrain.data.conversations import encode_prompt
from llmtrain.data.tokenizers import load_tokenizer
from llmtrain.generation.sampler import generate
from llmtrain.models.formats import load_language_model, save_model
from llmtrain.models.heads import make_model
from llmtrain.stages.assembly import token_ids

Answer = Callable[..., str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pretrained run; its learning rate is high, so that other weights give other text."""
    folder: Path = tmp_path_factory.mktemp("runs")
    fast = ["train.steps=20", "optimizer.lr=0.02", "schedule.warmup_steps=0"]
    assert cli.main([*COMMANDS["pretrain"], *fast, "checkpoint.every_steps=10", f"runs_dir={folder}"]) == 0
    return folder / "pretrain"


@pytest.fixture
def answer(run: Path, capsys: pytest.CaptureFixture[str]) -> Answer:
    """What `llmtrain generate` prints, with some overrides."""

    def ask(*overrides: str, model: Path = run) -> str:
        assert cli.main(["generate", f"model={model}", "max_new_tokens=12", *overrides]) == 0
        return capsys.readouterr().out

    return ask


def test_the_text_alone(answer: Answer, run: Path) -> None:
    tokenizer, model = load_tokenizer(run / "model"), load_language_model(run / "model")
    ids = generate(
        model, [tokenizer.encode("12 +")], max_new_tokens=12, stop_tokens=set(tokenizer.stop_ids), temperature=0
    )
    assert answer("prompt=12 +", "temperature=0") == tokenizer.decode(ids[0]) + "\n"


def test_as_in_a_conversation(answer: Answer, run: Path) -> None:
    tokenizer, model = load_tokenizer(run / "model"), load_language_model(run / "model")
    prompt = encode_prompt(tokenizer, [{"role": "user", "content": "12 +"}])
    ids = generate(model, [prompt], max_new_tokens=12, stop_tokens=set(tokenizer.stop_ids), temperature=0)
    assert answer("prompt=12 +", "temperature=0", "chat=true") == tokenizer.decode(ids[0]) + "\n"


def test_prompt_from_standard_input(answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("12 +\n"))
    assert answer("prompt=-", "temperature=0") == answer("prompt=12 +", "temperature=0")


def test_samples_follow_from_the_seed(answer: Answer) -> None:
    options = ("prompt=The", "temperature=1.5", "top_k=50", "top_p=0.95", "samples=3")
    first = answer(*options, "seed=1")
    assert first == answer(*options, "seed=1")
    assert first != answer(*options, "seed=2")
    assert first.startswith(answer(*options[:-1], "seed=1"))  # a sample does not depend on those beside it


def test_folders_of_one_model(answer: Answer, run: Path) -> None:
    last, earlier = run / "checkpoints" / "step-00000020", run / "checkpoints" / "step-00000010"
    options = ("prompt=The", "temperature=1", "max_new_tokens=30")
    assert answer(*options) == answer(*options, model=run / "model") == answer(*options, model=last)
    assert answer(*options) != answer(*options, model=earlier)


def test_the_newest_run_is_taken_and_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", f"runs_dir={run.parent}", "max_new_tokens=1"]) == 0
    assert str(run) in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_an_interrupt_is_quiet(run: Path) -> None:
    process = start(["generate", f"model={run}", "prompt=-"], stdin=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write("x" * 1_000_000)  # more than a pipe holds: this returns when the command reads
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert (process.returncode, output, errors) == (130, "", "interrupted\n")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX pipe")
def test_a_reader_that_leaves_is_no_error(run: Path) -> None:
    command = f"{sys.executable} -m llmtrain generate model={run} prompt=The max_new_tokens=2 | true"
    result = subprocess.run(command, shell=True, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert result.stderr == ""


def folder_of(name: str, run: Path, folder: Path) -> Path:
    """A random model of a shipped architecture with the run's tokenizer."""
    tokenizer = load_tokenizer(run / "model")
    model = make_model(tiny_model(name), tokenizer.vocab_size).initialise(torch.Generator().manual_seed(0))
    save_model(folder, model, extra_config=token_ids(tokenizer))
    tokenizer.save(folder)
    return folder


def test_a_source_is_read_and_answered(answer: Answer, run: Path, tmp_path: Path) -> None:
    """It ends with the end token, and special tokens' names in it mean these tokens."""
    folder, tokenizer = folder_of("t5_tiny", run, tmp_path), load_tokenizer(run / "model")
    name = next(token for token in tokenizer.special_tokens.values() if token)
    [[special]] = tokenizer.encode_rendered([name])
    source = [*tokenizer.encode("12 +"), special, tokenizer.eos_id]
    ids = generate(
        load_language_model(folder), [source], max_new_tokens=12, stop_tokens=set(tokenizer.stop_ids), temperature=0,
        start_token=tokenizer.pad_id,
    )  # fmt: skip
    assert answer(f"prompt=12 +{name}", "temperature=0", model=folder) == tokenizer.decode(ids[0]) + "\n"


def test_an_encoder_is_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of("bert_tiny", run, tmp_path)
    assert cli.main(["generate", f"model={folder}", "prompt=12 +"]) == 1
    assert "the model is an encoder: it reads text and fills in what is masked" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["reward", "align"])
def test_stages_that_train_decoders_say_so(
    stage: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    folder = folder_of("t5_tiny", run, tmp_path / "model")
    name = "dpo" if stage == "align" else stage
    where = [f"model.init_from={folder}", f"runs_dir={tmp_path / 'runs'}", "train.steps=1", "schedule.warmup_steps=0"]
    assert cli.main([*COMMANDS[name], *where]) == 2
    assert f"holds an encoder-decoder, and {stage} trains decoders" in capsys.readouterr().err
