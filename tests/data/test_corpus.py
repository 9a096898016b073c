from pathlib import Path

import pytest

from llmtrain.config.errors import DataError
from llmtrain.config.schema import CorpusConfig, SourceConfig, TokenizerConfig
from llmtrain.data import corpus as module
from llmtrain.data.corpus import prepare_corpus, prepare_tokenizer, texts_by_weight


@pytest.fixture
def corpus(tmp_path: Path) -> CorpusConfig:
    for name, word in (("a", "apple "), ("b", "berry ")):
        (tmp_path / f"{name}.txt").write_text(word * 2000)
    sources = {
        "a": SourceConfig(path=str(tmp_path / "a.txt"), weight=3.0),
        "b": SourceConfig(path=str(tmp_path / "b.txt")),
    }
    return CorpusConfig(sources=sources)


def test_text_for_the_tokenizer_is_drawn_by_weight(corpus: CorpusConfig, tmp_path: Path) -> None:
    text = "".join(texts_by_weight(corpus, 4000, tmp_path))
    assert len(text) == 4000
    assert text.count("apple") == 500
    assert text.count("berry") == 166


def test_a_tokenizer_is_trained_once(corpus: CorpusConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TokenizerConfig(vocab_size=300, train_bytes=5000)
    first = prepare_tokenizer(config, corpus, tmp_path / "cache")
    monkeypatch.setattr(module, "train_tokenizer", lambda *_: pytest.fail("trained again"))
    assert prepare_tokenizer(config, corpus, tmp_path / "cache").digest == first.digest


def test_the_corpus_is_prepared_with_all_its_sources(corpus: CorpusConfig, tmp_path: Path) -> None:
    tokenizer = prepare_tokenizer(TokenizerConfig(vocab_size=300), corpus, tmp_path / "cache")
    train = prepare_corpus(corpus, tokenizer, split="train", cache_dir=tmp_path / "cache")
    held_out = prepare_corpus(corpus, tokenizer, split="validation", cache_dir=tmp_path / "cache")
    assert train["a"].manifest.bytes + held_out["a"].manifest.bytes == 12_000
    assert list(train) == list(held_out) == ["a", "b"]


def test_a_tokenizer_that_is_named_is_used(corpus: CorpusConfig, tmp_path: Path) -> None:
    prepare_tokenizer(TokenizerConfig(vocab_size=300), corpus, tmp_path / "cache").save(tmp_path / "named")
    (tmp_path / "chat.jinja").write_text("{{ messages[0].content }}!")
    config = TokenizerConfig(path=str(tmp_path / "named"), chat_template=str(tmp_path / "chat.jinja"))
    assert prepare_tokenizer(config, corpus, tmp_path).chat_template == "{{ messages[0].content }}!"


def test_a_missing_chat_template_is_named(corpus: CorpusConfig, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"chat_template: .*none\.jinja"):
        prepare_tokenizer(TokenizerConfig(chat_template=str(tmp_path / "none.jinja")), corpus, tmp_path)
