"""Masks of the chat templates that the field uses, against Transformers. The templates are in `chat_templates/`."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llmtrain.config.errors import DataError
from llmtrain.data.conversations import encode_conversation, encode_prompt
from llmtrain.data.tokenizers import Tokenizer

FOLDER = Path(__file__).parent / "chat_templates"
SYSTEM = {"role": "system", "content": "Be kind."}
TALK = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And in Greek?\nIn one word."},
    {"role": "assistant", "content": "τέσσερα!\n\n(four)"},
    {"role": "user", "content": "Thanks"},
    {"role": "assistant", "content": "You're welcome."},
]


class Format(NamedTuple):
    """Special tokens of a format; `ends` is what the assistant learns to stop with."""

    bos: str
    eos: str
    others: tuple[str, ...] = ()
    ends: str | None = None
    system: bool = True
    inferred: bool = True
    """Whether the mask can be told without marks in the template."""
    lead: str = ""
    """What the assistant says before its content."""
    before_end: str = ""


FORMATS = {
    "chatml": Format("<|endoftext|>", "<|im_end|>", ("<|im_start|>",)),
    "llama2": Format("<s>", "</s>", lead=" ", before_end=" "),
    "llama3": Format(
        "<|begin_of_text|>", "<|end_of_text|>", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"
    ),
    "mistral_v1": Format("<s>", "</s>", system=False, lead=" "),
    "mistral_v3": Format("<s>", "</s>", ("[INST]", "[/INST]"), inferred=False, lead=" "),
    "zephyr": Format("<s>", "</s>"),
    "gemma": Format("<bos>", "<eos>", ("<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", system=False),
    "phi3": Format(
        "<s>", "<|endoftext|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|end|>", inferred=False
    ),
    "vicuna": Format("<s>", "</s>", lead=" "),
    "alpaca": Format("<s>", "</s>"),
    "deepseek": Format("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", ("<｜User｜>", "<｜Assistant｜>")),  # noqa: RUF001
    "olmo2": Format("<|endoftext|>", "<|endoftext|>"),
    "command_r": Format(
        "<BOS_TOKEN>", "<EOS_TOKEN>",
        ("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
        "<|END_OF_TURN_TOKEN|>",
    ),
}  # fmt: skip
MARKS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


def marked(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def make_tokenizer(form: Format, template: str) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=320, show_progress=False, initial_alphabet=alphabet)
    backend.train_from_iterator([message["content"] for message in TALK] * 3, trainer)
    names = dict.fromkeys((form.bos, form.eos, *form.others))
    backend.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in names])
    return Tokenizer(backend, {"bos_token": form.bos, "eos_token": form.eos}, template)


def talk(form: Format) -> list[dict[str, str]]:
    return [SYSTEM, *TALK] if form.system else TALK


def test_every_template_is_here() -> None:
    assert {file.stem for file in FOLDER.glob("*.jinja")} == set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_ids_and_mask_are_those_of_transformers(name: str) -> None:
    form = FORMATS[name]
    ours = make_tokenizer(form, marked(name))
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=ours._template_backend, bos_token=form.bos, eos_token=form.eos, chat_template=marked(name)
    )
    both = theirs.apply_chat_template(talk(form), return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = encode_conversation(ours, talk(form))
    assert ids == both["input_ids"]
    assert mask == [bool(each) for each in both["assistant_masks"]]
    prompt = theirs.apply_chat_template(talk(form)[:-1], return_dict=True, add_generation_prompt=True)["input_ids"]
    assert encode_prompt(ours, talk(form)[:-1]) == prompt


@pytest.mark.parametrize("name", FORMATS)
def test_the_assistant_learns_its_words_and_to_stop(name: str) -> None:
    form = FORMATS[name]
    tokenizer = make_tokenizer(form, marked(name))
    ids, mask = encode_conversation(tokenizer, talk(form))
    answers = [message["content"] for message in TALK if message["role"] == "assistant"]
    said = "".join(f"{form.lead}{answer}{form.before_end}{form.ends or form.eos}" for answer in answers)
    learned = [token for token, learn in zip(ids, mask, strict=True) if learn]
    assert tokenizer.decode(learned, skip_special=False) == said
    assert learned[-1] in tokenizer.stop_ids


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.inferred])
def test_the_mask_is_told_without_marks(name: str) -> None:
    form = FORMATS[name]
    plain = make_tokenizer(form, MARKS.sub("", marked(name)))
    assert encode_conversation(plain, talk(form)) == encode_conversation(make_tokenizer(form, marked(name)), talk(form))


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if not form.inferred])
def test_where_it_cannot_be_told_marks_are_asked_for(name: str) -> None:
    plain = make_tokenizer(FORMATS[name], MARKS.sub("", marked(name)))
    with pytest.raises(DataError, match=r"Enclose it in \{% generation %\}"):
        encode_conversation(plain, talk(FORMATS[name]))


# Mistral's third puts the system message into prompts only: no conversation goes on from its prompt.
@pytest.mark.parametrize("name", sorted({*FORMATS} - {"mistral_v3"}))
def test_the_last_turn_can_be_told_without_marks(name: str) -> None:
    """As in preference pairs: earlier turns may then be rewritten."""
    form = FORMATS[name]
    plain = make_tokenizer(form, MARKS.sub("", marked(name)))
    ids, mask = encode_conversation(plain, talk(form), "last")
    prompt = encode_prompt(plain, talk(form)[:-1])
    assert ids[: len(prompt)] == prompt
    assert mask.index(True) == len(prompt)
    assert ids == encode_conversation(make_tokenizer(form, marked(name)), talk(form))[0]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("loss_on", ["last", "flagged"])
def test_one_turn_of_several(name: str, loss_on: str) -> None:
    form = FORMATS[name]
    tokenizer = make_tokenizer(form, marked(name))
    flags = iter((False, False, True))
    messages = [m | ({"train": next(flags)} if m["role"] == "assistant" else {}) for m in talk(form)]
    ids, mask = encode_conversation(tokenizer, messages, loss_on)  # type: ignore[arg-type]
    said = tokenizer.decode([token for token, learn in zip(ids, mask, strict=True) if learn])
    assert said.strip() == "You're welcome."
    assert ids == encode_conversation(tokenizer, talk(form))[0]
