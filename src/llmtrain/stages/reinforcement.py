"""`llmtrain align` with a method that learns from answers which the policy samples."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import (
    AlignConfig,
    GrpoConfig,
    OnlineDpoConfig,
    PpoConfig,
    ReinforceConfig,
    RejectionSamplingConfig,
    RlooConfig,
)
from llmtrain.config.seeds import derive_seed
from llmtrain.data.batches import PromptBatches
from llmtrain.data.encoding import load_prompts
from llmtrain.data.tokenizers import Tokenizer, load_tokenizer
from llmtrain.engine.distributed import spread, total
from llmtrain.engine.trainer import Objective
from llmtrain.generation.estimators import AnswerEstimator, PpoEstimator
from llmtrain.generation.rollouts import Replica, Rollouts, SampledAnswers
from llmtrain.generation.selection import best_and_worst, best_answers
from llmtrain.models.heads import ActorCritic, LanguageModel, ScalarModel, SharedActorCritic
from llmtrain.objectives.advantages import batch_advantages, group_advantages, leave_one_out_advantages, whiten
from llmtrain.objectives.batch import Batch
from llmtrain.objectives.kl import AdaptiveKL, KLStop
from llmtrain.objectives.next_token import NextToken
from llmtrain.objectives.policy_gradient import Grpo, Reinforce
from llmtrain.objectives.ppo import Ppo
from llmtrain.objectives.preference import Dpo
from llmtrain.stages import assembly, handover
from llmtrain.stages.assembly import AnyActorCritic, Run
from llmtrain.stages.evaluators import build_best_of, build_problems
from llmtrain.stages.judging import build_reward, check_expected
from llmtrain.stages.planning import row_digests


@dataclasses.dataclass(kw_only=True)
class Learner:
    """What is a method's own: what it trains, what it makes of answers, and what it minimises."""

    trained: LanguageModel | AnyActorCritic
    model: nn.Module
    """`trained` as spread over the processes."""
    learn_from: Callable[[SampledAnswers], Batch]
    objective: Objective
    parts: Mapping[str, nn.Module] = dataclasses.field(default_factory=dict)
    """What adapts during the run."""


def reinforce(run: Run[AlignConfig], policy: LanguageModel, tokenizer: Tokenizer) -> None:
    """Prompts in, answers sampled and judged by the reward model and the rewards; a policy out."""
    config, method = run.config, run.config.method
    assert not isinstance(method, DpoConfig)
    ...
