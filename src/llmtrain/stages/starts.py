"""The models that stages start from: in a run, in one of its checkpoints, or in a Transformers folder."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from llmtrain.config.errors import ConfigError, UserError
from llmtrain.config.schema import LoraConfig, StageConfig
from llmtrain.engine import checkpoints, distributed
from llmtrain.models.formats import load_language_model, load_scalar_model
from llmtrain.models.heads import LanguageModel, ScalarModel
from llmtrain.models.lora import WithoutAdapters, adapt, merged_state
from llmtrain.models.peft_folders import add_adapter
from llmtrain.stages import handover
from llmtrain.stages.assembly import Run

Config = TypeVar("Config", bound=StageConfig)


def fitting_length(config: StageConfig, model: LanguageModel) -> int:
    """The longest row in tokens: what was asked for, as far as the model was built for it."""
    return min(config.train.sequence_length, model.config.max_sequence_length)


def load_policy(folder: str, dropout: float | None = None) -> LanguageModel:
    """The language model in a run, a checkpoint or a Transformers folder, float32 on the CPU.

    `dropout` takes the place of the one that it was trained with.
    """
    return load_language_model(handover.model_folder(folder), state=_checkpoint_state(folder), dropout=dropout)


def load_start(config: StageConfig, dropout: float | None = None) -> LanguageModel:
    """The language model that a stage starts from, as `load_policy`, with the adapter of `model.adapter_from`."""
    return _load_start(handover.parent(config), config.model.adapter_from, dropout)


def load_decoder(config: StageConfig, dropout: float | None = None) -> LanguageModel:
    """As `load_start`; raises ConfigError for a model that does not go on with what it has read."""
    model, stage = load_start(config, dropout), handover.stage_name(config)
    if model.config.architecture != "decoder":
        kind = model.config.architecture.replace("_", "-")
        raise ConfigError(
            f"model.init_from: {handover.parent(config)} holds an {kind}, and {stage} trains decoders; name one."
        )
    return model


def _load_start(folder: str, adapter: str | None, dropout: float | None = None) -> LanguageModel:
    model = load_policy(folder, dropout=dropout)
    if adapter is not None:
        add_adapter(model, Path(adapter))
    return model


def load_reference(run: Run[Config], model: nn.Module, **options: Any) -> nn.Module:
    """The model that the run starts from, on its device: `model` without its adapters, or a second one, frozen.

    `model` is what is trained, as spread over the processes, and `options` make its forward pass the policy's alone.
    Where modules are trained as they are (`adapter.also_train`), it cannot go back.
    """
    adapter = run.config.adapter
    if isinstance(adapter, LoraConfig) and not adapter.also_train:
        return WithoutAdapters(distributed.bare(model), **options)
    return load_start(run.config, dropout=0.0).to(run.layout.device).eval().requires_grad_(False)


def load_reward_model(folder: str) -> ScalarModel:
    """The reward model in a run, a checkpoint or a Transformers folder, without dropout."""
    return load_scalar_model(handover.model_folder(folder), state=_checkpoint_state(folder), dropout=0.0)


def _checkpoint_state(folder: str) -> dict[str, Tensor] | None:
    """The weights in a checkpoint, those of the policy where it holds an actor-critic; None for other folders."""
    if not (Path(folder) / "manifest.json").is_file():
        return None
    fault = checkpoints.inspect(Path(folder))
    if fault:
        raise UserError(f"checkpoint {folder}: {fault}. Name another one.")
    return checkpoint_weights(Path(folder))


def checkpoint_weights(folder: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint by name, whole: those of the policy where it holds an actor-critic."""
    state = checkpoints.read_model(folder)
    policy = {name.removeprefix("policy."): value for name, value in state.items() if name.startswith("policy.")}
    start = handover.read_start(folder)
    return (policy or state) if start is None else _completed(policy or state, start)


def _completed(trained: Mapping[str, Tensor], start: handover.Start) -> dict[str, Tensor]:
    """The weights that a run with adapters started from, with what it has trained: adapters added, others replaced."""
    model = _load_start(start.init_from, start.adapter_from)
    adapt(model, dataclasses.replace(start.adapter, also_train=[]))
    state = {**model.state_dict(), **trained}
    if "score.weight" in trained:
        state.pop("head.weight", None)
    return merged_state(model, state)
