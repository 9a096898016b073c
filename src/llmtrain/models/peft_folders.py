"""LoRA weights in and out of folders as the `peft` library has them: adapter_config.json, adapter_model.safetensors.

A and B of each module stand under the names of Transformers' layout (`layouts/`), and beside them, whole, the modules
that were trained as they are.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmtrain.config.errors import UserError
from llmtrain.config.json_files import read_object
from llmtrain.config.schema import LoraConfig
from llmtrain.models.heads import LanguageModel, ScalarModel
from llmtrain.models.layouts import Layout, in_their_order, layout_for, to_ours, to_theirs
from llmtrain.models.lora import OWN_SET, adapted_layers

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
EMBEDDING = "trunk.token_embedding.weight"
# Options of peft's that would change what is computed, and the values with which they do not.
SUPPORTED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none", None), "use_dora": (False, None), "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
}  # fmt: skip
LISTED = 5
TASKS = {"decoder": "CAUSAL_LM", "encoder": None, "encoder_decoder": "SEQ_2_SEQ_LM"}  # as peft calls them


def save_adapter(
    folder: Path, model: LanguageModel | ScalarModel, state: Mapping[str, Tensor], settings: LoraConfig, base: str
) -> None:
    """Writes the adapters of a model and what else was trained; `state` is its whole state dict.

    `base` is where `peft` looks for the weights that they belong to, if it is not told.
    """
    layout = layout_for(model.config)
    tensors: dict[str, Tensor] = {}
    adapted: list[str] = []
    for name, layer in adapted_layers(model):
        a, b = (state[f"{name}.adapters.{OWN_SET}.{matrix}"].cpu() for matrix in ("lora_A", "lora_B"))
        b = in_their_order(layout, model.config, f"{name}.weight", b)
        for part, part_a, part_b in layer.low_rank().by_part(a, b):
            adapted.append(part)
            tensors |= {f"{part}.lora_A.weight": part_a.clone(), f"{part}.lora_B.weight": part_b.clone()}
    trained = [name for name, each in model.named_parameters() if each.requires_grad and ".adapters." not in name]
    whole = to_theirs(layout, model.config, {name: state[name] for name in trained})
    if EMBEDDING in trained and model.config.tied_embeddings and isinstance(model, LanguageModel):
        whole[f"{layout.head}.weight"] = state[EMBEDDING].to("cpu", copy=True)  # peft would take the two apart
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if isinstance(model, ScalarModel) else TASKS[model.config.architecture],
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.rslora,
        "bias": "none",
        "fan_in_fan_out": any(rule.transposed for rule in layout.rules),
        "target_modules": _targets(adapted, model.config.num_layers),
        "modules_to_save": sorted({name.rpartition(".")[0] for name in whole}) or None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    named = {PREFIX + name: value.contiguous() for name, value in (tensors | whole).items()}
    save_file(named, folder / WEIGHTS, metadata={"format": "pt"})


def _targets(adapted: list[str], num_layers: int) -> list[str]:
    """The names by which peft finds the modules: without their layer, where all layers have them."""
    short = sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in adapted})
    return short if len(short) * num_layers == len(adapted) else adapted


@torch.no_grad()
def add_adapter(model: LanguageModel, folder: Path) -> None:
    """Adds the LoRA weights of a folder to the model's. Raises UserError for what does not fit or is not supported."""
    said, tensors = _read(folder)
    layout = layout_for(model.config)
    scale = said["lora_alpha"] / (said["r"] ** 0.5 if said.get("use_rslora") else said["r"])
    weights = to_theirs(layout, model.config, model.state_dict())
    ranks = {value.shape[0] for name, value in tensors.items() if name.endswith(".lora_A.weight") and value.ndim == 2}
    if ranks - {said["r"]}:
        raise UserError(f"{folder / CONFIG} says r={said['r']}, but {WEIGHTS} has matrices of rank {max(ranks)}")
    faults = []
    for name, value in tensors.items():
        module, is_a, _ = name.partition(".lora_A.weight")
        target = f"{module}.weight" if is_a else name
        if name.endswith(".lora_B.weight") and name.replace(".lora_B.", ".lora_A.") in tensors:
            continue
        if _is_tied_head(name, value, model, layout, tensors):
            continue
        if is_a:
            b = tensors.get(f"{module}.lora_B.weight", value.new_empty(0, 0))
            matrices, numel = b.ndim == value.ndim == 2, weights[target].numel() if target in weights else 0
            if not matrices or b.shape[1] != value.shape[0] or b.shape[0] * value.shape[1] != numel:
                faults.append(name)  # said before the product is made, which may be of any size
                continue
            value = scale * (b.float() @ value.float())
            value = value.T if said.get("fan_in_fan_out") else value
        if target not in weights or weights[target].shape != value.shape:
            faults.append(name)
        else:
            weights[target] = weights[target] + value if is_a else value
    if faults:
        more = f" and {len(faults) - LISTED} more" if len(faults) > LISTED else ""
        raise UserError(
            f"{folder / WEIGHTS} does not fit the model, or holds other things than LoRA weights: "
            f"{'; '.join(faults[:LISTED])}{more}"
        )
    model.load_state_dict(to_ours(layout, model.config, list(model.state_dict()), weights))


def _is_tied_head(
    name: str, value: Tensor, model: LanguageModel, layout: Layout, tensors: Mapping[str, Tensor]
) -> bool:  # fmt: skip
    """Whether this is the output matrix of a model whose embedding, of the same values, is there too."""
    if name != f"{layout.head}.weight" or not model.config.tied_embeddings:
        return False
    [embedding] = to_theirs(layout, model.config, {EMBEDDING: value})
    return embedding in tensors and torch.equal(tensors[embedding], value)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of a folder, these without peft's prefix."""
    path = folder / CONFIG
    try:
        said = read_object(path)
        faults = [f"{key}={said[key]!r}" for key, values in SUPPORTED.items() if said.get(key, values[0]) not in values]
        rank, alpha = said["r"], said["lora_alpha"]
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise UserError(f"{folder} is no folder of LoRA weights as peft saves them: {error!r}") from error
    are_numbers = isinstance(rank, int) and isinstance(alpha, int | float) and math.isfinite(alpha)
    if faults or not are_numbers or not rank > 0 or not alpha > 0:
        raise UserError(f"{path} asks for what is not supported: {', '.join(faults) or f'r={rank!r}, alpha={alpha!r}'}")
    return said, {name.removeprefix(PREFIX): value for name, value in tensors.items()}
