"""The commands: which schema each one is told by, and the line and examples that `--help` shows.

Imports nothing, so that `llmtrain --help` and a misspelt command are answered at once.
"""

from typing import NamedTuple


class Command(NamedTuple):
    """One word of the command line; its `run(config)` is in `stages/` or `commands/` under the same name."""

    schema: str
    summary: str
    examples: tuple[str, ...]


COMMANDS = {
    "pretrain": Command(
        "PretrainConfig",
        "next-token training on a mixture of text",
        (
            "llmtrain pretrain -m optimizer.lr=3e-4,1e-3",
            "llmtrain pretrain data=files data.sources.files.path='texts/*.jsonl.gz'",
            "llmtrain pretrain run=encoder model=bert_tiny objective=masked objective.whole_words=true",
            "llmtrain pretrain run=small model=llama_10m train.tokens=200_000_000 engine=gpu",
        ),
    ),
    "sft": Command(
        "SftConfig",
        "supervised fine-tuning on conversations",
        (
            "llmtrain sft model.init_from=runs/pretrain",
            "llmtrain sft data=files data.sources.files.path=chats.jsonl train.epochs=3",
        ),
    ),
    "reward": Command(
        "RewardConfig",
        "a reward model from preference pairs",
        (
            "llmtrain reward model.init_from=runs/sft",
            "llmtrain reward data=files data.sources.files.path=pairs.jsonl train.epochs=1",
        ),
    ),
    "align": Command(
        "AlignConfig",
        "preference optimisation (DPO) or reinforcement learning (PPO, GRPO, RLOO, ...)",
        (
            "llmtrain align method=dpo model.init_from=runs/sft",
            "llmtrain align method=kto data=files data.sources.files.path=thumbs.jsonl",
            "llmtrain align method=ppo model.init_from=runs/sft reward_model=runs/reward",
            "llmtrain align method=grpo model.init_from=runs/sft rewards=exact_answer",
        ),
    ),
    "pipeline": Command(
        "PipelineConfig",
        "all stages in sequence, each fed by the ones before",
        ("llmtrain pipeline", "llmtrain pipeline run=night overrides=[engine=gpu]"),
    ),
    "prepare": Command(
        "PrepareConfig",
        "read, clean and tokenise a mixture of text ahead of training",
        (
            "llmtrain prepare data=files data.sources.files.path='texts/*.jsonl.gz' tokenizer.path=runs/pretrain/model",
            "llmtrain prepare data=my_mixture processes=16",
        ),
    ),
    "generate": Command(
        "GenerateConfig",
        "print what a model answers",
        (
            'llmtrain generate prompt="What is 12 + 7?"',
            'llmtrain generate model=runs/sft prompt="Hello" temperature=0.7 top_p=0.9 max_new_tokens=64',
        ),
    ),
    "show": Command(
        "ShowConfig",
        "print what a stage's model will really see, or what a model consists of and costs",
        (
            "llmtrain show data=pile",
            "llmtrain show stage=sft rows=5",
            "llmtrain show model=llama2_7b train.sequence_length=4096 train.micro_batch_rows=1",
        ),
    ),
    "verify": Command(
        "VerifyConfig",
        "check that a checkpoint is whole, or that training again gives the same bits",
        (
            "llmtrain verify",
            "llmtrain verify checkpoint=runs/pretrain/checkpoints/step-00001000",
            "llmtrain verify run=pretrain step=1000",
        ),
    ),
    "doctor": Command(
        "DoctorConfig",
        "check on this machine that the numbers come out right",
        ("llmtrain doctor", "llmtrain doctor device=cpu"),
    ),
}
