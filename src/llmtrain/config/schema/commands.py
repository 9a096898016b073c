"""One class for each command: the whole of its config."""

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from llmtrain.config.schema.adapter import AdapterConfig, NoAdapterConfig
from llmtrain.config.schema.data import CorpusConfig, RowsConfig
from llmtrain.config.schema.health import HealthConfig
from llmtrain.config.schema.model import ModelConfig, ModelTokenizerConfig, TokenizerConfig
from llmtrain.config.schema.objective import ObjectiveConfig, TokenLossConfig, UsualObjectiveConfig
from llmtrain.config.schema.preference import PreferenceMethod
from llmtrain.config.schema.reinforcement import SamplingMethod
from llmtrain.config.schema.rewards import RewardFunctionConfig, RewardModelConfig
from llmtrain.config.schema.rollout import OwnRolloutConfig, RolloutConfig
from llmtrain.config.schema.strict import STRICT
from llmtrain.config.schema.training import (
    CheckpointConfig,
    EngineConfig,
    EvalConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrackerConfig,
    TrainConfig,
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StageConfig:
    """Keys that every training stage has."""

    run: str
    """Name of the run; its folder is `runs_dir`/`run`. The same command with the same name resumes."""
    runs_dir: str = "runs"
    """Folder that holds all runs and the cache of prepared data."""
    seed: int = Field(default=0, ge=0)
    """Decides the initial weights, the order of the data and every random draw."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    adapter: AdapterConfig = Field(default_factory=NoAdapterConfig, discriminator="name")
    train: TrainConfig = Field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    health: HealthConfig = Field(default_factory=HealthConfig)
    tracker: TrackerConfig = Field(default_factory=TrackerConfig)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PretrainConfig(StageConfig):
    """`llmtrain pretrain`: next-token training on a mixture of text, or another objective."""

    data: CorpusConfig
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    objective: ObjectiveConfig = Field(default_factory=UsualObjectiveConfig, discriminator="name")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SftConfig(StageConfig):
    """`llmtrain sft`: supervised fine-tuning on conversations; the loss is on the assistant's tokens only."""

    data: RowsConfig
    tokenizer: ModelTokenizerConfig = Field(default_factory=ModelTokenizerConfig)
    objective: TokenLossConfig = Field(default_factory=TokenLossConfig)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RewardConfig(StageConfig):
    """`llmtrain reward`: a Bradley-Terry reward model from preference pairs and rankings."""

    data: RowsConfig
    objective: RewardModelConfig = Field(default_factory=RewardModelConfig)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AlignConfig(StageConfig):
    """`llmtrain align`: preference optimisation (method=dpo and kin) or reinforcement learning (method=ppo)."""

    data: RowsConfig
    method: PreferenceMethod | SamplingMethod = Field(discriminator="name")
    rollout: RolloutConfig = Field(default_factory=OwnRolloutConfig, discriminator="name")
    reward_model: str | None = None
    """Folder of the reward model, for methods that sample. Null: the newest one, or none where `rewards` are given."""
    reward_model_weight: float = 1.0
    """Weight of the reward model's normalised score beside `rewards`."""
    rewards: dict[str, RewardFunctionConfig] = Field(default_factory=dict)
    """Reward functions by name, summed by weight; the names appear in metrics as `align/reward/<name>`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PipelineStage:
    """One stage of a pipeline."""

    command: Literal["pretrain", "sft", "reward", "align"]
    """Which stage command."""
    model: str | None = None
    """Name of the earlier stage of this pipeline whose finished model this one starts from."""
    reward_model: str | None = None
    """Name of the earlier stage of this pipeline that trained the reward model."""
    overrides: list[str] = Field(default_factory=list)
    """Overrides of the stage's config, as on the command line."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PipelineConfig:
    """`llmtrain pipeline`: stages in sequence, each fed by the ones before, from one YAML."""

    run: str
    """Name of the pipeline; stage NAME runs in `runs_dir`/`run`/NAME."""
    stages: dict[str, PipelineStage]
    """Stages by name, in order."""
    runs_dir: str = "runs"
    """Folder that holds all runs and the cache of prepared data."""
    seed: int = Field(default=0, ge=0)
    """Seed of every stage."""
    overrides: list[str] = Field(default_factory=list)
    """Overrides for every stage, before the stage's own."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PrepareConfig:
    """`llmtrain prepare`: read, clean and tokenise a mixture of text ahead of training."""

    data: CorpusConfig
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    runs_dir: str = "runs"
    """Folder that holds all runs and the cache of prepared data."""
    processes: int | None = Field(default=None, ge=1)
    """Processes to work with. Null: one for each core."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GenerateConfig:
    """`llmtrain generate`: print what a model answers; the text alone goes to standard output."""

    model: str | None = None
    """Folder: a run, a checkpoint or a Transformers folder. Null: the newest finished run."""
    prompt: str = ""
    """What the model is to answer or go on from; `-` reads it from standard input."""
    chat: bool | None = None
    """Apply the chat template. Null: if the model's run was fine-tuned on conversations."""
    runs_dir: str = "runs"
    """Where the newest run is looked for."""
    seed: int = Field(default=0, ge=0)
    """Seed of the sampling."""
    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature; 0 is greedy."""
    top_k: int | None = Field(default=None, ge=1)
    """Sample from the k likeliest tokens only."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Sample from the smallest set of tokens whose probability reaches p."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Longest answer in tokens."""
    samples: int = Field(default=1, ge=1)
    """Number of answers."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class VerifyConfig:
    """`llmtrain verify`: check that a checkpoint or a model is whole: digests, shapes, finiteness."""

    checkpoint: str | None = None
    """Folder: a checkpoint, a run (its newest checkpoint) or a Transformers folder. Null: the newest checkpoint of all
    runs."""
    run: str | None = None
    """Name or folder of a run: train the steps before one of its checkpoints again, from the checkpoint before that,
    and compare every bit."""
    step: int | None = Field(default=None, ge=1)
    """The checkpoint's step (with `run`). Null: the newest."""
    processes: int | None = Field(default=None, ge=1)
    """Processes that the run had (with `run`), where a launcher had started them. Null: as its config says."""
    runs_dir: str = "runs"
    """Where runs are looked for."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DoctorConfig:
    """`llmtrain doctor`: check on this machine that the numbers come out right."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: cuda if there is one."""
    compile: bool = True
    """Check torch.compile as well, which takes most of the time."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ShowConfig:
    """`llmtrain show`: print what a stage's model will really see."""

    stage: Literal["pretrain", "sft", "reward", "align"] = "pretrain"
    """Whose data to show."""
    rows: int = Field(default=3, ge=1)
    """How many rows."""
    model: str | None = None
    """A model's name (`configs/model/`) or folder, instead of a stage: show its layers, its parameters, what it costs
    to compute, and the memory that pretraining it takes as keys of pretrain say (`train.sequence_length`, ...)."""
    run: str | None = None
    """Name or folder of a run, instead of a stage: show what it saw, at `step` or of `document`."""
    runs_dir: str = "runs"
    """Folder that holds all runs and the cache of prepared data."""
    step: int | None = Field(default=None, ge=1)
    """Show the very rows of this step of `run`, and where each comes from."""
    document: str | None = None
    """Say at which steps of `run` this document or row was seen: FILE:NUMBER, of its line (or row, in a table)."""
    overrides: list[str] = Field(default_factory=list)
    """Overrides of that stage's config, as on the command line."""
