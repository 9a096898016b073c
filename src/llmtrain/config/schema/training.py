"""How any stage trains, saves and measures."""

from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from llmtrain.config.schema.strict import STRICT
from llmtrain.config.schema.watching import ProfileConfig

PipelineSchedule = Literal["1f1b", "gpipe", "interleaved"]
Float8Scaling = Literal["tensorwise", "rowwise"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LengthWarmupConfig:
    """Shorter rows at the start of a run, as many tokens in a step. Read by `data/batches.py`."""

    start_length: int = Field(ge=2)
    """Tokens in a row at first; doubled until it is `train.sequence_length`."""
    steps: int = Field(ge=1)
    """Steps until rows have their full length; each shorter length lasts equally long."""


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
    stop_after: int | None = Field(default=None, ge=1)
    """Save and stop after this step. The length of the run stays what it is, and so does the learning rate: the same
    command with another number, or none, goes on."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens per step, over all processes (pretraining); a multiple of `sequence_length`."""
    batch_rows: int | None = Field(default=None, ge=1)
    """Rows per step, over all processes: conversations, pairs or sampled answers."""
    sequence_length: int = Field(default=256, ge=2)
    """Tokens the model sees in one row (at most, where rows differ in length)."""
    length_warmup: LengthWarmupConfig | None = None
    """Begin with shorter rows (pretraining): each is cut into equal ones. Micro-batches keep their number of tokens."""
    micro_batch_rows: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    """Rows in one forward and backward pass of one process. Null: all rows of the process. auto: as many as memory
    suffices for, found at the first step and kept in the run's folder (where nothing but the update reads by it).
    In a pipeline, it says into how many portions a step is cut."""
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Clip the gradient to this global norm. Null: do not clip."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Average the weights over the steps with this decay, such as 0.999; the averages are what is measured and handed
    on, training goes on from the weights themselves. Null: no averages."""

    @property
    def given_micro_batch_rows(self) -> int | None:
        """`micro_batch_rows` where it is a number; None where it is all rows, or to be found out."""
        return None if self.micro_batch_rows == "auto" else self.micro_batch_rows


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
    precision: Literal["float32", "bfloat16", "float16", "float8"] = "float32"
    """Arithmetic of matrix products (autocast); weights and optimizer moments stay float32. float16, for GPUs without
    bfloat16, scales the loss and leaves out updates that overflow (not with methods that sample). float8, for GPUs
    from Hopper and Ada on, is bfloat16 but for the blocks' products (torchao; pretrain and sft)."""
    float8_scaling: Float8Scaling = "tensorwise"
    """One scale for a tensor, which is faster, or one for each of its rows, which loses less."""
    sharding: Literal["ddp", "fsdp", "hsdp"] = "ddp"
    """What processes that take different rows do with the model: replicate it (ddp), shard weights, gradients and
    moments over all of them (fsdp: FSDP2), or over `shard_processes` of them and replicate that (hsdp)."""
    shard_processes: int | None = Field(default=None, ge=2)
    """How many processes share one copy of the model (hsdp)."""
    tensor_parallel: int = Field(default=1, ge=1)
    """How many processes compute the same rows, each with a part of the heads and of the feed-forward parts."""
    expert_parallel: int = Field(default=1, ge=1)
    """How many of the processes that take different rows share one set of experts; tokens go to theirs."""
    context_parallel: int = Field(default=1, ge=1)
    """How many processes share the positions of the same rows."""
    pipeline_parallel: int = Field(default=1, ge=1)
    """How many processes share the layers, one after another."""
    pipeline_schedule: PipelineSchedule = "1f1b"
    """The order in which these take micro-batches. gpipe: all forward, then all back, which keeps the most in memory;
    1f1b: one forward, one back; interleaved: 1f1b with two shares of the layers on each process, which waits least."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again instead of keeping it: nothing, all of a block but matrix products and
    attention (selective), or whole blocks (full)."""
    cpu_offload: bool = False
    """Keep sharded weights, gradients and moments in the CPU's memory, and update them there (GPUs; fsdp or hsdp)."""
    compile: bool | Literal["auto"] = "auto"
    """torch.compile. auto: where a compiler is present and the run is long enough to earn the compile time back."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of each process. Null: the cores shared out evenly."""
    deterministic: bool = False
    """Use only algorithms that give the same bits each time, and stop at an operation that has none (see README)."""
    hang_minutes: float | None = Field(default=60.0, gt=0)
    """With several processes: end the run, with the stacks of all, when a process has got nowhere for this long. Longer
    than the longest micro-batch, rollout or evaluation takes. Null: wait for ever."""
    profile: ProfileConfig | None = None
    """Record some steps. Null: none."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """When to save, and what to keep. Read by `engine/saving.py` and `engine/checkpoints.py`."""

    every_steps: int | None = Field(default=None, ge=1)
    """Save every n steps. The end of a run is always saved."""
    every_minutes: float | None = Field(default=None, gt=0)
    """Save when this much time has passed since the last save."""
    asynchronous: bool = True
    """Go on training while files are written; each process keeps a copy of its part of the state in main memory."""
    max_lost_steps: int | None = Field(default=None, ge=1)
    """With `asynchronous`: the most steps that a kill may cost. Training waits for a checkpoint that is being written
    before it has done so many more than the one before has; at least `every_steps`. Null: as many as those; more let it
    go on where a file takes longer than a step."""
    keep_last: int = Field(default=2, ge=1)
    """Keep this many of the newest checkpoints."""
    keep_best: int = Field(default=0, ge=0)
    """Keep this many of the best checkpoints by `best_metric`, besides the newest."""
    keep_every_steps: int | None = Field(default=None, ge=1)
    """Keep for ever the checkpoints of every n-th step, a multiple of `every_steps`."""
    keep_every_hours: float | None = Field(default=None, gt=0)
    """Keep for ever the first checkpoint, and each that was saved this much time after the last one so kept."""
    mirror: str | None = None
    """URL of any file system that fsspec knows (s3://bucket/folder, gs://, hf://, file:///...), where checkpoints are
    kept a second time, below the run's name and by the same rules; a run whose folder is empty goes on from there."""
    best_metric: str | None = None
    """Metric that ranks checkpoints, such as eval/loss; needs `eval.every_steps`."""
    best_mode: Literal["min", "max"] = "min"
    """Whether a lower or a higher `best_metric` is better."""
    final: Literal["last", "best"] | None = None
    """What a finished run hands on as `model/`: its last weights, or those of the checkpoint best by `best_metric`,
    of equal ones the latest. Null: the last; of methods of `align` that sample, whose reward can be exploited, the one
    with the best held-out score (eval/exact_match, else eval/final_reward), if every checkpoint is measured."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvalConfig:
    """Measuring while training; the first and the last step are always measured."""

    every_steps: int | None = Field(default=None, ge=1)
    """Measure every n steps as well."""
    max_rows: int = Field(default=256, ge=1)
    """Held-out rows (or blocks of tokens, per source) that the loss is measured on."""
    problems: str | None = None
    """Held-out problems with one right answer: a file of {prompt, answer} rows, or `embedded:arithmetic`. Null: none.
    `auto`, as sft and align have it: `embedded:arithmetic` where that is all of the data, else none."""
    max_problems: int = Field(default=500, ge=1)
    """Problems that are answered (greedily) and compared."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Longest answer to a problem in tokens."""
    max_prompts: int | None = Field(default=None, ge=1)
    """Answer this many held-out prompts of each source of `data` as well, sampled as in rollouts, and judge the answers
    (methods of `align` that sample): `eval/reward`, and `eval/final_reward`, clipped and less the penalty for a missing
    end token. Null: none."""
    best_of: int | None = Field(default=None, ge=2)
    """Sample this many answers to each problem as well, or where there are none to each held-out prompt, and take the
    one with the highest reward (methods of `align` that sample): a baseline, best-of-n."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrackerConfig:
    """Who is told of the metrics besides `metrics.jsonl`. Read by `engine/tracking.py`."""

    every_steps: int = Field(default=1, ge=1)
    """Write a row of metrics every n steps."""
    samples: int = Field(default=4, ge=0)
    """Sampled answers that are kept each time with their rewards (methods of `align` that sample): in `rollouts.jsonl`,
    the report and the trackers. 0: none."""
    samples_every_steps: int | None = Field(default=None, ge=1)
    """Keep them at every n-th step, and at the first and the last. Null: at every tenth part of the run."""
    tensorboard: bool = False
    """Write TensorBoard event files into the run folder."""
    wandb: Literal["disabled", "offline", "online"] = "disabled"
    """Weights & Biases: off, files in the run folder only, or sent."""
    wandb_project: str = "llmtrain"
    """Weights & Biases project."""
    target: str | None = Field(default=None, alias="_target_")
    """Import path of an `accelerate.tracking.GeneralTracker` class of your own."""
