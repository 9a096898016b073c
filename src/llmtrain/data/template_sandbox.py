"""The sandbox that chat templates are rendered in: no way out of it, and bounds on time and memory.

A template comes with a tokenizer, from anybody. Jinja's own sandbox keeps it from Python's internals and from ranges
beyond 100,000; it does not keep it from computing for ever or from filling the memory (`'a' * 10**10`, loops in loops,
a text appended to itself). So what could make much of little is estimated before it is done, what has been made is
added up, and each turn of a loop and each call looks at the clock. A single operation on texts within these bounds is
not interrupted.
"""

import functools
import math
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

MAX_SECONDS = 10.0  # of one rendering, which usually takes less than a millisecond
MAX_LENGTH = 2**24  # characters of a text, or entries of a list, that one operation makes
MAX_BYTES = 2**29  # of all that one rendering makes
MAX_BITS = 4096  # of whole numbers
JOINED = "~"  # the filter that stands for the operator; no template can name it
ENTRY_BYTES = 64  # about what an entry of a list takes, besides its place


def _length(value: Any) -> int:
    """How long, or of a whole number how large."""
    if isinstance(value, int):
        return abs(value)
    return len(value) if hasattr(value, "__len__") else 1


def _product(*values: Any, **named: Any) -> int:
    """For operations that make at most the product of what they are given."""
    size = 1
    for value in (*values, *named.values()):
        size *= max(1, _length(value))
    return size


def _replaced(text: Any, old: Any = "", new: Any = "", *rest: Any) -> int:
    text, old = str(text), str(old)
    return len(text) + text.count(old) * len(str(new))


def _joined(texts: Any, separator: Any = "", *rest: Any) -> int:
    if not isinstance(texts, Sequence):  # a generator is not to be used up, and no longer than what it goes over
        return 0
    return len(texts) * len(str(separator)) + sum(_length(each) for each in texts if isinstance(each, str))


def _formatted(form: Any, *values: Any, **named: Any) -> int:
    """Widths, and every value at every place; values may be widths themselves in `%*d` and `{:{width}}`."""
    form = str(form)
    places = form.count("%") + form.count("{")
    inner: list[Any] = [*values, *named.values()]
    inner = [part for each in inner for part in _parts(each)]
    widths_given = "*" in form or re.search(r"\{[^}]*\{", form) is not None
    longest = max((_length(each) for each in inner if widths_given or not isinstance(each, int)), default=0)
    return len(form) + sum(map(int, re.findall(r"\d{1,20}", form))) + places * longest


def _parts(value: Any) -> Sequence[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return value if isinstance(value, list | tuple) else [value]


# What may make much of little, and how long its result is at most.
Bound = Callable[..., int]
METHODS: dict[str, Bound] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill", "expandtabs", "translate"), _product),
    "replace": _replaced, "join": lambda text, texts: _joined(texts, text),
    "format": _formatted, "format_map": _formatted,
}  # fmt: skip
FILTERS: dict[str, Bound] = {
    **dict.fromkeys(("center", "indent", "wordwrap", "urlize", "xmlattr", "batch", "slice"), _product),
    "replace": _replaced, "join": _joined, "format": _formatted,
    "tojson": lambda value, *rest, **named: _product(*rest, **named),
}  # fmt: skip


class _Spent(threading.local):
    """What the rendering in this thread has used up."""

    until = math.inf
    bytes = 0


class _Template(jinja2.Template):
    """Each rendering has its own time and memory."""

    def render(self, *args: Any, **kwargs: Any) -> str:
        """The text, from variables."""
        sandbox = self.environment
        assert isinstance(sandbox, TemplateSandbox)
        sandbox.begin()
        return super().render(*args, **kwargs)


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with bounds. Raises SecurityError, in words for the user, where a template goes beyond them."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})
    template_class = _Template

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._spent = _Spent()
        self.globals.pop("lipsum")  # random texts of any length
        self.filters[JOINED] = lambda parts: self.concat(map(str, parts))
        self.filters |= {name: self.bounded(name, self.filters[name]) for name in FILTERS}

    def begin(self) -> None:
        """A rendering begins in this thread: nothing is spent."""
        self._spent.until, self._spent.bytes = time.monotonic() + MAX_SECONDS, 0

    @property
    def tick(self) -> None:
        """A look at the clock: compiled into each turn of a loop, as a value, for calls cost Jinja's own checks."""
        if time.monotonic() > self._spent.until:
            raise SecurityError(f"it computes for more than {MAX_SECONDS:.0f} seconds, as no chat template needs to")

    def concat(self, texts: Iterable[str]) -> str:
        """Called by Jinja: the output of a template, a block or a macro from its parts."""
        parts = list(texts)
        self._allow(sum(map(len, parts)))
        return str(self._made("".join(parts)))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Called by Jinja for `intercepted_binops`."""
        if operator == "+" and type(left) is str and type(right) is str:  # most of what templates do
            text = left + right
            self._allow(len(text))
            return self._made(text)
        if operator == "%" and isinstance(left, str):
            self._allow(_formatted(left, right))
        elif isinstance(left, int) and isinstance(right, int):
            bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * max(right, 0)}
            if bits.get(operator, 0) > MAX_BITS:
                raise SecurityError(f"it computes a number of more than {MAX_BITS:,} bits")
        elif operator == "*":
            self._allow(_product(left, right))
        elif operator == "+" and hasattr(left, "__len__") and hasattr(right, "__len__"):
            self._allow(len(left) + len(right))
        return self._made(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Called by Jinja for every call; the names are Jinja's, for templates may use any other."""
        __self.tick  # noqa: B018
        bound = METHODS.get(getattr(__obj, "__name__", ""))
        if bound is not None:
            owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)  # str.format comes wrapped
            if isinstance(owner, str):
                __self._allow(bound(owner, *args, **kwargs))
        return __self._made(super().call(__context, __obj, *args, **kwargs))

    def bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The filter of this name, which estimates its result first."""
        bound = FILTERS[name]
        skipped = int(hasattr(function, "jinja_pass_arg"))  # Jinja hands in its context first

        @functools.wraps(function)
        def filtered(*args: Any, **kwargs: Any) -> Any:
            self._allow(bound(*args[skipped:], **kwargs))
            return self._made(function(*args, **kwargs))

        return filtered

    def _allow(self, length: int) -> None:
        if length > MAX_LENGTH:
            raise SecurityError(f"it makes a text or list longer than {MAX_LENGTH:,}")

    def _made(self, value: Any) -> Any:
        if isinstance(value, str | list | tuple):
            self._spent.bytes += sys.getsizeof(value) + (0 if isinstance(value, str) else ENTRY_BYTES * len(value))
            if self._spent.bytes > MAX_BYTES:
                raise SecurityError(f"it makes texts and lists of more than {MAX_BYTES:,} bytes")
        return value

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(_Watched().visit(source), *args, **kwargs)


class _Watched(NodeTransformer):
    """Puts a look at the clock into loops, and a filter into the place of `~`, which Jinja hands to nobody."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(nodes.EnvironmentAttribute("tick")).set_lineno(node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        joined = nodes.Filter(nodes.List(node.nodes), JOINED, [], [], None, None)
        joined.set_lineno(node.lineno, override=True)
        return joined
