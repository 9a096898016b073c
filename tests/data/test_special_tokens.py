"""Special tokens: in tokenizers trained here, in others by role or by name, and what is said where one lacks them."""

import json
from pathlib import Path

import pytest
import tokenizers

from llmtrain.config.errors import DataError
from llmtrain.data.special_tokens import InfillingTokens, MaskTokens, infilling_tokens, mask_tokens, sentinels
from llmtrain.data.tokenizers import Tokenizer, load_tokenizer, train_tokenizer

TEXTS = ["some text to train a vocabulary with, again and again"] * 5
OBJECTIVES = ("masked", "span_corruption", "fill_in_the_middle")


def folder_of(tmp_path: Path, names: list[str], roles: dict[str, str]) -> Path:
    """A tokenizer of words with special tokens of these names."""
    words = {word: number for number, word in enumerate(["<unk>", "</s>", *names, "some", "text"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.add_special_tokens(["<unk>", "</s>", *names])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", **roles}))
    return tmp_path


def test_trained_for_an_objective_and_saved(tmp_path: Path) -> None:
    trained = train_tokenizer(TEXTS, 600, objectives=OBJECTIVES)
    trained.save(tmp_path)
    for tokenizer in (trained, load_tokenizer(tmp_path)):
        assert mask_tokens(tokenizer, "it", next_sentence=True) == MaskTokens(6, 7, 8)
        assert sentinels(tokenizer, 100, "it") == list(range(9, 109))
        assert infilling_tokens(tokenizer, "it") == InfillingTokens(109, 110, 111)
        assert {*range(112)} <= tokenizer.special_ids
        assert tokenizer.encode("<|mask|>") != [6]  # in a document it is text about one
        assert not tokenizer.token_bytes[6:112].any()


def test_transformers_knows_the_roles(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    train_tokenizer(TEXTS, 400, objectives=["masked"]).save(tmp_path)
    found = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (found.mask_token, found.cls_token, found.sep_token) == ("<|mask|>", "<|cls|>", "<|sep|>")
    assert found.mask_token_id == 6


def test_without_objectives_nothing_is_added() -> None:
    plain, other = train_tokenizer(TEXTS, 330), train_tokenizer(TEXTS, 330, objectives=[])
    assert plain.digest == other.digest
    assert plain.special_tokens == {"eos_token": "<|end|>", "pad_token": "<|pad|>"}
    assert len(plain.special_ids) == 6


def test_by_role_before_names(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, ["[MASK]", "<hidden>"], {"mask_token": "<hidden>"})
    tokenizer = load_tokenizer(folder)
    assert mask_tokens(tokenizer, "it").mask == tokenizer.id_of("<hidden>")
    tokenizer.save(folder / "again")
    assert json.loads((folder / "again" / "tokenizer_config.json").read_text())["mask_token"] == "<hidden>"


def test_by_the_names_of_others(tmp_path: Path) -> None:
    names = ["[MASK]", "[CLS]", "[SEP]", *(f"<extra_id_{number}>" for number in range(3)), "<fim_prefix>"]
    tokenizer = load_tokenizer(folder_of(tmp_path, [*names, "<fim_middle>", "<fim_suffix>"], {}))
    assert mask_tokens(tokenizer, "it", next_sentence=True) == MaskTokens(2, 3, 4)
    assert sentinels(tokenizer, 3, "it") == [5, 6, 7]
    assert infilling_tokens(tokenizer, "it") == InfillingTokens(prefix=8, suffix=10, middle=9)


def test_an_end_token_of_bert(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, ["[CLS]", "[SEP]", "[MASK]"], {})
    words = json.loads((folder / "tokenizer.json").read_text())
    assert "</s>" in words["model"]["vocab"]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "[SEP]": 1, "a": 2}, unk_token="[UNK]"))
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert load_tokenizer(tmp_path).eos_id == 1


@pytest.mark.parametrize(
    ("ask", "said"),
    [
        (lambda it: mask_tokens(it, "that of X"), r"objective=masked needs .* that of X .*`mask_token`"),
        (lambda it: sentinels(it, 7, "that of X"), r"<extra_id_0> to <extra_id_6>, .*; there are 2"),
        (lambda it: infilling_tokens(it, "that of X"), r"fill_in_the_middle needs .*<fim_prefix>, <fim_suffix>"),
    ],
)  # fmt: skip
def test_what_is_lacking_is_told(ask: object, said: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_of(tmp_path, ["<extra_id_0>", "<extra_id_1>", "<fim_prefix>"], {}))
    with pytest.raises(DataError, match=said) as caught:
        ask(tokenizer)  # type: ignore[operator]
    assert "leave tokenizer.path" in str(caught.value)


def test_two_segments_need_more_than_masks(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder_of(tmp_path, ["[MASK]"], {}))
    assert mask_tokens(tokenizer, "it").mask == 2
    with pytest.raises(DataError, match="next_sentence needs special tokens that it does not have: `cls_token`"):
        mask_tokens(tokenizer, "it", next_sentence=True)


def test_words_begin_with_white_space(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 330, objectives=["masked"])
    ids = tokenizer.encode("again some\ntext")
    begins = [tokenizer.decode([each]) for each in ids if tokenizer.begins_word[each]]
    assert all(each[0].isspace() for each in begins)
    assert "".join(begins).count(" ") == 1
    assert "\n" in "".join(begins)
    assert tokenizer.begins_word[[tokenizer.eos_id, 6]].all()
    wordpiece = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "[SEP]": 1, "run": 2, "##ning": 3}))
    wordpiece.decoder = tokenizers.decoders.WordPiece()
    assert Tokenizer(wordpiece, {"eos_token": "[SEP]"}).begins_word.tolist() == [True, True, True, False]
