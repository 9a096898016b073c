import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer

from llmtrain.config.errors import DataError
from llmtrain.data.tokenizers import Tokenizer, load_tokenizer, train_tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog, 1234 times.\n",
    "def f(x):\n    return x + 10\n",
    "naïve café 北京 😀",
] * 20


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(TEXTS, 400)


def test_every_text_survives_encoding_and_decoding(trained: Tokenizer) -> None:
    for text in [*TEXTS, "\x00\t\r\n  ", "<|end|> and <|user|> as text", "Ω≈ç√∫", ""]:
        assert trained.decode(trained.encode(text), skip_special=False) == text


def test_digits_stand_alone(trained: Tokenizer) -> None:
    pieces = [trained.decode([i]) for i in trained.encode("1234 1200+99")]
    assert [piece for piece in pieces if any(c.isdigit() for c in piece)] == list("1234120099")


def test_special_tokens_in_documents_are_text(trained: Tokenizer) -> None:
    assert trained.eos_id not in trained.encode("a <|end|> b")
    assert trained.pad_id != trained.eos_id


def test_token_bytes_count_the_text(trained: Tokenizer) -> None:
    for text in TEXTS:
        assert trained.token_bytes[trained.encode(text)].sum() == len(text.encode())
    assert trained.token_bytes[trained.eos_id] == 0


def test_training_gives_the_same_tokenizer_in_another_process(trained: Tokenizer) -> None:
    code = f"from llmtrain.data.tokenizers import train_tokenizer; print(train_tokenizer({TEXTS!r}, 400).digest)"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == trained.digest


def test_transformers_reads_what_was_saved(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path, max_sequence_length=77)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False)["input_ids"] == trained.encode(text)
    messages = [{"role": "system", "content": "Be brief.\n"}, {"role": "user", "content": " 1+1? "}]
    talk = [*messages, {"role": "assistant", "content": "2"}, {"role": "user", "content": "ok"}]
    assert theirs.apply_chat_template(talk, tokenize=False) == trained.template.render(talk).text
    prompt = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == trained.template.render(messages, add_generation_prompt=True).text
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.model_max_length) == (trained.eos_id, trained.pad_id, 77)


def test_a_saved_tokenizer_loads_the_same(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.digest == trained.digest
    assert (loaded.eos_id, loaded.pad_id, loaded.stop_ids) == (trained.eos_id, trained.pad_id, trained.stop_ids)
    assert load_tokenizer(tmp_path / "tokenizer.json").eos_id == trained.eos_id


def test_stored_truncation_and_padding_are_switched_off(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    stored = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    stored.enable_truncation(4)
    stored.enable_padding(length=100)
    stored.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).encode(TEXTS[0]) == trained.encode(TEXTS[0])


def test_special_tokens_come_from_the_model_config(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path)
    user = trained.encode_rendered(["<|user|>"])[0][0]
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [user], "bos_token_id": trained.pad_id}))
    loaded = load_tokenizer(tmp_path)
    assert (loaded.eos_id, loaded.bos_id) == (user, trained.pad_id)


def test_the_templates_own_end_of_turn_stops(trained: Tokenizer) -> None:
    chat = "{% for m in messages %}{{ m.content }}<|tool|>\n{% endfor %}"
    tool = trained.encode_rendered(["<|tool|>"])[0][0]
    assert trained.with_chat_template(chat).stop_ids == {trained.eos_id, tool}
    assert trained.stop_ids == {trained.eos_id}


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere.*tokenizer\.json"):
        load_tokenizer(tmp_path / "nowhere")


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_end_token_is_refused(tmp_path: Path) -> None:
    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    backend.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="eos_token"):
        load_tokenizer(tmp_path)


def test_sentencepiece_style_segments_get_no_second_space() -> None:
    vocab = {"<s>": 0, "</s>": 1, "▁": 2, "a": 3, "b": 4, "▁a": 5, "▁b": 6}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a"), ("▁", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.add_special_tokens(["<s>", "</s>"])
    tokenizer = Tokenizer(backend, {"eos_token": "</s>", "bos_token": "<s>"})
    whole = backend.encode("a b</s>", add_special_tokens=False).ids
    first, second = tokenizer.encode_rendered(["a", " b</s>"])
    assert first + second == whole == [5, 6, 1]
    assert tokenizer.token_bytes[5] == 2
