"""Models without numbers: every shape and name, no memory."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import init
from torch.overrides import TorchFunctionMode

# What torch's layers draw their first weights with.
DRAWS = (init.normal_, init.uniform_, init.kaiming_uniform_)


class _Undrawn(TorchFunctionMode):
    """Leaves weights as they are where a layer would draw its first."""

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextmanager
def on_meta() -> Iterator[None]:
    """Within, modules are made on the meta device.

    Nothing is drawn: there torch's draws go through its reference implementations in Python, which import its compiler
    (half a second) and take a third of a millisecond each.
    """
    with torch.device("meta"), _Undrawn():
        yield
