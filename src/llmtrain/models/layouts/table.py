"""What a family's table is made of: rules for names of tensors, and parts that say keys of config.json in our words.

A part writes some of our values as keys of theirs and reads them back. So nobody needs to say which architectures a
family has: those that are the same after they were written and read.
"""

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from pydantic import TypeAdapter

from llmtrain.config.schema import ModelConfig
from llmtrain.config.schema.model import BiasedPart
from llmtrain.models.experts import expert_size
from llmtrain.models.feed_forward import inner_size

Fields = dict[str, Any]
# Of the config, and no part of the architecture.
NOT_SHAPE = ("init_from", "adapter_from", "dropout", "stochastic_depth", "init_std", "init", "published_vocab_size")
# No family has a key for it: it is kept in a block of our own beside theirs.
STOCHASTIC_DEPTH = "llmtrain.stochastic_depth"
BIASES: tuple[BiasedPart, ...] = ("qkv", "attention_output", "mlp", "norm")
# Only rotary positions have these; only layers with a window the second.
ROPE = ("rope_theta", "rope_local_theta", "rope_scaling", "partial_rotary_factor")
RELATIVE = ("relative_buckets", "relative_max_distance")


_CONFIG = TypeAdapter(ModelConfig)


class Inexpressible(Exception):
    """A family has no word for a value of ours."""


class Part(Protocol):
    """Some keys of a family's config.json."""

    def write(self, ours: Fields) -> Fields:
        """Their keys (dots lead into blocks) for an architecture as `described` gives it. May raise Inexpressible."""

    def read(self, theirs: Fields, ours: Fields) -> tuple[Fields, list[str]]:
        """Our keys (dots lead into blocks) for a config.json, and what of it is not supported; `ours` is what parts
        before have read."""


@dataclass(frozen=True)
class Key:
    """A key of theirs that is one of ours; `values` holds their words for ours, the first of which is written.

    `default` is theirs where the key is missing. Dots lead into blocks, of theirs and of ours.
    """

    theirs: str
    ours: str
    default: Any = None
    values: Mapping[Any, tuple[Any, ...]] | None = None

    def write(self, ours: Fields) -> Fields:
        value = look_up(ours, self.ours, _MISSING)
        if value is _MISSING:
            raise Inexpressible
        if self.values is None:
            return {self.theirs: value}
        if value not in self.values:
            raise Inexpressible
        return {self.theirs: self.values[value][0]}

    def read(self, theirs: Fields, ours: Fields) -> tuple[Fields, list[str]]:
        value = look_up(theirs, self.theirs, self.default)
        if self.values is None:
            return ({} if value is None else {self.ours: value}), []
        found = [mine for mine, words in self.values.items() if value in words]
        if found:
            return {self.ours: found[0]}, []
        supported = ", ".join(str(word) for words in self.values.values() for word in words)
        return {}, [f"{self.theirs}={value!r} (supported: {supported})"]


@dataclass(frozen=True)
class Same:
    """Keys of theirs that all are one key of ours, and so have to agree."""

    keys: tuple[Key, ...]

    def write(self, ours: Fields) -> Fields:
        return {name: value for key in self.keys for name, value in key.write(ours).items()}

    def read(self, theirs: Fields, ours: Fields) -> tuple[Fields, list[str]]:
        read = [key.read(theirs, ours) for key in self.keys]
        names = ", ".join(key.theirs for key in self.keys)
        faults = [fault for _, found in read for fault in found]
        differ = any(found != read[0][0] for found, _ in read)
        return read[0][0], faults or [f"{names} that differ (supported: one value for all)"] * differ


@dataclass(frozen=True)
class Only:
    """A key of theirs with its only supported value, for which null may stand; `written` where it is no default."""

    theirs: str
    value: Any
    written: bool = False

    def write(self, ours: Fields) -> Fields:
        return {self.theirs: self.value} if self.written else {}

    def read(self, theirs: Fields, ours: Fields) -> tuple[Fields, list[str]]:
        value = look_up(theirs, self.theirs, self.value)
        return {}, [] if value in (self.value, None) else [f"{self.theirs}={value!r} (supported: {self.value!r})"]


@dataclass(frozen=True)
class Dropouts:
    """Their dropouts, which have to be one."""

    theirs: tuple[str, ...]
    default: float = 0.0

    def write(self, ours: Fields) -> Fields:
        return dict.fromkeys(self.theirs, ours["dropout"])

    def read(self, theirs: Fields, ours: Fields) -> tuple[Fields, list[str]]:
        values = {look_up(theirs, key, self.default) for key in self.theirs}
        *others, last = self.theirs
        names = f"{', '.join(others)} and {last}"
        fault = f"{names} that differ (there is one dropout: set all to one value)"
        return {"dropout": values.pop()}, [fault] if values else []


@dataclass(frozen=True)
class AttentionDropout:
    """Dropout on the attention weights alone, which we have not; ours is kept in a block of our own beside it."""

    theirs: str = "attention_dropout"

    def write(self, ours: Fields) -> Fields:
        return {self.theirs: ours["dropout"], "llmtrain.dropout": ours["dropout"]}

    def read(self, theirs: Fields, ours: Fields) -> tuple[Fields, list[str]]:
        value = look_up(theirs, self.theirs, 0.0)
        is_ours = not value or look_up(theirs, "llmtrain.dropout", None) == value
        fault = f"{self.theirs}={value} (dropout on the attention weights alone; set it to 0)"
        return {"dropout": value}, [] if is_ours else [fault]


@dataclass(frozen=True)
class WholeHeads:
    """Heads divide the width, whatever the size of a head is."""

    def write(self, ours: Fields) -> Fields:
        if ours["hidden_size"] % ours["num_heads"]:
            raise Inexpressible
        return {}

    def read(self, theirs: Fields, ours: Fields) -> tuple[Fields, list[str]]:
        return {}, []


@dataclass(frozen=True)
class Rule:
    """One module of ours ({i}: its layer) and theirs; several of theirs lie in ours one below the other.

    With {e} in the names of theirs, ours is a stack of as many as there are experts.
    """

    ours: str
    theirs: tuple[str, ...]
    transposed: bool = False  # theirs is [in, out] (Conv1D), ours [out, in]
    grouped: bool = False  # theirs has each key-value head's queries, key and value together

    @property
    def stacked(self) -> bool:
        """Whether ours holds all experts, [E, ...]."""
        return "{e}" in self.theirs[0]


@dataclass(frozen=True)
class Layout:
    """One family: its classes, its table of names, and its config.json in both directions."""

    model_type: str
    language_class: str
    scalar_class: str
    rules: tuple[Rule, ...]
    parts: tuple[Part, ...]
    ours: Fields = field(default_factory=dict)
    """What the family always is, where that is not our default."""
    trunk_prefix: str = ""  # missing in files that were saved from the trunk alone
    ignored: str = "$^"  # tensors of theirs that are no weights
    optional: str = "$^"  # weights of theirs that are passed over where the architecture is without them
    head_from: str = ""  # what stands for an output matrix of its own that the files are without: it is the same
    renamed: tuple[tuple[str, str], ...] = ()  # what other versions have in names, and what stands for it here

    @property
    def head(self) -> str:
        """Their name of the output matrix."""
        return next((rule.theirs[0] for rule in self.rules if rule.ours == "head"), "head")

    def write_fields(self, config: ModelConfig) -> Fields:
        """The keys of config.json for an architecture that the layout expresses."""
        theirs: Fields = {}
        for part in self.parts:
            for key, value in part.write(described(config)).items():
                put(theirs, key, value)
        if config.stochastic_depth:
            put(theirs, STOCHASTIC_DEPTH, config.stochastic_depth)
        return theirs

    def read_fields(self, theirs: Fields) -> tuple[Fields, list[str]]:
        """Our keys, and what of theirs is not supported."""
        ours, faults = copy.deepcopy(self.ours), []
        for part in self.parts:
            read, found = part.read(theirs, ours)
            for key, value in read.items():
                put(ours, key, value)
            faults += found
        skipped = look_up(theirs, STOCHASTIC_DEPTH, 0.0)
        return _shortened(ours | ({"stochastic_depth": skipped} if skipped else {})), faults

    def expresses(self, config: ModelConfig) -> bool:
        """Whether the architecture is the same after it was written and read."""
        try:
            ours, faults = self.read_fields(self.write_fields(config))
        except Inexpressible:
            return False
        before, after = described(config), described(to_config(ours))
        return not faults and all(before[key] == after[key] for key in before if key not in NOT_SHAPE)


def to_config(ours: Fields) -> ModelConfig:
    """The typed config of plain values; raises pydantic's ValidationError."""
    return _CONFIG.validate_json(json.dumps(ours))  # JSON, for blocks: strict Python wants their classes


def described(config: ModelConfig) -> Fields:
    """The architecture by our keys and `windows`, with `bias` and nulls replaced by what they stand for.

    But for `attention_scale`, which is null where it is the usual one.
    """
    ours = asdict(config)
    by_width = config.embedding_scale == "sqrt_hidden_size"
    ours |= {
        "num_kv_heads": config.kv_heads,
        "head_dim": config.head_size,
        "ffn_hidden_size": inner_size(config),
        "windows": config.windows,
        "width_ratio": config.width_ratio,  # learning rates go by it: no family has a word for that
        "sparse_layers": config.sparse_layers,
        "attention_scale": None if config.attention_scale == config.head_size**-0.5 else config.attention_scale,
        "embedding_scale": config.hidden_size**0.5 if by_width else config.embedding_scale,
        **{f"{part}_bias": config.has_bias(part) for part in BIASES},
    }
    ours["encoder_layers"] = config.encoder.num_layers if config.architecture == "encoder_decoder" else None
    ours["encoder_sparse_layers"] = config.encoder.sparse_layers if config.architecture == "encoder_decoder" else None
    if config.positions != "relative":
        ours |= dict.fromkeys(RELATIVE)
    if config.positions != "learned":
        ours["position_offset"] = 0
    if config.positions != "rope":
        ours |= dict.fromkeys(ROPE)
    elif not any(config.windows) or (config.rope_local_theta == config.rope_theta and config.rope_scaling is None):
        ours["rope_local_theta"] = None
    if config.experts is not None:
        experts = {key: value for key, value in ours["experts"].items() if key not in ("first_layer", "layer_step")}
        ours["experts"] = experts | {"ffn_hidden_size": expert_size(config, config.experts)}
        if all(config.sparse_layers):
            ours["ffn_hidden_size"] = expert_size(config, config.experts)
    for key in ("bias", "sliding_window", "attention_pattern"):
        del ours[key]
    return ours


def _shortened(ours: Fields) -> Fields:
    """Without what `bias` or a null says too."""
    biases = {ours.get(f"{part}_bias") for part in BIASES if part != "norm" or ours.get("norm") == "layernorm"}
    if len(biases) == 1 and None not in biases:
        ours = {key: value for key, value in ours.items() if not key.endswith("_bias")} | {"bias": biases.pop()}
    sizes: list[Any] = [ours.get(key) for key in ("head_dim", "num_heads", "hidden_size")]
    if all(isinstance(size, int) for size in sizes) and sizes[0] * sizes[1] == sizes[2]:
        ours = {key: value for key, value in ours.items() if key != "head_dim"}
    return ours


_MISSING = object()


def look_up(theirs: Fields, key: str, default: Any) -> Any:
    """The value of a key; dots lead into blocks."""
    value: Any = theirs
    for name in key.split("."):
        value = value.get(name, _MISSING) if isinstance(value, Mapping) else _MISSING
    return default if value is _MISSING else value


def put(theirs: Fields, key: str, value: Any) -> None:
    """Sets a key; dots lead into blocks."""
    *blocks, last = key.split(".")
    for block in blocks:
        theirs = theirs.setdefault(block, {})
    theirs[last] = value
