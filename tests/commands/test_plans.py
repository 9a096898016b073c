"""Published mixtures: the tables of their papers come out of the YAML."""

import pytest
from tests.tiny import finish

from llmtrain.commands.plans import is_elsewhere, planned_rows, repeated
from llmtrain.config.compose import load_config

# Gao et al. 2020 (arXiv 2101.00027), table 1: size in GiB, weight in percent, epochs, effective size in GiB.
PILE = {
    "pile_cc": (227.12, 18.11, 1.0, 227.12), "pubmed_central": (90.27, 14.40, 2.0, 180.55),
    "books3": (100.96, 12.07, 1.5, 151.44), "openwebtext2": (62.77, 10.01, 2.0, 125.54),
    "arxiv": (56.21, 8.96, 2.0, 112.42), "github": (95.16, 7.59, 1.0, 95.16), "freelaw": (51.15, 6.12, 1.5, 76.73),
    "stackexchange": (32.20, 5.13, 2.0, 64.39), "uspto": (22.90, 3.65, 2.0, 45.81),
    "pubmed_abstracts": (19.26, 3.07, 2.0, 38.53), "gutenberg": (10.88, 2.17, 2.5, 27.19),
    "opensubtitles": (12.98, 1.55, 1.5, 19.47), "wikipedia_en": (6.38, 1.53, 3.0, 19.13),
    "dm_mathematics": (7.75, 1.24, 2.0, 15.49), "ubuntu_irc": (5.52, 0.88, 2.0, 11.03),
    "bookcorpus2": (6.30, 0.75, 1.5, 9.45), "europarl": (4.59, 0.73, 2.0, 9.17), "hackernews": (3.90, 0.62, 2.0, 7.80),
    "youtube_subtitles": (3.73, 0.60, 2.0, 7.47), "philpapers": (2.38, 0.38, 2.0, 4.76),
    "nih_exporter": (1.89, 0.30, 2.0, 3.79), "enron_emails": (0.88, 0.14, 2.0, 1.76),
}  # fmt: skip
# Touvron et al. 2023 (arXiv 2302.13971), table 1: sampling proportion in percent, epochs in 1.4T tokens.
LLAMA = {
    "commoncrawl": (67.0, 1.10), "c4": (15.0, 1.06), "github": (4.5, 0.64), "wikipedia": (4.5, 2.45),
    "books": (4.5, 2.23), "arxiv": (2.5, 1.06), "stackexchange": (2.0, 1.03),
}  # fmt: skip


def test_the_piles_table_comes_out_as_printed() -> None:
    config = load_config("pretrain", ["data=pile"], later=("data",))
    assert is_elsewhere(config)
    rows = planned_rows(config)
    printed = {
        row["source"]: (
            round(row["gib"], 2), round(100 * row["share"], 2), row["epochs"], round(row["effective_gib"], 2),
        )
        for row in rows
    }  # fmt: skip
    assert printed == PILE
    assert sum(row["gib"] for row in rows) == pytest.approx(825.18, abs=0.01)
    assert sum(row["effective_gib"] for row in rows) == pytest.approx(1254.20, abs=0.01)


def test_llamas_table_comes_out_as_printed() -> None:
    length = ["train.steps=null", "train.tokens=1400000000000", "train.batch_tokens=4194304"]
    rows = planned_rows(load_config("pretrain", ["data=llama", *length], later=("data",)))
    assert {row["source"]: (round(100 * row["share"], 1), round(row["run_epochs"], 2)) for row in rows} == LLAMA


def test_what_is_repeated_too_often_is_said() -> None:
    [warning] = repeated({"a": 4.0, "b": 5.25})
    assert warning.startswith("b: gone through 5.2 times")


def test_embedded_sources_are_here() -> None:
    assert not is_elsewhere(load_config("pretrain", []))


def test_show_takes_the_keys_of_the_stage() -> None:
    faults = finish(["show", "data=pile", "train.stepz=3"], expect=2)
    assert "train.stepz" in faults
    assert "train.steps" in faults


def test_a_missing_file_without_a_published_size_is_a_fault() -> None:
    assert "no such file" in finish(["show", "data=files", "data.sources.files.path=nowhere.jsonl"], expect=2)
