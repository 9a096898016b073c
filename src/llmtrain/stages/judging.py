"""What judges the sampled answers of a run: the `reward_model` and the `rewards` of its config."""

from collections.abc import Callable, Mapping, Sequence

import torch

from llmtrain.config.errors import DataError
from llmtrain.config.schema import AlignConfig
from llmtrain.data.encoding import PromptRow
from llmtrain.rewards.answers import Reward
from llmtrain.rewards.functions import build_functions
from llmtrain.rewards.models import LearnedReward
from llmtrain.rewards.sums import WeightedSum
from llmtrain.stages.starts import load_reward_model

LEARNED = "reward_model"  # its name among the rewards


def build_reward(config: AlignConfig, *, pad_id: int, device: torch.device, say: Callable[[str], None]) -> WeightedSum:
    """The weighted sum of the reward model's score and the reward functions, those that the config names.

    Where scores are not normalised, so that a KL coefficient and a clip mean something else, it is said.
    Raises ConfigError for a function that cannot be found or built, and as `load_reward_model`.
    """
    rewards: dict[str, Reward] = {}
    if config.reward_model is not None:
        model = load_reward_model(config.reward_model).to(device).eval().requires_grad_(False)
        if not model.is_normalised:
            say(
                f"reward_model: {config.reward_model} is not normalised, as only a finished run of llmtrain reward is; "
                "its scores are taken as they are"
            )
        rewards[LEARNED] = LearnedReward(model, pad_id=pad_id, micro_batch_rows=config.train.given_micro_batch_rows)
    rewards |= build_functions(config.rewards)
    weights = {LEARNED: config.reward_model_weight} | {name: each.weight for name, each in config.rewards.items()}
    return WeightedSum(rewards, {name: weights[name] for name in rewards})


def check_expected(reward: WeightedSum, rows: Mapping[str, Sequence[PromptRow]]) -> None:
    """Raises DataError for a row without a right answer, where a reward compares with it."""
    wanting = reward.needs_expected
    for name, prompts in rows.items() if wanting else ():
        for row in prompts:
            if row.answer is None:
                raise DataError(
                    f"rewards.{wanting[0]} needs rows with the right answer, and there is none in data.sources.{name}"
                    f"{f' at {row.place}' if row.place else ''}: add a column `answer`, or name the one that holds it "
                    f"in data.sources.{name}.columns"
                )
