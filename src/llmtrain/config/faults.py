"""What is wrong with a config: one entry per fault, all in one message."""

import difflib
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from llmtrain.config.errors import ConfigError


@dataclass(frozen=True)
class Fault:
    """One fault: the key, what is wrong and what is allowed, and where the value came from."""

    key: str
    problem: str
    origin: str = ""


def nearest(word: str, options: Collection[str], cutoff: float = 0.55) -> str | None:
    """The option that `word` most likely meant, or None where none is alike to the share `cutoff`."""
    found = difflib.get_close_matches(word.lower(), [option.lower() for option in options], n=1, cutoff=cutoff)
    return next(option for option in options if option.lower() == found[0]) if found else None


def suggestion(word: str, options: Collection[str]) -> str:
    """`; did you mean X?` or nothing."""
    option = nearest(word, options)
    return f"; did you mean {option}?" if option else ""


def choices(word: str, options: Collection[str], what: str = "options") -> str:
    """The nearest option and all of them: `; did you mean X? The options are X, Y`."""
    return f"{suggestion(word, options) or '.'} The {what} are {', '.join(sorted(options))}"


def error(command: str, faults: Sequence[Fault]) -> ConfigError:
    """One error that tells of all faults."""
    unique = list(dict.fromkeys(faults))
    count = "1 fault" if len(unique) == 1 else f"{len(unique)} faults"
    lines = [f"{count} in the config of `llmtrain {command}`"]
    for number, fault in enumerate(unique, 1):
        lines.append(f"  {number}. {fault.key + ': ' if fault.key else ''}{fault.problem}")
        if fault.origin:
            lines.append(f"     from {fault.origin}")
    return ConfigError("\n".join(lines))
