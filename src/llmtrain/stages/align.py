"""`llmtrain align`: preference optimisation (method=dpo and kin) or reinforcement learning (method=ppo and kin)."""

from llmtrain.config.schema import AlignConfig, KtoConfig, PairMethod, VllmRolloutConfig
from llmtrain.data.tokenizers import load_tokenizer
from llmtrain.generation.vllm_engine import check_installed
from llmtrain.rewards.functions import check_functions
from llmtrain.stages import assembly, handover, kto, preference, reinforcement, starts
from llmtrain.stages.assembly import Run


def run(config: AlignConfig) -> None:
    """Train, or go on training."""
    check_functions(config.rewards)
    if isinstance(config.rollout, VllmRolloutConfig):
        check_installed()
    assembly.start(stage, config)


def stage(config: AlignConfig) -> None:
    """Build the policy, then what the method needs beside it."""
    run = Run.open(config)
    folder = handover.parent(config)
    tokenizer = load_tokenizer(handover.model_folder(folder))
    # dropout off in everything: the ratio of policy and reference is to be 1 at the start
    policy = starts.load_decoder(config, dropout=0.0)
    if isinstance(config.method, KtoConfig):
        kto.align(run, config.method, policy, tokenizer)
    elif isinstance(config.method, PairMethod):
        preference.align(run, config.method, policy, tokenizer)
    else:
        reinforcement.align(run, policy, tokenizer)
