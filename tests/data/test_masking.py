"""Hidden tokens and rows of two segments, against loops over rows and tokens."""

import numpy as np
import pytest
import torch

from llmtrain.config.schema import CorpusConfig, MaskedConfig, SourceConfig
from llmtrain.data.batches import collate_text
from llmtrain.data.corruption import row_key
from llmtrain.data.masking import Masking
from llmtrain.data.preparation import prepare_sources
from llmtrain.data.sequences import Blocks, PackedDocuments, TextRow
from llmtrain.data.special_tokens import MaskTokens, mask_tokens
from llmtrain.data.tokenizers import Tokenizer, train_tokenizer
from llmtrain.objectives.masked import MaskedBatch
from llmtrain.objectives.next_token import TokenBatch

TEXT = ["the quick brown fox jumps over lazy dogs, walks 12 miles home\nand sleeps until morning comes"] * 30
ROWS, LENGTH = 400, 100


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([*TEXT, *(f"{word}ing more{word}" for word in "abcdefgh")], 330, objectives=["masked"])


@pytest.fixture(scope="module")
def special(tokenizer: Tokenizer) -> MaskTokens:
    return mask_tokens(tokenizer, "it", next_sentence=True)


@pytest.fixture(scope="module")
def text(tokenizer: Tokenizer) -> TokenBatch:
    """Words of the text in any order, with end tokens between."""
    draw = np.random.default_rng(0)
    words = [tokenizer.encode(f" {word}") for word in TEXT[0].split()] + [[tokenizer.eos_id]]
    rows = [
        np.concatenate([words[each] for each in draw.integers(len(words), size=LENGTH)])[:LENGTH] for _ in range(ROWS)
    ]
    mask = torch.arange(LENGTH).expand(ROWS, -1) > 0
    return TokenBatch(torch.from_numpy(np.stack(rows)), mask, torch.zeros(ROWS, dtype=torch.int64))


def masked(tokenizer: Tokenizer, special: MaskTokens, text: TokenBatch, **options: object) -> MaskedBatch:
    others = [TextRow(row.numpy(), np.ones(len(row), bool), None) for row in text.tokens.flip(0)]
    masking = Masking(MaskedConfig(**options), tokenizer, special, {0: others})  # type: ignore[arg-type, dict-item]
    return masking(text, [row_key(0, 3, row) for row in range(len(text))])


def test_hidden_tokens_are_a_share_to_the_token(tokenizer: Tokenizer, special: MaskTokens, text: TokenBatch) -> None:
    batch = masked(tokenizer, special, text)
    assert batch.places.shape == (ROWS, 15)
    for row in range(ROWS):
        is_text = ~torch.isin(text.tokens[row], torch.tensor([tokenizer.eos_id, tokenizer.pad_id]))
        places = batch.places[row][batch.loss_mask[row]].tolist()
        assert len(places) == int(0.15 * int(is_text.sum()) + 0.5)
        assert places == sorted(set(places))
        assert is_text[places].all()
        assert batch.targets[row][batch.loss_mask[row]].tolist() == text.tokens[row][places].tolist()
        others = [place for place in range(LENGTH) if place not in places]
        assert batch.tokens[row][others].tolist() == text.tokens[row][others].tolist()


def test_each_position_is_hidden_as_often(tokenizer: Tokenizer, special: MaskTokens, text: TokenBatch) -> None:
    batch = masked(tokenizer, special, text)
    is_text = text.tokens != tokenizer.eos_id
    hidden = torch.zeros(ROWS, LENGTH).scatter_add(1, batch.places, batch.loss_mask.float())
    rate, count = float(hidden.sum() / is_text.sum()), is_text.sum(0)
    assert rate == pytest.approx(0.15, abs=5e-3)  # counts are rounded
    off = (hidden.sum(0) - rate * count) / (rate * (1 - rate) * count).sqrt()
    assert off.abs().max() < 4.5  # of a hundred positions, in standard deviations


def test_of_the_hidden_eight_in_ten_are_masks_and_one_is_random(
    tokenizer: Tokenizer, special: MaskTokens, text: TokenBatch
) -> None:
    batch = masked(tokenizer, special, text)
    read = batch.tokens.gather(1, batch.places)[batch.loss_mask]
    written = batch.predicted()
    is_mask, is_same = read == special.mask, read == written
    number = len(read)
    deviation = (0.16 / number) ** 0.5
    assert is_mask.float().mean() == pytest.approx(0.8, abs=4 * deviation)
    assert is_same.float().mean() == pytest.approx(0.1, abs=4 * deviation)
    drawn = read[~is_mask & ~is_same]
    assert len(drawn) / number == pytest.approx(0.1, abs=4 * deviation)
    assert not torch.isin(drawn, torch.tensor(sorted(tokenizer.special_ids))).any()
    assert len(set(drawn.tolist())) > 200  # of some 320 kinds of tokens, in 600 draws


@pytest.mark.parametrize(("replace", "random"), [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_shares_of_one_kind_alone(
    replace: float, random: float, tokenizer: Tokenizer, special: MaskTokens, text: TokenBatch
) -> None:
    batch = masked(tokenizer, special, text, replace_rate=replace, random_rate=random)
    read, written = batch.tokens.gather(1, batch.places)[batch.loss_mask], batch.predicted()
    assert ((read == special.mask).all(), (read == written).all()) == (replace == 1.0, replace == random == 0.0)
    if random:
        assert (read == written).float().mean() < 0.02


def test_whole_words_are_hidden_wholly(tokenizer: Tokenizer, special: MaskTokens, text: TokenBatch) -> None:
    batch = masked(tokenizer, special, text, whole_words=True)
    share, several = [], 0
    for row in range(ROWS):
        words = words_of(tokenizer, text.tokens[row].tolist())
        places = set(batch.places[row][batch.loss_mask[row]].tolist())
        for word in words:
            assert len(places & set(word)) in (0, len(word))
            several += len(word) > 1 and word[0] in places
        count = int((text.tokens[row] != tokenizer.eos_id).sum())
        assert len(places) <= int(0.15 * count + 0.5)
        share.append(len(places) / count)
    assert several > ROWS
    assert 0.13 < np.mean(share) <= 0.155


def words_of(tokenizer: Tokenizer, ids: list[int]) -> list[list[int]]:
    """The positions of each word, by what the tokens say."""
    words: list[list[int]] = []
    for place, token in enumerate(ids):
        piece = tokenizer.decode([token], skip_special=False)
        after_special = place == 0 or ids[place - 1] in tokenizer.special_ids
        if token in tokenizer.special_ids or after_special or piece[:1].isspace():
            words.append([])
        words[-1].append(place)
    return words


def test_segments_follow_or_come_from_another_row(tokenizer: Tokenizer, special: MaskTokens, text: TokenBatch) -> None:
    batch = masked(tokenizer, special, text, next_sentence=True, replace_rate=0.0, random_rate=0.0)
    assert batch.tokens.shape == (ROWS, LENGTH + 3)
    assert batch.segments is not None
    assert batch.is_other is not None
    assert 0.4 < batch.is_other.float().mean() < 0.6
    rows = {tuple(row) for row in text.tokens.tolist()}
    cuts = set()
    for read, segment, other, row in zip(
        batch.tokens.tolist(), batch.segments.tolist(), batch.is_other.tolist(), text.tokens.tolist(), strict=True
    ):
        assert read[0] == special.cls
        borders = [place for place, token in enumerate(read) if token == special.sep]
        first, second = read[1 : borders[0]], read[borders[0] + 1 : borders[1]]
        assert borders[1] == LENGTH + 2
        assert segment == [0] * (borders[0] + 1) + [1] * (LENGTH + 2 - borders[0])
        assert first == row[: len(first)]
        assert (first + second == row) == (not other)
        assert any(list(each[len(first) :]) == second for each in rows)
        cuts.add(len(first))
    assert min(cuts) < 8
    assert max(cuts) > LENGTH - 8
    used = batch.places[batch.loss_mask]
    assert not torch.isin(batch.predicted(), torch.tensor([special.cls, special.sep])).any()
    assert used.max() > LENGTH - 2


def test_the_other_row_is_not_the_row_itself(tokenizer: Tokenizer, special: MaskTokens, text: TokenBatch) -> None:
    two = text[:2]
    others = [TextRow(row.numpy(), np.ones(LENGTH, bool), None) for row in two.tokens]
    masking = Masking(
        MaskedConfig(next_sentence=True, replace_rate=0.0, random_rate=0.0), tokenizer, special, {0: others}
    )  # type: ignore[dict-item]
    for step in range(40):
        batch = masking(two, [row_key(0, step, row) for row in range(2)])
        for row, other in enumerate(batch.is_other.tolist() if batch.is_other is not None else []):
            without = [token for token in batch.tokens[row].tolist() if token not in (special.cls, special.sep)]
            if other and without == two.tokens[row].tolist():  # the rows may end alike
                border = batch.tokens[row].tolist().index(special.sep) - 1
                assert two.tokens[0][border:].tolist() == two.tokens[1][border:].tolist()


def test_padding_is_a_document_of_its_own_and_never_hidden(
    tokenizer: Tokenizer, special: MaskTokens, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_text(TEXT[0])
    data = CorpusConfig(sources={"a": SourceConfig(path=str(folder / "a.txt"))})
    source = prepare_sources(data, tokenizer=tokenizer, cache_dir=folder, processes=1)["a"].train
    length = len(source) + 9
    for apart in (False, True):
        row = PackedDocuments(source, length, tokenizer.pad_id, attend_across=not apart)[0]
        batch = Masking(MaskedConfig(), tokenizer, special, {})(collate_text([row], [0]), [5])
        assert batch.documents is not None
        assert batch.documents[0].tolist() == [0] * len(source) + [1] * 9
        assert batch.counted_tokens()["encoder"][0].tolist() == [True] * len(source) + [False] * 9
        assert batch.places.max() < len(source)
        assert int(batch.loss_mask.sum()) == int(0.15 * (len(source) - 1) + 0.5)
    whole = Masking(MaskedConfig(), tokenizer, special, {})(collate_text([Blocks(source, 16)[0]], [0]), [5])
    assert whole.documents is None
    assert whole.lengths is None
