"""What a run records of itself while it runs."""

from pydantic import Field
from pydantic.dataclasses import dataclass

from llmtrain.config.schema.strict import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ProfileConfig:
    """A trace of some steps, operator by operator, in `profile/` of the run's folder; results stay the same.

    Read by `engine/profiling.py`. Perfetto, chrome://tracing and TensorBoard's profiler show it.
    """

    first_step: int = Field(default=10, ge=1)
    """The first step that is recorded; those before it warm up caches and compile."""
    steps: int = Field(default=3, ge=1)
    """Steps that are recorded, one after the other; each takes some megabytes."""
    stacks: bool = False
    """Also where in the code each operator was called."""
    memory: bool = False
    """Also what is allocated and freed."""
