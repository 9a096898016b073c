import pytest
from transformers import PreTrainedTokenizerFast

from llmtrain.config.errors import DataError
from llmtrain.data.conversations import encode_conversation, encode_pair, encode_prompt
from llmtrain.data.tokenizers import Tokenizer, train_tokenizer

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "6"},
]
# ChatML without marks: the assistant's part must be found by what each turn adds.
CHATML = """{% for m in messages %}<|user|>{{ m.role }}
{{ m.content }}<|tool|>
{% endfor %}{% if add_generation_prompt %}<|user|>assistant
{% endif %}"""
PLAIN = """{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["What is 2 + 2? It is 4. And user assistant system Be kind."] * 10, 330)


def spoken(tokenizer: Tokenizer, ids: list[int], mask: list[bool]) -> str:
    return tokenizer.decode([token for token, said in zip(ids, mask, strict=True) if said], skip_special=False)


def test_the_mask_is_on_the_assistants_words_and_their_end(tokenizer: Tokenizer) -> None:
    assert spoken(tokenizer, *encode_conversation(tokenizer, TALK)) == "It is 4.<|end|>6<|end|>"


@pytest.mark.parametrize("template", [CHATML, PLAIN])
def test_templates_without_marks(tokenizer: Tokenizer, template: str) -> None:
    other = tokenizer.with_chat_template(template)
    ids, mask = encode_conversation(other, TALK)
    end = "<|tool|>" if template is CHATML else "<|end|>"
    assert spoken(other, ids, mask) == f"It is 4.{end}6{end}"
    assert other.decode(ids, skip_special=False) == other.template.render(TALK).text


@pytest.mark.parametrize("template", [None, CHATML, PLAIN])
@pytest.mark.parametrize("turns", [2, 4])
def test_a_prompt_is_the_beginning_of_its_conversation(tokenizer: Tokenizer, template: str | None, turns: int) -> None:
    tokenizer = tokenizer.with_chat_template(template) if template else tokenizer
    prompt = encode_prompt(tokenizer, TALK[:turns])
    ids, mask = encode_conversation(tokenizer, TALK)
    assert ids[: len(prompt)] == prompt
    assert mask[len(prompt)]
    assert not mask[len(prompt) - 1]


def test_ids_and_mask_are_those_of_transformers(tokenizer: Tokenizer) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_object=tokenizer._template_backend, eos_token="<|end|>")
    theirs.chat_template = tokenizer.chat_template
    both = theirs.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = encode_conversation(tokenizer, TALK)
    assert ids == both["input_ids"]
    assert mask == [bool(each) for each in both["assistant_masks"]]


def test_a_pair_masks_the_last_answer_only(tokenizer: Tokenizer) -> None:
    (chosen, chosen_mask), (rejected, rejected_mask) = encode_pair(tokenizer, TALK[:4], "6", "7")
    assert spoken(tokenizer, chosen, chosen_mask) == "6<|end|>"
    assert spoken(tokenizer, rejected, rejected_mask) == "7<|end|>"
    start = len(encode_prompt(tokenizer, TALK[:4]))
    assert chosen[:start] == rejected[:start]


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: Tokenizer) -> None:
    forgetful = "{% for m in messages %}<|user|>{{ m.content if loop.last else '...' }}{% endfor %}"
    with pytest.raises(DataError, match=r"\{% generation %\}"):
        encode_conversation(tokenizer.with_chat_template(forgetful), TALK)


def test_what_the_template_refuses_is_shown(tokenizer: Tokenizer) -> None:
    strict = "{% for m in messages %}{{ raise_exception('no ' + m.role) }}{% endfor %}"
    with pytest.raises(DataError, match=r"no system[\s\S]*Be kind"):
        encode_prompt(tokenizer.with_chat_template(strict), TALK)


def test_templates_run_in_a_sandbox(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="unsafe"):
        encode_prompt(tokenizer.with_chat_template("{{ messages.__class__.__mro__ }}{{ ''.__class__ }}"), TALK)


def test_a_broken_template_names_its_line(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="line 2"):
        tokenizer.with_chat_template("\n{% for %}")


def test_marks_in_the_text_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"U\+FDD0"):
        encode_prompt(tokenizer, [{"role": "user", "content": "a\ufdd0b"}])
