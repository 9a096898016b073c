"""The tokenizer of a mixture: one that is there, or one trained on the mixture's own text."""

import hashlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path

from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import CleaningConfig, CorpusConfig, TokenizerConfig
from llmtrain.data.documents import read_documents
from llmtrain.data.plans import source_weights
from llmtrain.data.preparation import describe_source
from llmtrain.data.records import Faults
from llmtrain.data.special_tokens import SPECIAL_TOKENS
from llmtrain.data.tokenizers import Tokenizer, load_tokenizer, train_tokenizer


def corpus_tokenizer(
    data: CorpusConfig, config: TokenizerConfig, cache: Path, objectives: Collection[str] = ()
) -> Tokenizer:
    """The tokenizer of `tokenizer.path`, or one trained on the mixture: once, then found in the cache.

    A trained one has the special tokens of `objectives`, and of those that the config names.
    """
    template = read_template(config.chat_template)
    if config.path:
        return load_tokenizer(config.path, template)
    weights = text_weights(data)
    sources = [
        [name, weights[name], describe_source(source, data.validation_every, CleaningConfig(), cache)]
        for name, source in data.sources.items()
    ]  # fmt: skip
    with_tokens = [name for name in SPECIAL_TOKENS if name in {*objectives, *config.special_tokens_for}]
    asked = [sources, config.vocab_size, config.train_bytes, template, *([with_tokens] if with_tokens else [])]
    key = json.dumps(asked, sort_keys=True)
    folder = cache / f"tokenizer-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    if not (folder / "tokenizer_config.json").is_file():  # the last file to be written
        train_tokenizer(mixed_text(data, config, cache), config.vocab_size, template, with_tokens).save(folder)
    return load_tokenizer(folder)


def mixed_text(data: CorpusConfig, config: TokenizerConfig, cache: Path) -> Iterator[str]:
    """Text of all sources, each with its share of `tokenizer.train_bytes`."""
    weights = text_weights(data)
    for name, source in data.sources.items():
        left = config.train_bytes * weights[name] / sum(weights.values())
        faults = Faults(data.on_error)  # told of when the source is prepared
        for text in read_documents(source, data.validation_every, cache, faults):
            if left <= 0:
                break
            yield text
            left -= len(text.encode())


def text_weights(data: CorpusConfig) -> dict[str, float]:
    """Weights at the start of the run, as far as they are known before the text has been counted."""
    if data.temperature is not None or any(source.epochs for source in data.sources.values()):
        sizes = {name: source.published_gib for name, source in data.sources.items() if source.published_gib}
        if len(sizes) == len(data.sources):
            return source_weights(data, sizes)
        return dict.fromkeys(data.sources, 1.0)
    return source_weights(data, {})


def read_template(path: str | None) -> str | None:
    """The chat template in a Jinja file, if one is named."""
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"tokenizer.chat_template: cannot read {path}: {error}. Name a Jinja file.") from None
