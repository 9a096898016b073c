"""Text of a document → the text to train on, or nothing; every rule is optional, and what it did is counted."""

import dataclasses
import importlib.util
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llmtrain.config.errors import DataError
from llmtrain.config.schema import CleaningConfig
from llmtrain.data.decontamination import EVALUATION_SPLIT, EvaluationNgrams
from llmtrain.data.files import find_files, is_hub_id
from llmtrain.data.pii import Mask, masks

RULES = 1  # raise when the rules below would treat a text in another way than before
LANGUAGE_CHARACTERS = 2000  # enough to tell a language by, and the library takes 0.3 s for a million

Step = Callable[[str, Counter[str]], str | None]


class Cleaner:
    """The rules of a config, one after another, the first that drops a document is the last. May be pickled.

    Raises DataError where a library, an evaluation set or a list of words is missing.
    """

    def __init__(self, config: CleaningConfig, cache_dir: Path) -> None:
        _libraries(config)
        self._steps = _steps(config, cache_dir)

    def __call__(self, text: str, counts: Counter[str]) -> str | None:
        """The cleaned text, or None where the document is dropped; adds to `counts` what was done and why."""
        cleaned: str | None = text
        for step in self._steps:
            if cleaned is None:
                break
            cleaned = step(cleaned, counts)
        return cleaned


def cleaning_key(config: CleaningConfig, digest_of_file: Callable[[str], str]) -> dict[str, Any]:
    """What cleaned texts and fingerprints depend on beside the texts, as plain values; empty where nothing is on."""
    if config == CleaningConfig():
        return {}
    words = config.bad_words
    return {
        **dataclasses.asdict(config),
        "bad_words": digest_of_file(words) if words else None,
        "decontaminate": [_content(path, digest_of_file) for path in config.decontaminate],
        "libraries": {name: version(name) for name in _libraries(config)},
        "unicode": unicodedata.unidata_version,
        "rules": RULES,
    }


def _content(path: str, digest_of_file: Callable[[str], str]) -> Any:
    return path if is_hub_id(path) else [digest_of_file(file) for file in find_files(path, EVALUATION_SPLIT)]


def _libraries(config: CleaningConfig) -> list[str]:
    """The optional libraries that a config needs. Raises DataError for those that are missing."""
    wanted = {
        "datatrove": config.c4 or config.gopher_quality or config.gopher_repetition,
        "py3langid": bool(config.languages),
        "phonenumbers": "phone" in config.mask_pii,
    }
    names = [name for name, is_wanted in wanted.items() if is_wanted]
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise DataError(f'data.cleaning needs {" and ".join(missing)}: pip install "llmtrain[cleaning]"')
    return names


def _steps(config: CleaningConfig, cache_dir: Path) -> list[Step]:
    """The rules that are on, in order: what is cheap or drops much first, what changes the text last."""
    steps: list[Step] = []
    if config.languages:
        steps.append(Languages(config.languages))
    if config.c4:
        steps.append(_quality().C4Rules(config.c4_min_words_per_line, config.c4_min_sentences))
    if config.bad_words:
        steps.append(BadWords(Path(config.bad_words)))
    if config.gopher_quality:
        steps.append(_quality().gopher_quality())
    if config.gopher_repetition:
        steps.append(_quality().gopher_repetition())
    if config.min_characters:
        steps.append(partial(_long_enough, config.min_characters))
    if config.decontaminate:
        steps.append(partial(_unseen, EvaluationNgrams(config.decontaminate, config.decontaminate_ngram, cache_dir)))
    if config.mask_pii:
        steps.append(partial(_masked, masks(config.mask_pii, config.phone_region)))
    return steps


def _quality() -> Any:
    """The rules that need datatrove, imported when used: it is optional and takes half a second."""
    return importlib.import_module("llmtrain.data.quality")


class Languages:
    """Drops documents that are in none of the wanted languages, by their beginning."""

    def __init__(self, wanted: list[str]) -> None:
        self._wanted = frozenset(wanted)
        known = {language for language, _ in importlib.import_module("py3langid").rank("")}
        if unknown := sorted(self._wanted - known):
            message = f"not known: {', '.join(unknown)}; expected codes of ISO 639 such as en, de, zh"
            raise DataError(f"data.cleaning.languages: {message}")

    def __call__(self, text: str, counts: Counter[str]) -> str | None:
        """The text, or None."""
        language, _ = importlib.import_module("py3langid").classify(text[:LANGUAGE_CHARACTERS])
        if language in self._wanted:
            return text
        counts[f"language: {language}"] += 1
        return None


class BadWords:
    """Drops documents with a word or phrase of a list (C4: arXiv:1910.10683, section 2.2)."""

    def __init__(self, file: Path) -> None:
        try:
            lines = [line.strip().lower() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{file}: no list of words, one a line, in UTF-8: {error}") from None
        words = [re.escape(line) for line in sorted(set(lines)) if line]
        if not words:
            raise DataError(f"{file}: no words in there; expected one word or phrase a line")
        self._pattern = re.compile(rf"(?<!\w)(?:{'|'.join(words)})(?!\w)")

    def __call__(self, text: str, counts: Counter[str]) -> str | None:
        """The text, or None."""
        if not self._pattern.search(text.lower()):
            return text
        counts["bad words"] += 1
        return None


def _long_enough(min_characters: int, text: str, counts: Counter[str]) -> str | None:
    if len(text) >= min_characters:
        return text
    counts[f"shorter than {min_characters} characters"] += 1
    return None


def _unseen(evaluation: EvaluationNgrams, text: str, counts: Counter[str]) -> str | None:
    if not evaluation.share_with(text):
        return text
    counts[f"decontamination: {evaluation.length}-gram of an evaluation set"] += 1
    return None


def _masked(kinds: dict[str, Mask], text: str, counts: Counter[str]) -> str:
    for kind, mask in kinds.items():
        text, found = mask(text)
        if found:
            counts[f"pii: {MASKED[kind]} masked"] += found
    return text


MASKED = {"mail": "mail addresses", "ip": "IP addresses", "phone": "phone numbers"}
