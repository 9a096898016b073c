"""The order in which the stages of a pipeline take micro-batches."""

from typing import Literal

PipelineSchedule = Literal["1f1b", "gpipe", "interleaved"]
