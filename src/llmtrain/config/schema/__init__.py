"""What a run can be told: every key, its type, its default and its meaning.

These frozen dataclasses are the only place where defaults live; YAML holds choices and differences.
The string under a field is its documentation: it feeds `llmtrain STAGE --help` and the reference page.
Nothing here imports torch, so a wrong config is refused before torch is loaded.
"""

from llmtrain.config.schema.commands import (
    AlignConfig,
    GenerateConfig,
    PipelineConfig,
    PipelineStage,
    PrepareConfig,
    PretrainConfig,
    RewardConfig,
    SftConfig,
    ShowConfig,
    StageConfig,
)
from llmtrain.config.schema.data import (
    CleaningConfig,
    ColumnsConfig,
    CorpusConfig,
    MixedSourceConfig,
    PhaseConfig,
    RowsConfig,
    RowSourceConfig,
    SampledPairsConfig,
    SourceConfig,
    TemplateConfig,
)
from llmtrain.config.schema.model import ModelConfig, ModelTokenizerConfig, TokenizerConfig
from llmtrain.config.schema.preference import DpoConfig
from llmtrain.config.schema.reinforcement import (
    GrpoConfig,
    OnlineDpoConfig,
    PpoConfig,
    ReinforceConfig,
    RejectionSamplingConfig,
    RlooConfig,
    SampledAnswersConfig,
    SamplingMethod,
)
from llmtrain.config.schema.rewards import RewardFunctionConfig
from llmtrain.config.schema.training import (
    CheckpointConfig,
    EngineConfig,
    EvalConfig,
    LengthWarmupConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrackerConfig,
    TrainConfig,
)

__all__ = [
    "AlignConfig",
    "CheckpointConfig",
    "CleaningConfig",
    "ColumnsConfig",
    "CorpusConfig",
    "DpoConfig",
    "EngineConfig",
    "EvalConfig",
    "GenerateConfig",
    "GrpoConfig",
    "LengthWarmupConfig",
    "MixedSourceConfig",
    "ModelConfig",
    "ModelTokenizerConfig",
    "OnlineDpoConfig",
    "OptimizerConfig",
    "PhaseConfig",
    "PipelineConfig",
    "PipelineStage",
    "PpoConfig",
    "PrepareConfig",
    "PretrainConfig",
    "ReinforceConfig",
    "RejectionSamplingConfig",
    "RewardConfig",
    "RewardFunctionConfig",
    "RlooConfig",
    "RowSourceConfig",
    "RowsConfig",
    "SampledAnswersConfig",
    "SampledPairsConfig",
    "SamplingMethod",
    "ScheduleConfig",
    "SftConfig",
    "ShowConfig",
    "SourceConfig",
    "StageConfig",
    "TemplateConfig",
    "TokenizerConfig",
    "TrackerConfig",
    "TrainConfig",
]
