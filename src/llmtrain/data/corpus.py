"""The pretraining mixture made ready: its tokenizer and its tokens, made once and found again in the cache."""

import dataclasses
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from llmtrain.config.errors import DataError
from llmtrain.config.schema import CorpusConfig, TokenizerConfig
from llmtrain.data.documents import read_documents
from llmtrain.data.records import Split
from llmtrain.data.shards import TokenSource, describe_source, prepare_tokens
from llmtrain.data.tokenizers import Tokenizer, load_tokenizer, train_tokenizer

log = logging.getLogger(__name__)


def prepare_tokenizer(config: TokenizerConfig, corpus: CorpusConfig, cache_dir: Path) -> Tokenizer:
    """The tokenizer that `config` names, or one trained on the mixture's training text.

    Raises DataError for files that are missing or cannot be read.
    """
    template = read_chat_template(config.chat_template)
    if config.path is not None:
        return load_tokenizer(config.path, template)
    sources = {
        name: [source.weight, describe_source(source, "train", corpus.validation_every, cache_dir)]
        for name, source in corpus.sources.items()
    }
    key = json.dumps([dataclasses.asdict(config), template, sources], sort_keys=True)
    folder = cache_dir / f"tokenizer-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not folder.is_dir():
        log.info("training a tokenizer on up to %d bytes", config.train_bytes)
        made = train_tokenizer(texts_by_weight(corpus, config.train_bytes, cache_dir), config.vocab_size, template)
        cache_dir.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=cache_dir))
        made.save(aside)
        try:
            aside.rename(folder)
        except OSError:  # another process was quicker; its tokenizer is the same
            shutil.rmtree(aside)
    return load_tokenizer(folder, template)


def prepare_corpus(
    corpus: CorpusConfig, tokenizer: Tokenizer, *, split: Split, cache_dir: Path
) -> dict[str, TokenSource]:
    """The tokens of all sources of the mixture."""
    every = corpus.validation_every
    return {
        name: prepare_tokens(source, tokenizer=tokenizer, split=split, validation_every=every, cache_dir=cache_dir)
        for name, source in corpus.sources.items()
    }


def texts_by_weight(corpus: CorpusConfig, num_bytes: int, cache_dir: Path) -> Iterator[str]:
    """Training text of all sources: of each its weight's share of `num_bytes`, or all of it where there is less."""
    total = sum(source.weight for source in corpus.sources.values())
    for source in corpus.sources.values():
        left = int(num_bytes * source.weight / total)
        for text in read_documents(source, corpus.validation_every, "train", cache_dir):
            data = text.encode()
            yield text if len(data) <= left else data[:left].decode(errors="ignore")
            left -= len(data)
            if left <= 0:
                break


def read_chat_template(path: str | None) -> str | None:
    """The chat template in a file. Raises DataError when there is no such file."""
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"chat_template: {path}: cannot be read: {error.strerror}") from None
