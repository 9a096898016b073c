"""Folders written by the command line load in Transformers and answer the same; folders written there train here."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tests.tiny import COMMANDS

from llmtrain import cli
from llmtrain.data.conversations import encode_prompt
from llmtrain.data.tokenizers import load_tokenizer
from llmtrain.engine.tracking import read_metrics
from llmtrain.models.formats import load_language_model, load_scalar_model

transformers = pytest.importorskip("transformers")

# Steps enough to bring weights, biases and norms away from where they start.
SHORT = ["train.steps=4", "optimizer.lr=0.02", "schedule.warmup_steps=0"]
FAMILIES = {
    "gpt2": ["model=gpt2_tiny"],
    "llama": ["model=llama_tiny", "model.num_heads=4", "model.num_kv_heads=2", "model.tied_embeddings=false"],
}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2 + 3?\n"},
    {"role": "assistant", "content": " 5 "},
    {"role": "user", "content": "And <|end|> 4?"},
]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train(command: str, folder: Path, *overrides: str) -> Path:
    """A tiny run of a stage through the command line, named after the stage."""
    assert cli.main([*COMMANDS[command], *SHORT, f"runs_dir={folder}", f"run={command}", *overrides]) == 0
    return folder / command


@pytest.fixture(scope="module", params=FAMILIES)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `pretrain`, `sft` and `reward` of a family."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    pretrained = train("pretrain", folder, *FAMILIES[request.param])
    train("reward", folder, f"model.init_from={pretrained}")
    train("sft", folder, f"model.init_from={pretrained}")
    return folder


def largest_difference(folder: Path) -> float:
    """Between the logits that Transformers and we get for random tokens."""
    ours, theirs = load_language_model(folder).eval(), transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.randint(0, ours.vocab_size, (3, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return float((ours(tokens) - theirs(tokens).logits).abs().max())


def test_logits(runs: Path) -> None:
    for name in ("pretrain", "sft"):
        assert largest_difference(runs / name / "model") < 1e-4


def test_greedy_text(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs / "sft" / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    message = [{"role": "user", "content": "What is 12 + 7?"}]
    inputs = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=40)[0, inputs["input_ids"].shape[1] :]
    arguments = [f"model={runs / 'sft'}", "prompt=What is 12 + 7?", "temperature=0", "max_new_tokens=40"]
    capsys.readouterr()
    assert cli.main(["generate", *arguments]) == 0
    assert capsys.readouterr().out == tokenizer.decode(tokens, skip_special_tokens=True) + "\n"
    assert len(tokens) > 1


def test_chat_template(runs: Path) -> None:
    ours = load_tokenizer(runs / "sft" / "model")
    theirs = transformers.AutoTokenizer.from_pretrained(runs / "sft" / "model")
    assert theirs.apply_chat_template(TALK, tokenize=False) == ours.template.render(TALK).text
    text = theirs.apply_chat_template(TALK, tokenize=False, add_generation_prompt=True)
    assert text == ours.template.render(TALK, add_generation_prompt=True).text
    plain = TALK[:1] + TALK[1:2]
    ids = theirs.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    assert ids == encode_prompt(ours, plain)


def test_reward_model(runs: Path) -> None:
    folder = runs / "reward" / "model"
    ours = load_scalar_model(folder).eval()
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokens = torch.randint(10, ours.vocab_size, (3, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (ours(tokens)[:, -1] - theirs(tokens).logits[:, 0]).abs().max()
    assert theirs.num_labels == 1
    assert float(difference) < 1e-4


def test_going_on_from_a_checkpoint(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = runs / "pretrain" / "checkpoints" / "step-00000004"
    weights = load_language_model(train("sft", tmp_path, f"model.init_from={checkpoint}") / "model").state_dict()
    same = load_language_model(runs / "sft" / "model").state_dict()
    assert all(torch.equal(weights[name], value) for name, value in same.items())
    texts = []
    for folder in (runs / "pretrain", checkpoint):
        capsys.readouterr()
        assert cli.main(["generate", f"model={folder}", "prompt=The", "max_new_tokens=20"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def their_tokenizer(chat_template: str | None) -> Any:
    """As made elsewhere: byte-level BPE without digit splitting, other special tokens, padding on the left."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(["What is the sum of 12 and 30? Answer: 42."] * 20, trainer)
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", padding_side="left"
    )
    made.chat_template = chat_template
    return made


def their_llama(vocab_size: int) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=1, rope_theta=5000.0,
    ))  # fmt: skip


def their_gpt2(vocab_size: int) -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=1
    ))  # fmt: skip


@pytest.mark.parametrize("make", [their_llama, their_gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("chat_template", [CHATML, None], ids=["with its template", "without template"])
def test_folders_of_transformers_train_here(
    make: Callable[[int], Any], chat_template: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, tokenizer = tmp_path / "theirs", their_tokenizer(chat_template)
    # fewer ids than rows of the embedding, as padded vocabularies have it
    make(len(tokenizer) + 12).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert largest_difference(folder) < 1e-4

    trained = train("sft", tmp_path, f"model.init_from={folder}") / "model"
    assert largest_difference(trained) < 1e-4
    loaded = transformers.AutoTokenizer.from_pretrained(trained)
    assert loaded.encode("12 and </s>30", add_special_tokens=False) == tokenizer.encode("12 and </s>30")
    assert (loaded.eos_token, loaded.bos_token) == ("</s>", "<s>")
    if chat_template:
        assert loaded.chat_template == chat_template
    ours = load_tokenizer(trained)
    assert loaded.apply_chat_template(TALK, tokenize=False) == ours.template.render(TALK).text
    capsys.readouterr()
    assert cli.main(["generate", f"model={tmp_path / 'sft'}", "prompt=12?", "max_new_tokens=4"]) == 0
    assert capsys.readouterr().out.endswith("\n")


def test_alignment_is_without_the_dropout_of_its_model(tmp_path: Path) -> None:
    folder, tokenizer = tmp_path / "theirs", their_tokenizer(CHATML)
    make = their_gpt2(len(tokenizer))
    assert make.config.resid_pdrop > 0
    make.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = read_metrics(train("dpo", tmp_path, f"model.init_from={folder}"))
    assert rows[1]["train/margin"] == 0.0  # policy and reference are still the same
    assert rows[1]["train/loss"] == pytest.approx(math.log(2))
