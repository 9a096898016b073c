"""The learning rate as a pure function of the step: nothing to save, nothing to fast-forward.

Steps count from 0. The rise takes steps 0 … warmup_steps − 1; step `warmup_steps` has the peak. The shapes below
map what is left of the run to a share of the peak; they reach their last value at `total_steps`, one step beyond the
last, so that the last step still trains when that value is 0.
"""

import math
from collections.abc import Callable

from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import ScheduleConfig

# (steps since the peak, steps from the peak to the end, config) → share of the peak.
Shape = Callable[[int, int, ScheduleConfig], float]


def learning_rate(step: int, *, peak: float, total_steps: int, config: ScheduleConfig) -> float:
    """Learning rate of `step` (from 0) in a run of `total_steps`.

    Raises:
        ConfigError: if the schedule does not fit the length of the run.
    """
    if step < config.warmup_steps:
        return peak * (step + 1) / (config.warmup_steps + 1)
    return peak * SHAPES[config.name](step - config.warmup_steps, total_steps - config.warmup_steps, config)


def cosine(step: int, steps: int, config: ScheduleConfig) -> float:
    """Half a cosine from 1 down to `min_lr_ratio`; Loshchilov and Hutter 2017 (arXiv 1608.03983), equation 5."""
    last = _last(config, 0.1)
    return last + (1 - last) * 0.5 * (1 + math.cos(math.pi * _progress(step, steps)))


def linear(step: int, steps: int, config: ScheduleConfig) -> float:
    """A straight line from 1 down to `min_lr_ratio`."""
    return 1 - (1 - _last(config, 0.0)) * _progress(step, steps)


def wsd(step: int, steps: int, config: ScheduleConfig) -> float:
    """1, then a line down to `min_lr_ratio` over `decay_steps`; Hu et al. 2024 (arXiv 2404.06395), section 4."""
    total = steps + config.warmup_steps
    decay = config.decay_steps or min(max(total // 5, 1), steps)
    if decay > steps:
        raise ConfigError(
            f"schedule.decay_steps={decay} and schedule.warmup_steps={config.warmup_steps} do not fit into "
            f"{total} steps; shorten one of them"
        )
    return 1 - (1 - _last(config, 0.0)) * _progress(step - (steps - decay), decay)


def constant(step: int, steps: int, config: ScheduleConfig) -> float:
    """1 to the end."""
    return 1.0


def inverse_sqrt(step: int, steps: int, config: ScheduleConfig) -> float:
    """√(warmup / step): falls with the root of the step; Vaswani et al. 2017 (arXiv 1706.03762), equation 3."""
    if not config.warmup_steps:
        raise ConfigError("schedule=inverse_sqrt takes its time scale from schedule.warmup_steps; set it to 1 or more")
    return math.sqrt(config.warmup_steps / (step + config.warmup_steps))


SHAPES: dict[str, Shape] = {
    "cosine": cosine,
    "linear": linear,
    "wsd": wsd,
    "constant": constant,
    "inverse_sqrt": inverse_sqrt,
}


def _last(config: ScheduleConfig, default: float) -> float:
    return default if config.min_lr_ratio is None else config.min_lr_ratio


def _progress(step: int, steps: int) -> float:
    """Share of `steps` that has passed, from 0 to 1."""
    return min(max(step / steps, 0.0), 1.0) if steps > 0 else 1.0
