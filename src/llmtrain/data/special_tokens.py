"""Special tokens that objectives need: their names in tokenizers trained here, and how other tokenizers call them."""

from collections.abc import Collection, Sequence
from typing import NamedTuple, Protocol

from llmtrain.config.errors import DataError
from llmtrain.config.schema import SENTINELS

SENTINEL = "<extra_id_{}>"  # T5's name
# The special tokens of each objective that needs some, in tokenizers trained here, in the order of their ids.
SPECIAL_TOKENS: dict[str, tuple[str, ...]] = {
    "masked": ("<|mask|>", "<|cls|>", "<|sep|>"),
    "span_corruption": tuple(map(SENTINEL.format, range(SENTINELS))),
    "fill_in_the_middle": ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
}
# The roles of those that tokenizer_config.json has a key for, and the names that tokenizers without that key are asked.
KNOWN: dict[str, tuple[str, ...]] = {
    "mask_token": ("<|mask|>", "[MASK]", "<mask>"),
    "cls_token": ("<|cls|>", "[CLS]", "<s>"),
    "sep_token": ("<|sep|>", "[SEP]", "</s>"),
}
# Beginning, end and middle: ours and Qwen's, StarCoder's, SantaCoder's, Code Llama's, DeepSeek's.
KNOWN_INFILLING = (
    SPECIAL_TOKENS["fill_in_the_middle"],
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # noqa: RUF001
)


class Vocabulary(Protocol):
    """Of a tokenizer, what is asked here."""

    special_tokens: dict[str, str]

    def id_of(self, token: str) -> int | None: ...


class MaskTokens(NamedTuple):
    """Ids of masked language modelling."""

    mask: int
    cls: int | None
    sep: int | None


class InfillingTokens(NamedTuple):
    """Ids that stand before the parts of a document."""

    prefix: int
    suffix: int
    middle: int


def trained_names(objectives: Collection[str]) -> list[str]:
    """The special tokens that a tokenizer trained for these objectives has, besides those that all have."""
    return [token for name, tokens in SPECIAL_TOKENS.items() if name in objectives for token in tokens]


def trained_roles(objectives: Collection[str]) -> dict[str, str]:
    """Which of them `tokenizer_config.json` names by their role."""
    return dict(zip(KNOWN, SPECIAL_TOKENS["masked"], strict=True)) if "masked" in objectives else {}


def mask_tokens(tokenizer: Vocabulary, whose: str, next_sentence: bool = False) -> MaskTokens:
    """The tokens of masked language modelling; `whose` is what errors call the tokenizer.

    Raises DataError where there is no mask token, or where `next_sentence` needs the two others and they are not there.
    """
    found = {role: _of_role(tokenizer, role) for role in KNOWN}
    for role in KNOWN if next_sentence else ("mask_token",):
        if found[role] is None:
            what = "objective.next_sentence" if role != "mask_token" else "objective=masked"
            names = ", ".join(KNOWN[role])
            raise _lacking(whose, what, f"`{role}` in tokenizer_config.json, or one of {names} in its vocabulary")
    mask = found["mask_token"]
    assert mask is not None
    return MaskTokens(mask, found["cls_token"], found["sep_token"])


def sentinels(tokenizer: Vocabulary, needed: int, whose: str) -> list[int]:
    """The first `needed` sentinels of span corruption. Raises DataError where there are fewer."""
    found: list[int] = []
    while len(found) < needed and (token := tokenizer.id_of(SENTINEL.format(len(found)))) is not None:
        found.append(token)
    if len(found) < needed:
        there = f"there are {len(found)}" if found else "there is none"
        wanted = f"{SENTINEL.format(0)} to {SENTINEL.format(needed - 1)}, one for each span of a row; {there}"
        raise _lacking(whose, "objective=span_corruption", wanted)
    return found


def infilling_tokens(tokenizer: Vocabulary, whose: str) -> InfillingTokens:
    """The tokens of fill-in-the-middle. Raises DataError where there are none."""
    for names in KNOWN_INFILLING:
        found = _ids(tokenizer, names)
        if found is not None:
            return InfillingTokens(*found)
    known = "; ".join(", ".join(names) for names in KNOWN_INFILLING)
    raise _lacking(whose, "objective=fill_in_the_middle", f"one of these in its vocabulary: {known}")


def _ids(tokenizer: Vocabulary, names: Sequence[str]) -> list[int] | None:
    found = [tokenizer.id_of(name) for name in names]
    return None if None in found else [each for each in found if each is not None]


def _of_role(tokenizer: Vocabulary, role: str) -> int | None:
    named = tokenizer.special_tokens.get(role)
    tokens = [named] if named is not None else KNOWN[role]
    return next((found for token in tokens if (found := tokenizer.id_of(token)) is not None), None)


def _lacking(whose: str, what: str, wanted: str) -> DataError:
    return DataError(
        f"{what} needs special tokens that {whose} does not have: {wanted}. Add them, or leave tokenizer.path and "
        "model.init_from away: a tokenizer that is trained for the run has them"
    )
