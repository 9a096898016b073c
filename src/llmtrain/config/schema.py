"""What a run can be told: every key, its type, its default and its meaning.

These frozen dataclasses are the only place where defaults live; YAML holds choices and differences.
The string under a field is its documentation: it feeds `llmtrain STAGE --help` and the reference page.
Nothing here imports torch, so a wrong config is refused before torch is loaded.
"""

from typing import Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

# strict: the YAML value must have the field's type already ("3" is no integer, 1 is no boolean).
# extra="forbid": an unknown key is a fault, never ignored.
STRICT = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """The architecture to build, or the folder to take it from. Read by `models/transformer.py`."""

    init_from: str | None = None
    """Start from this folder's weights and architecture: a run, a checkpoint or a Transformers folder."""
    num_layers: int = Field(default=4, ge=1)
    """Number of blocks."""
    hidden_size: int = Field(default=128, ge=1)
    """Width of the residual stream."""
    num_heads: int = Field(default=4, ge=1)
    """Query heads; must divide `hidden_size`."""
    num_kv_heads: int | None = Field(default=None, ge=1)
    """Key-value heads (grouped-query attention); must divide `num_heads`. Null: as many as `num_heads`."""
    ffn_hidden_size: int | None = Field(default=None, ge=1)
    """Inner width of the feed-forward part. Null: 4 x hidden (GELU), 8/3 x hidden up to a multiple of 64 (SwiGLU)."""
    max_sequence_length: int = Field(default=512, ge=2)
    """Longest sequence in tokens that the model is built for."""
    positions: Literal["rope", "learned"] = "rope"
    """How positions enter: rotary embedding (Llama) or a learned table (GPT-2)."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation before attention, before the feed-forward part and at the end."""
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    """Feed-forward kind: gated SiLU (Llama), exact GELU, or its tanh approximation (GPT-2)."""
    bias: bool = False
    """Biases in linear layers and LayerNorm (GPT-2: true, Llama: false)."""
    tied_embeddings: bool = True
    """Use the token embedding as the output head."""
    rope_theta: float = Field(default=10_000.0, gt=0)
    """Base of the rotary frequencies."""
    norm_eps: float = Field(default=1e-5, gt=0)
    """Added to the variance in the norms."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on embeddings, attention weights and both residual branches during training."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial weights; projections into the residual stream get it / sqrt(2 x layers)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TokenizerConfig:
    """Which tokenizer, or how to train one. Read by `data/tokenizers.py`."""

    path: str | None = None
    """A `tokenizer.json`, or a folder that holds one. Null: train one on the mixture."""
    vocab_size: int = Field(default=2048, ge=300)
    """Size of a tokenizer that is trained here, special tokens included."""
    train_bytes: int = Field(default=20_000_000, ge=1)
    """Bytes of text, drawn from the sources by weight, that a tokenizer is trained on."""
    chat_template: str | None = None
    """A Jinja file to store as chat template. Null: the one stored with the tokenizer, else our own."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelTokenizerConfig:
    """The tokenizer of a model that exists already. Read by `data/tokenizers.py`."""

    path: str | None = None
    """A folder with `tokenizer.json`, where the model's own folder has none. Null: the model's."""
    chat_template: str | None = None
    """A Jinja file to use as chat template from here on. Null: the one stored with the tokenizer, else our own."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SourceConfig:
    """One source of text documents. Read by `data/documents.py`."""

    path: str
    """File, glob, folder or hub id (JSONL, JSON, Parquet, text; also .gz), or `embedded:prose|code|arithmetic`."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the mixture, relative to the other sources' weights."""
    text_column: str = "text"
    """Column that holds the text."""
    name: str | None = None
    """Configuration name of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset or of a folder with splits."""
    validation_path: str | None = None
    """Held-out documents. Null: every `data.validation_every`-th document of `path` is held out."""
    max_documents: int | None = Field(default=None, ge=1)
    """Read at most this many documents."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CorpusConfig:
    """The pretraining mixture: sources and weights."""

    sources: dict[str, SourceConfig]
    """Sources by name; the names appear in metrics as `data/<name>/tokens`."""
    validation_every: int = Field(default=50, ge=2)
    """Hold out every n-th document of a source that names no `validation_path`."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RowSourceConfig:
    """One source of conversations or preference pairs. Read by `data/rows.py`."""

    path: str
    """A file, glob, folder or hub id, or `embedded:arithmetic`."""
    weight: float = Field(default=1.0, gt=0)
    """Share of the mixture, relative to the other sources' weights."""
    name: str | None = None
    """Configuration name of a hub dataset."""
    split: str = "train"
    """Split of a hub dataset or of a folder with splits."""
    validation_path: str | None = None
    """Held-out rows. Null: every `data.validation_every`-th row of `path` is held out."""
    max_rows: int | None = Field(default=None, ge=1)
    """Read at most this many rows."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SampledPairsConfig:
    """Rejected answers sampled from the starting model itself, checked against the right answer."""

    share: float = Field(default=0.5, gt=0, le=1)
    """Share of the training pairs whose rejected answer is one of the model's own wrong answers."""
    prompts: int = Field(default=1024, ge=1)
    """Prompts to answer."""
    samples: int = Field(default=4, ge=1)
    """Answers sampled for each prompt."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Longest answer in tokens."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RowsConfig:
    """The mixture of conversations (sft), pairs (reward, dpo) or prompts (ppo)."""

    sources: dict[str, RowSourceConfig]
    """Sources by name."""
    validation_every: int = Field(default=50, ge=2)
    """Hold out every n-th row of a source that names no `validation_path`."""
    too_long: Literal["drop", "cut"] = "drop"
    """What happens to rows longer than `train.sequence_length`; counted in the log either way."""
    sampled_pairs: SampledPairsConfig | None = None
    """Pairs against the starting model's own mistakes (reward and dpo; needs rows with a checkable answer)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """How long, and in which portions. Say the length once: steps, tokens, epochs or tokens_per_parameter."""

    steps: int | None = Field(default=None, ge=1)
    """Length of the run in steps."""
    tokens: int | None = Field(default=None, ge=1)
    """Length of the run in tokens (pretraining)."""
    epochs: float | None = Field(default=None, gt=0)
    """Length of the run in passes over the training rows or tokens."""
    tokens_per_parameter: float | None = Field(default=None, gt=0)
    """Length of the run in tokens per model parameter (pretraining; about 20 is Chinchilla's optimum)."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens per step, over all processes (pretraining); a multiple of `sequence_length`."""
    batch_rows: int | None = Field(default=None, ge=1)
    """Rows per step, over all processes: conversations, pairs or prompts."""
    sequence_length: int = Field(default=256, ge=2)
    """Tokens the model sees in one row (at most, where rows differ in length)."""
    micro_batch_rows: int | None = Field(default=None, ge=1)
    """Rows in one forward and backward pass of one process. Null: all rows of the process."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Clip the gradient to this global norm. Null: do not clip."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OptimizerConfig:
    """The optimizer. Read by `optim/optimizers.py`."""

    target: str = Field(default="torch.optim.AdamW", alias="_target_")
    """Import path of a `torch.optim.Optimizer` class; your own class works too."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] | None = Field(default=(0.9, 0.95), strict=False)
    """Decay rates of the moments, for optimizers that take `betas`. Null: the optimizer's own."""
    eps: float | None = Field(default=1e-8, gt=0)
    """Added to the denominator, for optimizers that take `eps`. Null: the optimizer's own."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay of the matrices (vectors get none)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of the optimizer's class."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScheduleConfig:
    """The learning rate as a function of the step. Read by `optim/schedules.py`."""

    name: Literal["cosine", "linear", "wsd", "constant", "inverse_sqrt"] = "cosine"
    """Shape after the warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps of linear rise from lr / (warmup_steps + 1) to lr."""
    min_lr_ratio: float | None = Field(default=None, ge=0, le=1)
    """Last learning rate as a share of the peak (cosine, linear, wsd). Null: 0.1 for cosine, 0 for linear and wsd."""
    decay_steps: int | None = Field(default=None, ge=1)
    """Length of the final decay (wsd). Null: a fifth of the run."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EngineConfig:
    """Where and how it runs. Read by `engine/`."""

    processes: int = Field(default=1, ge=1)
    """Processes to start on this machine; leave at 1 under torchrun or accelerate launch."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where tensors live. auto: cuda if there is one."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of matrix products (autocast); weights and optimizer moments stay float32."""
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: replicate the model (ddp) or shard weights, gradients and moments (fsdp: FSDP2)."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile. auto: where a compiler is present and the run is long enough to earn the compile time back."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of each process. Null: the cores shared out evenly."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """When to save, and what to keep. Read by `engine/checkpoints.py`."""

    every_steps: int | None = Field(default=None, ge=1)
    """Save every n steps. The end of a run is always saved."""
    every_minutes: float | None = Field(default=None, gt=0)
    """Save when this much time has passed since the last save."""
    keep_last: int = Field(default=2, ge=1)
    """Keep this many of the newest checkpoints."""
    keep_best: int = Field(default=0, ge=0)
    """Keep this many of the best checkpoints by `best_metric`, besides the newest."""
    best_metric: str | None = None
    """Metric that ranks checkpoints, such as eval/loss; needs `eval.every_steps`."""
    best_mode: Literal["min", "max"] = "min"
    """Whether a lower or a higher `best_metric` is better."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvalConfig:
    """Measuring while training; the first and the last step are always measured."""

    every_steps: int | None = Field(default=None, ge=1)
    """Measure every n steps as well."""
    max_rows: int = Field(default=256, ge=1)
    """Held-out rows (or blocks of tokens, per source) that the loss is measured on."""
    problems: str | None = None
    """Held-out problems with one right answer: a file of {prompt, answer} rows, or `embedded:arithmetic`."""
    max_problems: int = Field(default=500, ge=1)
    """Problems that are answered (greedily) and compared."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Longest answer to a problem in tokens."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrackerConfig:
    """Who is told of the metrics besides `metrics.jsonl`. Read by `engine/tracking.py`."""

    every_steps: int = Field(default=1, ge=1)
    """Write a row of metrics every n steps."""
    tensorboard: bool = False
    """Write TensorBoard event files into the run folder."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases: off, files in the run folder only, or sent."""
    wandb_project: str = "llmtrain"
    """Weights & Biases project."""
    target: str | None = Field(default=None, alias="_target_")
    """Import path of an `accelerate.tracking.GeneralTracker` class of your own."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DpoConfig:
    """Direct preference optimisation. Read by `objectives/preference.py`."""

    name: Literal["dpo"] = "dpo"
    """Which method."""
    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull towards the reference."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of flipped labels (conservative DPO)."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the added next-token loss on the chosen answer, averaged over its tokens."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PpoConfig:
    """Proximal policy optimisation. Read by `objectives/policy_gradient.py` and `generation/rollouts.py`."""

    name: Literal["ppo"] = "ppo"
    """Which method."""
    epochs: int = Field(default=2, ge=1)
    """Passes over each rollout."""
    minibatches: int = Field(default=2, ge=1)
    """Updates per pass; must divide `train.batch_rows`."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Longest sampled answer in tokens."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; it also divides the logits wherever log-probabilities are taken."""
    gamma: float = Field(default=1.0, gt=0, le=1)
    """Discount per token."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """Lambda of generalised advantage estimation."""
    clip_range: float = Field(default=0.2, gt=0)
    """Clip of the policy ratio."""
    value_clip_range: float = Field(default=0.2, gt=0)
    """Clip of the value update."""
    value_weight: float = Field(default=0.1, ge=0)
    """Weight of the value loss."""
    value_warmup_steps: int = Field(default=0, ge=0)
    """First steps in which only the value model learns."""
    kl_coefficient: float = Field(default=0.05, ge=0)
    """Penalty per nat of log-ratio to the reference, in the reward of each token."""
    kl_target: float | None = Field(default=None, gt=0)
    """Adapt the coefficient to hold this KL per answer. Null: the coefficient is fixed."""
    kl_horizon: int = Field(default=10_000, ge=1)
    """Answers over which the coefficient adapts."""
    whiten_rewards: bool = True
    """Divide rewards by their standard deviation over the batch (the mean is kept)."""
    whiten_advantages: bool = True
    """Shift and scale advantages to mean 0 and standard deviation 1 over the batch."""
    missing_eos_penalty: float = Field(default=1.0, ge=0)
    """Taken from the score of an answer that was cut off before its end token."""


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
    train: TrainConfig = Field(default_factory=TrainConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    tracker: TrackerConfig = Field(default_factory=TrackerConfig)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PretrainConfig(StageConfig):
    """`llmtrain pretrain`: next-token training on a mixture of text."""

    data: CorpusConfig
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SftConfig(StageConfig):
    """`llmtrain sft`: supervised fine-tuning on conversations; the loss is on the assistant's tokens only."""

    data: RowsConfig
    tokenizer: ModelTokenizerConfig = Field(default_factory=ModelTokenizerConfig)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RewardConfig(StageConfig):
    """`llmtrain reward`: a Bradley-Terry reward model from preference pairs."""

    data: RowsConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AlignConfig(StageConfig):
    """`llmtrain align`: preference optimisation (method=dpo) or reinforcement learning (method=ppo)."""

    data: RowsConfig
    method: DpoConfig | PpoConfig = Field(discriminator="name")
    reward_model: str | None = None
    """Folder of the reward model (method=ppo)."""


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
class ShowConfig:
    """`llmtrain show`: print what a stage's model will really see."""

    stage: Literal["pretrain", "sft", "reward", "align"] = "pretrain"
    """Whose data to show."""
    rows: int = Field(default=3, ge=1)
    """How many rows."""
    overrides: list[str] = Field(default_factory=list)
    """Overrides of that stage's config, as on the command line."""
