"""Tokenizers: loaded from a `tokenizer.json` or trained here; with their special tokens and chat template."""

import functools
import hashlib
import json
import logging
import math
import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from llmtrain.config.errors import DataError
from llmtrain.config.json_files import read_object
from llmtrain.data.special_tokens import KNOWN, trained_names, trained_roles
from llmtrain.data.templates import MAX_SOURCE, ChatTemplate, default_chat_template

log = logging.getLogger(__name__)

MAX_EXPANSION = 1000  # characters that a normalizer may put in the place of one

# The special tokens of tokenizers trained here; the end token ends documents and the assistant's turns.
END, PAD = "<|end|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")

# Names by which a lone tokenizer.json is asked for its end token, in order.
KNOWN_ENDS = (
    END,
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eot_id|>",
    "<|im_end|>",
    "<|end_of_sentence|>",
    "[SEP]",
)
# What byte-level and Metaspace vocabularies write for white space at the beginning of a token.
SPACES = "▁ĠĊĉč \n\t\r"


class Tokenizer:
    """Text ↔ ids, with the ids that have a meaning of their own and the chat template.

    `eos_id` ends a document; `stop_ids` also holds what ends a turn where the chat template uses another token for
    that. `pad_id` is `eos_id` where the tokenizer has no token for padding: padding is never attended to or counted.
    Raises DataError when `special_tokens` names no end token, or one that the vocabulary does not hold.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, special_tokens: dict[str, str], chat_template: str | None = None,
        stop_ids: Iterable[int] = (),
    ) -> None:  # fmt: skip
        backend.no_truncation()
        backend.no_padding()
        # Two views of one vocabulary: in templates `<|end|>` is the end token, in documents it is text about one.
        self._template_backend = backend
        self._backend = tokenizers.Tokenizer.from_str(backend.to_str())
        self._backend.encode_special_tokens = True
        self.special_tokens = special_tokens
        self.template = ChatTemplate(chat_template or default_chat_template(), special_tokens)
        end = self._id("eos_token")
        if end is None:
            raise DataError(
                "the tokenizer names no end-of-document token: "
                "give `eos_token` in a tokenizer_config.json beside its tokenizer.json"
            )
        self.eos_id: int = end
        self.bos_id = self._id("bos_token")
        pad = self._id("pad_token")
        self.pad_id = self.eos_id if pad is None else pad
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self.stop_ids = frozenset({self.eos_id, *stop_ids, *self._end_of_turn()})

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:  # a compiled template cannot go to another process
        ends = tuple(sorted(self.stop_ids))
        return type(self), (self._template_backend, self.special_tokens, self.chat_template, ends)

    @property
    def chat_template(self) -> str:
        """Source of the chat template."""
        return self.template.source

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over vocabulary, rules and chat template: equal digests give equal ids."""
        content = json.dumps([json.loads(self._template_backend.to_str()), self.chat_template], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token's id, special ones included."""
        return self._backend.get_vocab(with_added_tokens=True)

    @functools.cached_property
    def token_bytes(self) -> NDArray[np.int64]:
        """Bytes of text that each id stands for, [vocab_size]; 0 for special tokens."""
        is_bytes = "ByteLevel" in json.dumps(json.loads(self._backend.to_str())["decoder"])
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for token, i in self._backend.get_vocab(with_added_tokens=True).items():
            if i not in self.special_ids:
                sizes[i] = _num_bytes(token, is_bytes)
        return sizes

    @functools.cached_property
    def begins_word(self) -> NDArray[np.bool_]:
        """Whether each id begins a word, [vocab_size]: white space stands before it; special tokens stand alone."""
        is_wordpiece = "WordPiece" in json.dumps(json.loads(self._backend.to_str())["decoder"])
        begins = np.ones(self.vocab_size, dtype=np.bool_)
        for token, i in self._backend.get_vocab(with_added_tokens=True).items():
            if i not in self.special_ids:
                begins[i] = not token.startswith("##") if is_wordpiece else token[:1] in SPACES
        return begins

    def id_of(self, token: str) -> int | None:
        """The id of a token of the vocabulary, by its name."""
        found: int | None = self._template_backend.token_to_id(token)
        return found

    def encode(self, text: str) -> list[int]:
        """Ids of a text; no special tokens are added, and their names in the text are just text."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode`, for many texts, in parallel."""
        return [encoding.ids for encoding in _encode(self._backend, texts)]

    def encode_rendered(self, segments: Sequence[str]) -> list[list[int]]:
        """Ids of consecutive segments of text made by the chat template: names of special tokens mean these tokens."""
        lead = self._lead
        texts = [segment if i == 0 or not segment else lead + segment for i, segment in enumerate(segments)]
        ids = [encoding.ids for encoding in _encode(self._template_backend, texts)]
        return [each[1:] if lead and i and each else each for i, each in enumerate(ids)]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    def with_chat_template(self, chat_template: str) -> Self:
        """The same tokenizer with another chat template."""
        return type(self)(self._template_backend, self.special_tokens, chat_template)

    def save(self, folder: Path, max_sequence_length: int | None = None) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, as `transformers.AutoTokenizer` reads them."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast", **self.special_tokens, "chat_template": self.chat_template,
            "clean_up_tokenization_spaces": False,
        }  # fmt: skip
        if max_sequence_length:
            config["model_max_length"] = max_sequence_length
        (folder / "tokenizer.json").write_text(self._template_backend.to_str(pretty=True), encoding="utf-8")
        text = json.dumps(config, indent=1, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    @functools.cached_property
    def _lead(self) -> str:
        """What to put before later segments of a text, for tokenizers that begin each text with a space."""
        first = self._template_backend.encode("a", add_special_tokens=False).tokens[0]
        return self.special_tokens["eos_token"] if first[0] in "▁Ġ" else ""

    def _id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        found = None if token is None else self.id_of(token)
        if token is not None and found is None:
            raise DataError(f"the tokenizer's {name} is {token!r}, which is not in its vocabulary")
        return found

    def _end_of_turn(self) -> list[int]:
        """The first special token that the template writes after what the assistant says."""
        said = "said"
        try:
            rendered = self.template.render(
                [{"role": "user", "content": "asked"}, {"role": "assistant", "content": said}]
            )
        except DataError:  # it wants other messages than these; then eos_id alone stops
            return []
        tail = rendered.text.rpartition(said)[2]
        ids = self._template_backend.encode(tail, add_special_tokens=False).ids
        return [i for i in ids if i in self.special_ids][:1]


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, chat_template: str | None = None, objectives: Collection[str] = ()
) -> Tokenizer:
    """A byte-level BPE tokenizer for `texts`: any text can be encoded, digits stand alone, equal texts give equal ids.

    `vocab_size` includes the 256 bytes and the special tokens; text that is too small for it gives a smaller one. Of
    the special tokens, some are there for `objectives` only.
    """
    backend = tokenizers.Tokenizer(models.BPE())
    # Digits one by one: numbers get the same tokens wherever they stand, which arithmetic needs.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END, PAD, *ROLES, *trained_names(objectives)], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() < vocab_size:
        log.warning("the text gives a vocabulary of %d tokens only, not %d", backend.get_vocab_size(), vocab_size)
    return Tokenizer(backend, {"eos_token": END, "pad_token": PAD, **trained_roles(objectives)}, chat_template)


def load_tokenizer(path: str | Path, chat_template: str | None = None) -> Tokenizer:
    """The tokenizer in a `tokenizer.json` or in a folder that holds one; `chat_template` overrides the stored one.

    Special tokens come from the files beside it, else from well-known names. Raises DataError when there is none.
    """
    path = Path(path)
    file = path if path.is_file() else path / "tokenizer.json"
    if not file.is_file():
        raise DataError(f"{path}: no tokenizer.json there; name a tokenizer.json or a folder that holds one")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
        raise DataError(f"{file}: not a tokenizer of the tokenizers library: {error}") from None
    folder = file.parent
    try:
        _check_normalizer(backend)
        names = _special_tokens(folder, backend)
        template = chat_template or _stored_template(folder)
        stops = _ids(_read(folder / "generation_config.json"), "eos_token_id")
        return Tokenizer(backend, names, template, stop_ids=stops)
    except DataError as error:
        raise DataError(f"{path}{' with another chat template' if chat_template else ''}: {error}") from None
    except Exception as error:  # the library's own again, of what it reads and cannot use
        raise DataError(f"{file}: not a tokenizer of the tokenizers library: {error}") from None


def _encode(backend: tokenizers.Tokenizer, texts: Sequence[str]) -> list[tokenizers.Encoding]:
    """The fast way leaves out the offsets, which nobody reads here: twice as fast."""
    try:
        encodings: list[tokenizers.Encoding] = backend.encode_batch_fast(texts, add_special_tokens=False)
    except BaseException as error:
        # a regular expression that goes astray on a text ends so, after 10 million steps back; it is no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise DataError(f"the tokenizer cannot encode a text: {error}") from None
    return encodings


def _check_normalizer(backend: tokenizers.Tokenizer) -> None:
    """Raises DataError where normalisation would make very much of little."""
    if backend.normalizer is None:
        return
    said = json.dumps(json.loads(backend.normalizer.__getstate__()))
    longest = math.prod(
        max(1, len(json.loads(text))) for text in re.findall(r'"(?:content|prepend)": ("(?:[^"\\]|\\.)*")', said)
    )
    if longest > MAX_EXPANSION:
        raise DataError(f"its normalizer may put {longest:,} characters in the place of one, which is not supported")


def _stored_template(folder: Path) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        with file.open(encoding="utf-8") as text:
            return text.read(MAX_SOURCE + 1)
    template = _read(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):  # several by name; "default" is the one for plain chat
        named = {each["name"]: each["template"] for each in template if isinstance(each, dict) and len(each) == 2}
        template = named.get("default", next(iter(named.values()), None))
    if template is not None and not isinstance(template, str):
        raise DataError(f"{folder / 'tokenizer_config.json'}: its chat_template is no text")
    return template


def _special_tokens(folder: Path, backend: tokenizers.Tokenizer) -> dict[str, str]:
    """Special tokens by role; what the first of the files says holds."""
    config = _read(folder / "config.json")
    model = {
        name.removesuffix("_id"): backend.id_to_token(ids[0])
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if (ids := _ids(config, name))
    }
    found: dict[str, str] = {}
    for names in (_read(folder / "tokenizer_config.json"), _read(folder / "special_tokens_map.json"), model):
        for name in ("bos_token", "eos_token", "pad_token", "unk_token", *KNOWN):
            token = names.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None and not isinstance(token, str):
                raise DataError(f"its {name} is {token!r:.80}, which is no text")
            if token is not None:
                found.setdefault(name, token)
    if "eos_token" not in found:
        known = next((token for token in KNOWN_ENDS if backend.token_to_id(token) is not None), None)
        found |= {"eos_token": known} if known else {}
    return found


def _read(file: Path) -> dict[str, Any]:
    return read_object(file, DataError) if file.is_file() else {}


def _ids(said: dict[str, Any], name: str) -> list[int]:
    """The ids of tokens, none or several, that a config.json names."""
    value = said.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int and 0 <= i < 2**32 for i in ids):
        raise DataError(f"its {name} is {value!r:.80}, which is no id of a token")
    return ids


def _num_bytes(token: str, is_bytes: bool) -> int:
    if is_bytes:  # one character stands for one byte
        return len(token)
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.removeprefix("##").replace("▁", " ").encode())
