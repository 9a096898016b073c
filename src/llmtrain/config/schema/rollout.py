"""What answers the prompts of the methods that sample: the policy's own kernels, or another engine."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from llmtrain.config.schema.strict import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OwnRolloutConfig:
    """The policy answers with the kernels that it is trained with."""

    name: Literal["llmtrain"] = "llmtrain"
    """Which engine."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class VllmRolloutConfig:
    """vLLM answers, on the GPU of each process. Read by `generation/vllm_engine.py`.

    Its kernels round otherwise than those that train, so its samples are almost those of the policy, not quite:
    `train/sampler_mismatch` says how far off, and `importance_limit` makes up for it.
    """

    name: Literal["vllm"] = "vllm"
    """Which engine."""
    gpu_memory_utilization: float = Field(default=0.3, gt=0, le=1)
    """Share of the GPU's memory for vLLM's weights and cache; training needs the rest."""
    enforce_eager: bool = False
    """Start sooner and use less memory, without compiling and CUDA graphs; answers then take longer."""
    sleep: bool = False
    """Free vLLM's memory while the policy is trained. Waking takes time at every step."""
    importance_limit: float | None = Field(default=2.0, ge=1)
    """Weigh the policy's loss by how likely the policy finds a sample against vLLM, by this at most (truncated
    importance sampling). Null: as if the policy had sampled it."""


RolloutConfig = OwnRolloutConfig | VllmRolloutConfig
