"""What a run can be told: every key, its type, its default and its meaning.

These frozen dataclasses are the only place where defaults live; YAML holds choices and differences.
The string under a field is its documentation: it feeds `llmtrain STAGE --help` and the reference page.
Nothing here imports torch, so a wrong config is refused before torch is loaded.
"""

from llmtrain.config.schema.commands import (
    AlignConfig,
    DoctorConfig,
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
from llmtrain.config.schema.health import HealthConfig
from llmtrain.config.schema.model import ModelConfig, ModelTokenizerConfig, TokenizerConfig
from llmtrain.config.schema.preference import (
    PAIR_METHODS,
    PREFERENCE_METHODS,
    CpoConfig,
    DpoConfig,
    HingeConfig,
    IpoConfig,
    KtoConfig,
    OrpoConfig,
    PairMethod,
    PreferenceMethod,
    RobustConfig,
    SimpoConfig,
)
from llmtrain.config.schema.reinforcement import PpoConfig, SamplingMethod
from llmtrain.config.schema.rewards import RewardFunctionConfig, RewardModelConfig
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
    "PAIR_METHODS",
    "PREFERENCE_METHODS",
    "AlignConfig",
    "CheckpointConfig",
    "CleaningConfig",
    "ColumnsConfig",
    "CorpusConfig",
    "CpoConfig",
    "DoctorConfig",
    "DpoConfig",
    "EngineConfig",
    "EvalConfig",
    "GenerateConfig",
    "HealthConfig",
    "HingeConfig",
    "IpoConfig",
    "KtoConfig",
    "LengthWarmupConfig",
    "MixedSourceConfig",
    "ModelConfig",
    "ModelTokenizerConfig",
    "OptimizerConfig",
    "OrpoConfig",
    "PairMethod",
    "PhaseConfig",
    "PipelineConfig",
    "PipelineStage",
    "PpoConfig",
    "PreferenceMethod",
    "PrepareConfig",
    "PretrainConfig",
    "RewardConfig",
    "RewardFunctionConfig",
    "RewardModelConfig",
    "RobustConfig",
    "RowSourceConfig",
    "RowsConfig",
    "SampledPairsConfig",
    "SamplingMethod",
    "ScheduleConfig",
    "SftConfig",
    "ShowConfig",
    "SimpoConfig",
    "SourceConfig",
    "StageConfig",
    "TemplateConfig",
    "TokenizerConfig",
    "TrackerConfig",
    "TrainConfig",
]
