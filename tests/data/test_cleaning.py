import dataclasses
import gzip
import importlib.util
import json
import pickle
from collections import Counter
from inspect import getsource
from pathlib import Path
from re import findall
from typing import Any

import pytest
from datatrove.pipeline.filters import C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter

from llmtrain.config.errors import DataError
from llmtrain.config.schema import CleaningConfig
from llmtrain.data.cleaning import Cleaner, cleaning_key
from llmtrain.data.quality import LINES, REASONS, Splitter

SENTENCES = [
    "The harbour lay still in the early light.",
    "Boats with blue hulls rocked beside the old stone pier.",
    "A baker on the corner was setting out the first loaves of the day!",
    'Somebody asked, "Have you seen the ferry that leaves at seven?"',
    "Nobody answered, because nobody was awake enough to know.",
    "Later that morning wind came up from the south and the gulls went inland.",
]
PROSE = "\n".join(SENTENCES)


def clean(text: str, tmp_path: Path, **options: Any) -> tuple[str | None, dict[str, int]]:
    counts: Counter[str] = Counter()
    return Cleaner(CleaningConfig(**options), tmp_path)(text, counts), dict(counts)


def test_nothing_asked_for_nothing_done(tmp_path: Path) -> None:
    assert clean(" {lorem ipsum} ", tmp_path) == (" {lorem ipsum} ", {})


CUT = [
    ("No full stop at the end of this", "c4: lines without terminal punctuation cut"),
    ("This line ends with an ellipsis...", "c4: lines without terminal punctuation cut"),
    ("Only four words here.", "c4: lines with too few words cut"),
    ("Please enable JavaScript to see this page.", "c4: lines with javascript cut"),
    ("By going on you accept our cookie policy.", "c4: lines of policy notices cut"),
    (f"A word of {'x' * 1001} is too long.", "c4: lines with a word of over 1000 characters cut"),
]


@pytest.mark.parametrize(("line", "reason"), CUT)
def test_c4_cuts_lines(line: str, reason: str, tmp_path: Path) -> None:
    assert clean(f"{PROSE}\n{line}\n", tmp_path, c4=True) == (PROSE, {reason: 1})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"{PROSE}\nThe set is written as {{a, b}} here.", "c4: curly bracket"),
        (f"{PROSE}\nLorem ipsum dolor sit amet, as they say.", "c4: lorem ipsum"),
        ("\n".join(SENTENCES[:2]), "c4: too few sentences"),
        ("", "c4: too few sentences"),
    ],
)
def test_c4_drops_documents(text: str, reason: str, tmp_path: Path) -> None:
    assert clean(text, tmp_path, c4=True) == (None, {reason: 1})


def test_c4_takes_citations_out(tmp_path: Path) -> None:
    assert clean(PROSE.replace("light.", "light.[12]"), tmp_path, c4=True) == (PROSE, {})


def test_c4_counts_sentences_not_lines(tmp_path: Path) -> None:
    line = " ".join(SENTENCES[:3])
    assert clean(line, tmp_path, c4=True)[0] == line
    assert clean(line, tmp_path, c4=True, c4_min_sentences=4) == (None, {"c4: too few sentences": 1})


def test_c4_words_per_line(tmp_path: Path) -> None:
    assert clean(f"{PROSE}\nFour words of text.", tmp_path, c4=True, c4_min_words_per_line=4)[1] == {}


def test_lines_of_dropped_documents_are_not_counted(tmp_path: Path) -> None:
    cleaner, counts = Cleaner(CleaningConfig(c4=True), tmp_path), Counter[str]()
    assert cleaner("Home\nAbout", counts) is None
    assert cleaner(f"Home\n{PROSE}", counts) == PROSE
    assert counts == {"c4: too few sentences": 1, "c4: lines without terminal punctuation cut": 1}


QUALITY = [
    (" ".join(SENTENCES[:3]), "gopher: too few words"),
    ("the cat and " * 33_400, "gopher: too many words"),
    ("to be of a b c " * 20, "gopher: words too short"),
    ("that electroencephalographically incomprehensibilities with " * 20, "gopher: words too long"),
    (PROSE.replace(" the ", " # the #"), "gopher: too many hash signs"),
    (PROSE.replace(" the ", "... the ... "), "gopher: too many ellipses"),
    ("\n".join(f"- {sentence}" for sentence in SENTENCES), "gopher: too many lines with bullets"),
    ("\n".join(f"{sentence}..." if n % 2 else sentence for n, sentence in enumerate(SENTENCES)), "an ellipsis"),
    (PROSE + " 1234" * 20, "gopher: too few words with letters"),
    (
        " ".join(word for word in PROSE.split() if word not in ("the", "to", "of", "and", "that", "with")),
        "gopher: too few stop words",
    ),
]


@pytest.mark.parametrize(("text", "reason"), QUALITY, ids=[reason for _, reason in QUALITY])
def test_gopher_quality(text: str, reason: str, tmp_path: Path) -> None:
    cleaned, counts = clean(text, tmp_path, gopher_quality=True)
    assert cleaned is None
    assert len(counts) == 1
    assert reason in next(iter(counts))


REPETITION = [
    (f"{PROSE}\n\n" * 2, "gopher: repeated paragraphs"),
    (f"{PROSE}\n" * 2, "gopher: repeated lines"),
    (f"{PROSE} {'so so ' * 50}", "gopher: one run of 2 words too often"),
    (
        " ".join(f"{name} baked a loaf of bread." for name in ("Ann", "Ben", "Cleo", "Dirk")),
        "gopher: one run of 2 words too often",
    ),
    (f"{PROSE} {SENTENCES[0]} {SENTENCES[1]}", "gopher: repeated runs of 6 words"),
    ("", "gopher: empty"),
]


@pytest.mark.parametrize(("text", "reason"), REPETITION, ids=[reason for _, reason in REPETITION])
def test_gopher_repetition(text: str, reason: str, tmp_path: Path) -> None:
    assert clean(text, tmp_path, gopher_repetition=True) == (None, {reason: 1})


def test_prose_passes_everything(tmp_path: Path) -> None:
    options = {"c4": True, "gopher_quality": True, "gopher_repetition": True, "languages": ["en"]}
    assert clean(PROSE, tmp_path, **options) == (PROSE, {})


@pytest.mark.parametrize("text", ["", " ", "\n\n", "...", "# # #", "•", "{", "a", "\x00", "a\u2028b.", "\ud7ff" * 60])
def test_odd_texts_are_no_errors(text: str, tmp_path: Path) -> None:
    for rule in ("c4", "gopher_quality", "gopher_repetition"):
        clean(text, tmp_path, **{rule: True})
    clean(text, tmp_path, languages=["en"], mask_pii=["mail", "ip", "phone"])


def test_every_reason_of_the_library_has_words() -> None:
    """A new version of datatrove may know reasons that have none here."""
    rules = (C4QualityFilter, GopherQualityFilter, GopherRepetitionFilter)
    reasons = {reason for rule in rules for reason in findall(r'return False, "(\w+)"', getsource(rule))}
    lines = set(findall(r'stat_update\("(line-filter-\w+)"', getsource(C4QualityFilter)))
    assert reasons == set(REASONS)
    assert lines == set(LINES)


def test_sentences_are_cut_without_losing_a_character() -> None:
    text = 'One. Two!  "Three?" Four 3.5 and e.g. more\nfive'
    assert "".join(Splitter().sent_tokenize(text)) == text
    assert [part.strip() for part in Splitter().sent_tokenize(text)][:3] == ["One.", "Two!", '"Three?"']
    assert Splitter().sent_tokenize("") == [""]


def test_languages(tmp_path: Path) -> None:
    german = "Der Hafen lag still im frühen Licht, und niemand war wach genug, um zu antworten."
    assert clean(PROSE, tmp_path, languages=["en", "fr"])[0] == PROSE
    assert clean(german, tmp_path, languages=["en", "fr"]) == (None, {"language: de": 1})
    with pytest.raises(DataError, match=r"languages: not known: english; expected codes"):
        clean(PROSE, tmp_path, languages=["english", "de"])


def test_bad_words(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("Darn\n\nbloody hell\nc++\n")
    options = {"bad_words": str(tmp_path / "words.txt")}
    for text in ("Well, DARN.", "what the bloody hell", "I like C++."):
        assert clean(text, tmp_path, **options) == (None, {"bad words": 1})
    for text in ("darning socks", "a bloody day in hell", "c+"):
        assert clean(text, tmp_path, **options) == (text, {})


@pytest.mark.parametrize(("content", "said"), [(None, "no list of words"), (b"\n \n", "no words"), (b"\xff", "UTF-8")])
def test_a_list_of_words_that_is_none(content: bytes | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "words.txt").write_bytes(content)
    with pytest.raises(DataError, match=rf"words\.txt.*{said}"):
        clean("", tmp_path, bad_words=str(tmp_path / "words.txt"))


def test_length_is_counted_after_the_rules(tmp_path: Path) -> None:
    text = f"{PROSE}\n{'x' * 500}"
    assert clean(text, tmp_path, min_characters=len(text)) == (text, {})
    cleaned, counts = clean(text, tmp_path, min_characters=len(text), c4=True)
    assert cleaned is None
    assert counts[f"shorter than {len(text)} characters"] == 1


def evaluation_set(tmp_path: Path, text: str) -> str:
    file = tmp_path / "test.jsonl.gz"
    file.write_bytes(gzip.compress(json.dumps({"query": text}).encode()))
    return str(file)


def test_decontamination_and_masking(tmp_path: Path) -> None:
    path = evaluation_set(tmp_path, "write to me at jo@example.com or at home in the old town today")
    options = {"decontaminate": [path], "mask_pii": ["ip", "mail"]}
    text = "Please write to me at jo@example.com or at home in the old town, from 8.8.8.8 and 8.8.4.4."
    dropped = {"decontamination: 13-gram of an evaluation set": 1}
    assert clean(text, tmp_path, **options) == (None, dropped)  # looked for before anything is masked
    cleaned, counts = clean(text.replace("old", "new"), tmp_path, **options)
    assert cleaned is not None
    assert cleaned.endswith("from |||IP_ADDRESS||| and |||IP_ADDRESS|||.")
    assert counts == {"pii: mail addresses masked": 1, "pii: IP addresses masked": 2}


ALL = CleaningConfig(
    languages=["en"], c4=True, gopher_quality=True, gopher_repetition=True, min_characters=5,
    mask_pii=["mail", "ip", "phone"], exact_duplicates=True, near_duplicates=True,
)  # fmt: skip


def test_it_can_be_sent_to_another_process(tmp_path: Path) -> None:
    words = tmp_path / "words.txt"
    words.write_text("darn")
    path = evaluation_set(tmp_path, "one two three four five six seven eight nine ten eleven twelve thirteen")
    cleaner = Cleaner(dataclasses.replace(ALL, bad_words=str(words), decontaminate=[path]), tmp_path)
    sent, counts = pickle.loads(pickle.dumps(cleaner)), Counter[str]()
    assert sent(f"{PROSE}\nHome\nWrite to jo@example.com for a loaf of bread.", counts) is not None
    assert counts == {"c4: lines without terminal punctuation cut": 1, "pii: mail addresses masked": 1}


def test_the_result_does_not_depend_on_the_documents_before(tmp_path: Path) -> None:
    texts = [f"{PROSE} jo@example.com said so.", PROSE, "Home", "8.8.8.8", f"Home\n{PROSE} jo@example.com said it."]
    config = dataclasses.replace(ALL, c4_min_sentences=1)
    alone = [Cleaner(config, tmp_path)(text, Counter()) for text in texts]
    cleaner = Cleaner(config, tmp_path)
    assert [cleaner(text, Counter()) for text in [*texts, *texts]] == alone * 2


@pytest.mark.parametrize(
    ("option", "library"),
    [
        ({"c4": True}, "datatrove"),
        ({"gopher_repetition": True}, "datatrove"),
        ({"languages": ["en"]}, "py3langid"),
        ({"mask_pii": ["phone"]}, "phonenumbers"),
    ],
)
def test_a_missing_library_is_named(
    option: dict[str, Any], library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=rf'data\.cleaning needs {library}: pip install "llmtrain\[cleaning\]"'):
        clean("", tmp_path, **option)
    clean("", tmp_path, mask_pii=["mail", "ip"], min_characters=1)  # these need none


def test_the_key_says_what_the_result_depends_on(tmp_path: Path) -> None:
    path = evaluation_set(tmp_path, "one two three")
    key = cleaning_key(dataclasses.replace(ALL, decontaminate=[path]), lambda file: f"digest of {Path(file).name}")
    assert json.loads(json.dumps(key)) == key
    assert key["decontaminate"] == [["digest of test.jsonl.gz"]]
    assert set(key["libraries"]) == {"datatrove", "py3langid", "phonenumbers"}
    assert cleaning_key(CleaningConfig(), str) == {}
    assert cleaning_key(CleaningConfig(min_characters=1), str) != cleaning_key(CleaningConfig(min_characters=2), str)
