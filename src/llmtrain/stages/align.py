"""`llmtrain align`: preference optimisation (method=dpo) or reinforcement learning (method=ppo)."""

from llmtrain.config.schema import AlignConfig, DpoConfig
from llmtrain.data.tokenizers import load_tokenizer
from llmtrain.rewards.functions import check_functions
from llmtrain.stages import assembly, handover, preference, reinforcement
from llmtrain.stages.assembly import Run


def run(config: AlignConfig) -> None:
    """Train, or go on training."""
    check_functions(config.rewards)
    assembly.start(stage, config)


def stage(config: AlignConfig) -> None:
    """Build the policy and its reference, then what the method needs."""
    run = Run.open(config)
    folder = assembly.parent(config)
    tokenizer = load_tokenizer(handover.model_folder(folder))
    # dropout off in everything: the ratio of policy and reference is to be 1 at the start
    policy, reference = (assembly.load_policy(folder, dropout=0.0) for _ in range(2))
    reference.to(run.layout.device).eval().requires_grad_(False)
    if isinstance(config.method, DpoConfig):
        preference.dpo(run, config.method, policy, reference, tokenizer)
    else:
        reinforcement.ppo(run, config.method, policy, reference, tokenizer)
