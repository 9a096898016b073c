"""Rotary positions and sliding windows in config.json, as several families have them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llmtrain.models.layouts.table import Fields, Inexpressible

# Our options of scalings, and theirs.
OPTIONS = {
    "factor": "factor",
    "original_max_sequence_length": "original_max_position_embeddings",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "attention_factor": "attention_factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
}
# Those that each scaling has.
HELD = {
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_sequence_length"),
    "yarn": ("factor", "original_max_sequence_length", "beta_fast", "beta_slow", "attention_factor"),
    "llama3": ("factor", "original_max_sequence_length", "low_freq_factor", "high_freq_factor"),
}
# Options of theirs with which something else is computed, and the values with which it is not.
REFUSED: dict[str, Any] = {"mscale": None, "mscale_all_dim": None, "truncate": True}
SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Rope:
    """The base and scaling of the frequencies: `rope_parameters`, and as version 4 of the library has them.

    `theta` and `fraction` are the older names. Without `default_fraction` the family rotates whole heads.
    """

    theta: str = "rope_theta"
    fraction: str = "partial_rotary_factor"
    default_theta: float = 10_000.0
    default_fraction: float | None = None
    scalings: tuple[str, ...] = tuple(HELD)

    def write(self, ours: Fields) -> Fields:
        scaling = ours["rope_scaling"]
        if ours["positions"] != "rope" or (scaling and scaling["name"] not in self.scalings):
            raise Inexpressible
        theirs: Fields = {"rope_parameters": _written(ours["rope_theta"], scaling), self.theta: ours["rope_theta"]}
        if scaling:
            theirs["rope_scaling"] = theirs["rope_parameters"]
        if scaling and scaling["name"] == "dynamic":  # theirs is the length that was trained on
            theirs["max_position_embeddings"] = scaling["original_max_sequence_length"]
        if self.default_fraction is not None:
            theirs["rope_parameters"]["partial_rotary_factor"] = ours["partial_rotary_factor"]
            theirs[self.fraction] = ours["partial_rotary_factor"]
        return theirs

    def read(self, theirs: Fields, ours: Fields) -> tuple[Fields, list[str]]:
        rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
        found: Fields = {"rope_theta": rope.get("rope_theta", theirs.get(self.theta, self.default_theta))}
        scaling, faults = _read(rope, ours.get("max_sequence_length"), self.scalings)
        fraction = rope.get("partial_rotary_factor", theirs.get(self.fraction, self.default_fraction))
        if self.default_fraction is not None:
            found["partial_rotary_factor"] = fraction
        elif fraction not in (None, 1.0):
            faults.append(f"{self.fraction}={fraction!r} (supported: 1.0)")
        if scaling:
            found["rope_scaling"] = scaling
            if scaling["name"] == "dynamic":
                found["max_sequence_length"] = int(scaling["factor"] * scaling["original_max_sequence_length"])
        return found, faults


@dataclass(frozen=True)
class RopeByLayer:
    """Two bases: the layers with a window have their own, never scaled (Gemma 3)."""

    default_theta: float
    default_local_theta: float
    theta: str = "rope_theta"  # the older names
    local_theta: str = "rope_local_base_freq"

    def write(self, ours: Fields) -> Fields:
        scaling, theta = ours["rope_scaling"], ours["rope_theta"]
        local = ours["rope_local_theta"] or theta
        if ours["positions"] != "rope" or (scaling and scaling["name"] == "dynamic"):
            raise Inexpressible
        older = {self.theta: theta, self.local_theta: local}
        if scaling:
            older["rope_scaling"] = _written(theta, scaling)
        return {"rope_parameters": {FULL: _written(theta, scaling), SLIDING: _written(local, None)}, **older}

    def read(self, theirs: Fields, ours: Fields) -> tuple[Fields, list[str]]:
        rope = theirs.get("rope_parameters") or {}
        full, sliding = rope.get(FULL) or theirs.get("rope_scaling") or {}, rope.get(SLIDING) or {}
        scaling, faults = _read(full, ours.get("max_sequence_length"), ("linear", "yarn", "llama3"))
        _, more = _read(sliding, None, ())
        found = {
            "rope_theta": full.get("rope_theta", theirs.get(self.theta, self.default_theta)),
            "rope_local_theta": sliding.get("rope_theta", theirs.get(self.local_theta, self.default_local_theta)),
        }
        return found | ({"rope_scaling": scaling} if scaling else {}), faults + more


@dataclass(frozen=True)
class OneWindow:
    """`sliding_window` of all layers, or null."""

    default: int | None = None

    def write(self, ours: Fields) -> Fields:
        first, *others = set(ours["windows"])
        if others:
            raise Inexpressible
        return {"sliding_window": first}

    def read(self, theirs: Fields, ours: Fields) -> tuple[Fields, list[str]]:
        return {"sliding_window": theirs.get("sliding_window", self.default)}, []


@dataclass(frozen=True)
class WindowByLayer:
    """`sliding_window`, and `layer_types` that say which layers have it; without them every `period`-th is full.

    Qwen's has a `switch`, and says for older versions how many layers are full before the others have it.
    """

    default: int = 4096
    period: int = 1
    switch: str | None = None

    def write(self, ours: Fields) -> Fields:
        windows: list[int | None] = ours["windows"]
        window = next((each for each in windows if each), None)
        types = [FULL if each is None else SLIDING for each in windows]
        theirs: Fields = {"sliding_window": window or ours["max_sequence_length"], "layer_types": types}
        if self.switch:
            first = types.index(SLIDING) if window else len(types)
            theirs |= {self.switch: window is not None, "max_window_layers": first}
        return theirs

    def read(self, theirs: Fields, ours: Fields) -> tuple[Fields, list[str]]:
        types = theirs.get("layer_types") or self._default_types(theirs, ours.get("num_layers"))
        unknown = sorted({*types} - {SLIDING, FULL})
        if unknown:
            return {}, [f"layer_types with {', '.join(unknown)} (supported: {SLIDING}, {FULL})"]
        window = theirs.get("sliding_window", self.default)
        if (self.switch and not theirs.get(self.switch, False)) or window is None or SLIDING not in types:
            return {}, []
        pattern = shortest_period(["sliding" if each == SLIDING else "full" for each in types])
        return {"sliding_window": window} | ({"attention_pattern": pattern} if "full" in pattern else {}), []

    def _default_types(self, theirs: Fields, num_layers: Any) -> list[str]:
        layers = num_layers if isinstance(num_layers, int) else 0
        if self.switch:
            first = theirs.get("max_window_layers", 28)
            return [SLIDING if layer >= first else FULL for layer in range(layers)]
        period = theirs.get("sliding_window_pattern", self.period)
        return [SLIDING if (layer + 1) % period else FULL for layer in range(layers)]


def shortest_period(items: Sequence[str]) -> list[str]:
    """The shortest beginning that the items are when it is repeated."""
    lengths = range(1, len(items) + 1)
    return list(next(items[:n] for n in lengths if all(item == items[i % n] for i, item in enumerate(items))))


def _written(theta: float, scaling: Fields | None) -> Fields:
    options = {OPTIONS[key]: value for key, value in (scaling or {}).items() if key != "name" and value is not None}
    if scaling and scaling["name"] == "dynamic":
        del options["original_max_position_embeddings"]  # it goes by max_position_embeddings
    return {"rope_theta": theta, "rope_type": scaling["name"] if scaling else "default", **options}


def _read(rope: Fields, max_length: Any, supported: tuple[str, ...]) -> tuple[Fields | None, list[str]]:
    """Our scaling, or none, and what is not supported; `max_length` stands in where no original length is said."""
    name = rope.get("rope_type", rope.get("type", "default"))
    if name == "default":
        return None, []
    if name not in supported:
        words = ", ".join(("default", *supported))
        return None, [f"rope_type={name!r} (supported: {words})"]
    faults = [
        f"{key}={rope[key]!r} (supported: {value!r})" for key, value in REFUSED.items() if rope.get(key, value) != value
    ]
    scaling: Fields = {mine: rope[key] for mine, key in OPTIONS.items() if rope.get(key) is not None}
    if name == "dynamic":
        scaling["original_max_sequence_length"] = max_length
    elif name != "linear":
        scaling.setdefault("original_max_sequence_length", max_length)
    return {"name": name, **{key: scaling[key] for key in HELD[name] if key in scaling}}, faults
