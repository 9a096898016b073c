"""Maximal update parametrisation: the best learning rate of a narrow model is that of a wide one (muP).

Yang et al. 2022 (arXiv 2203.03466) in the form of their table 8, which lets embeddings and head be one matrix. With m,
the width over that of the base model:

    weights                                initial deviation   multiplier       learning rate of Adam
    embeddings, norms, biases              σ                   1                1
    matrices of the blocks                 σ / √m              1                1 / m
    head                                   σ                   logits: 1 / m    1
    heads of one number (score, value)     their own           1                1 / m  (table 3: no multiplier)

Attention's scores are multiplied by √D₀ / D instead of 1 / √D, D being the width of heads and D₀ that of the base
model's (definition 4.1). Everything else, and every setting, is the base model's: with m = 1 nothing is changed.
"""

import dataclasses

from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import MUP_OPTIMIZERS, ModelConfig, MupInitConfig
from llmtrain.models.heads import ActorCritic, LanguageModel, ScalarModel, SharedActorCritic

# Their one output is not multiplied, so the learning rate is.
SCALAR_HEADS = ("score.weight", "value.weight")


def at_width(config: ModelConfig) -> ModelConfig:
    """The architecture with scales that were said of the base model as they are at its own width.

    Call it once, for a model that is new: what is saved has them already.
    """
    init = config.init
    if not isinstance(init, MupInitConfig):
        return config
    by_width, attention_scale = config.embedding_scale == "sqrt_hidden_size", config.attention_scale
    if config.head_size != init.base_head_dim:
        attention_scale = (attention_scale or init.base_head_dim**-0.5) * init.base_head_dim / config.head_size
    return dataclasses.replace(
        config,
        attention_scale=attention_scale,
        embedding_scale=init.base_hidden_size**0.5 if by_width else config.embedding_scale,
        logit_scale=config.logit_scale / config.width_ratio,
    )


def learning_rate_scales(
    model: LanguageModel | ScalarModel | ActorCritic | SharedActorCritic, optimizer: str
) -> dict[str, float]:
    """What multiplies the learning rate of parameters, by name, where it is not 1; empty without muP.

    Adapters have the learning rate as it is: low-rank products are no part of muP.
    Raises ConfigError for an optimizer (import path) that there is no rule for.
    """
    if isinstance(model, ActorCritic):
        policy, value = (learning_rate_scales(part, optimizer) for part in (model.policy, model.value))
        return {f"policy.{name}": policy[name] for name in policy} | {f"value.{name}": value[name] for name in value}
    ratio = (model.policy if isinstance(model, SharedActorCritic) else model).config.width_ratio
    if ratio == 1.0:
        return {}
    if optimizer not in MUP_OPTIMIZERS:
        raise ConfigError(
            f"optimizer._target_={optimizer}: the model has init.name=mup, whose learning rates are those of "
            f"{' or '.join(MUP_OPTIMIZERS)}; take that"
        )
    return {
        name: 1.0 / ratio
        for name, parameter in model.named_parameters()
        if ".adapters." not in name and ((".blocks." in name and parameter.ndim >= 2) or name in SCALAR_HEADS)
    }
