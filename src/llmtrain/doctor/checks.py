"""All checks, in the order in which they are shown."""

from llmtrain.doctor.losses import advantages, cross_entropy, first_dpo_step, first_ppo_update, whitening
from llmtrain.doctor.measurement import Check
from llmtrain.doctor.reinforcement import adaptive_kl, clipping, rewards_of_tokens, score_heads, score_places
from llmtrain.doctor.sampling import decoding
from llmtrain.doctor.training import accumulation, bfloat16, compiling, packing, saving

CHECKS: tuple[Check, ...] = (
    cross_entropy,
    packing,
    accumulation,
    bfloat16,
    saving,
    decoding,
    score_heads,
    score_places,
    rewards_of_tokens,
    adaptive_kl,
    whitening,
    advantages,
    clipping,
    first_ppo_update,
    first_dpo_step,
    compiling,  # the slow one
)
