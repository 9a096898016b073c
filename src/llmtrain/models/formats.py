"""Models in and out of folders: config.json and safetensors, as the Transformers library and vLLM read them.

Nothing is ever unpickled. `layouts/` holds the names.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from llmtrain.config.errors import UserError
from llmtrain.config.json_files import read_object
from llmtrain.config.schema import ExpertsConfig, ModelConfig
from llmtrain.models.heads import LanguageModel, ScalarModel, make_model
from llmtrain.models.layouts import LAYOUTS, OWN, Fields, Layout, layout_for, their_shapes, to_ours, to_theirs
from llmtrain.models.layouts.table import to_config
from llmtrain.models.meta import on_meta

MAX_FILE_BYTES = 5_000_000_000
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
SCORE_STATISTICS = {"score_mean": 0.0, "score_std": 1.0}
MAX_VOCAB = 2**31
FEW_LAYERS = 256  # cheap to make, so that the names of tensors that are missing can be listed
# So many names are listed of each fault; a wrong architecture has thousands.
LISTED = 8


def read_config(folder: str | Path) -> tuple[ModelConfig, int]:
    """The architecture and the vocabulary size that a folder's config.json (or a hub id's) describes.

    Raises UserError, which names every option that is not supported.
    """
    folder = locate(folder)
    return _architecture(_read_fields(folder)[0], folder)


def load_language_model(
    folder: str | Path, *, state: Mapping[str, Tensor] | None = None, dropout: float | None = None
) -> LanguageModel:
    """The language model of a folder or hub id, float32 on the CPU.

    `state` holds the weights by our own names, where they are not in the folder (a training checkpoint's).
    `dropout` takes the place of the folder's, and of its stochastic depth.
    Raises UserError, which lists all tensors that do not fit.
    """
    folder = locate(folder)
    fields, layout = _read_fields(folder)
    tensors = _read_tensors(folder, layout) if state is None else state
    if "score.weight" in tensors:
        raise UserError(f"{folder} holds a reward model ({layout.scalar_class}); a language model is needed here")
    config, vocab_size = _architecture(fields, folder)
    _check_layers(config, tensors, folder)
    with on_meta():
        model = make_model(_with_dropout(config, dropout), vocab_size)
    _fill(model, layout if state is None else OWN, tensors, folder)
    return model


def load_scalar_model(
    folder: str | Path, *, state: Mapping[str, Tensor] | None = None, dropout: float | None = None
) -> ScalarModel:
    """The score model of a folder or hub id, float32 on the CPU; the rest as in `load_language_model`."""
    folder = locate(folder)
    fields, layout = _read_fields(folder)
    tensors = _read_tensors(folder, layout) if state is None else state
    if "score.weight" not in tensors:
        raise UserError(f"{folder} holds no reward model: it has no score.weight; was it trained by `llmtrain reward`?")
    config, vocab_size = _architecture(fields, folder)
    if config.architecture != "decoder":
        raise UserError(f"{folder} holds an {config.architecture.replace('_', '-')}; reward models are decoders here")
    _check_layers(config, tensors, folder)
    with on_meta():
        model = ScalarModel(_with_dropout(config, dropout), vocab_size)
    statistics = {**SCORE_STATISTICS, **fields.get("llmtrain", {}), **(state or {})}
    model.score_mean, model.score_std = (torch.tensor(float(statistics[name])) for name in SCORE_STATISTICS)
    weights = {name: tensor for name, tensor in tensors.items() if name not in SCORE_STATISTICS}
    _fill(model, layout if state is None else OWN, weights, folder)
    return model


def _with_dropout(config: ModelConfig, dropout: float | None) -> ModelConfig:
    """With another dropout; with none, experts drop no tokens either and routers draw nothing: training is exact."""
    if dropout is None:
        return config
    experts = config.experts
    if experts is not None and dropout == 0.0:
        experts = dataclasses.replace(
            experts, capacity_factor=None, capacity_group_tokens=ExpertsConfig.capacity_group_tokens, jitter=0.0
        )
    return dataclasses.replace(config, dropout=dropout, stochastic_depth=0.0, experts=experts)


def save_model(
    folder: str | Path,
    model: LanguageModel | ScalarModel,
    *,
    state: Mapping[str, Tensor] | None = None,
    extra_config: Mapping[str, Any] | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes config.json and model.safetensors; every bit of a tensor is kept.

    `state` is the model's full state dict where the model itself is sharded. Beyond `max_file_bytes` the weights go
    to several files with an index. `extra_config`: see `save_config`.
    """
    weights = {**(model.state_dict() if state is None else state)}
    for name in SCORE_STATISTICS:
        weights.pop(name, None)
    save_config(folder, model, dtype=next(iter(weights.values())).dtype, extra_config=extra_config)
    tensors = to_theirs(_layout(model.config, extra_config or {}), model.config, weights)
    from huggingface_hub import save_torch_state_dict  # 0.2 s, which reading a folder need not wait for

    save_torch_state_dict(tensors, folder, max_shard_size=max_file_bytes)


def save_config(
    folder: str | Path,
    model: LanguageModel | ScalarModel,
    *,
    dtype: torch.dtype = torch.float32,
    extra_config: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json alone, for weights of `dtype`; makes the folder where there is none.

    `extra_config` is added to it; bos_token_id, eos_token_id and pad_token_id, with which decoders of encoders begin,
    also go to generation_config.json.
    Parts that Transformers cannot combine are written with model_type llmtrain, and config.json says so.
    """
    folder, extra, layout = Path(folder), dict(extra_config or {}), _layout(model.config, extra_config or {})
    if model.config.architecture == "encoder_decoder" and extra.get("pad_token_id") is not None:
        extra["decoder_start_token_id"] = extra["pad_token_id"]
    dtype_name = str(dtype).removeprefix("torch.")
    is_scalar = isinstance(model, ScalarModel)
    fields = {
        "architectures": [layout.scalar_class if is_scalar else layout.language_class],
        "model_type": layout.model_type,
        "vocab_size": model.vocab_size,
        "dtype": dtype_name,
        "torch_dtype": dtype_name,  # the older name of the same
        **layout.write_fields(model.config),
    }
    if isinstance(model, ScalarModel):
        fields |= {"id2label": {"0": "score"}, "label2id": {"score": 0}}
        statistics = {name: float(model.get_buffer(name)) for name in SCORE_STATISTICS}
        fields["llmtrain"] = {**fields.get("llmtrain", {}), **statistics}
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", {**fields, **extra})
    token_ids = {key: extra[key] for key in TOKEN_IDS if extra.get(key) is not None}
    if token_ids and not is_scalar:
        _write_json(folder / "generation_config.json", token_ids)


def _layout(config: ModelConfig, extra: Mapping[str, Any]) -> Layout:
    """The family's, or our own where its positions go by another padding token than the tokenizer has."""
    layout = layout_for(config)
    padding = layout.write_fields(config).get("pad_token_id")
    return layout if padding is None or extra.get("pad_token_id") in (None, padding) else OWN


def locate(folder: str | Path) -> Path:
    """The folder itself, or the local copy of the hub model of that name; raises UserError where there is neither."""
    path = Path(folder)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{folder} is a file; give the folder that holds config.json and the weights")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(folder)) or str(folder).startswith("."):
        raise UserError(f"there is no folder {folder}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(folder), allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:  # the hub client raises some twenty kinds: no network, no such name, no permission
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"there is no folder {folder}, and it could not be fetched from the hub under that name ({reason})"
        ) from error


def _read_fields(folder: Path) -> tuple[Fields, Layout]:
    fields = _read_json(folder / "config.json")
    model_type = fields.get("model_type")
    if model_type not in LAYOUTS:
        raise UserError(
            f"{folder / 'config.json'}: model_type {model_type!r} is not supported; supported: {', '.join(LAYOUTS)}"
        )
    return fields, LAYOUTS[model_type]


def _architecture(fields: Fields, folder: Path) -> tuple[ModelConfig, int]:
    ours, faults = LAYOUTS[fields["model_type"]].read_fields(fields)
    if fields.get("quantization_config"):
        faults.append("quantization_config (supported: float weights)")
    vocab_size = fields.get("vocab_size")
    if type(vocab_size) is not int or not 1 <= vocab_size <= MAX_VOCAB:
        faults.append(f"vocab_size={vocab_size!r} (a whole number from 1 to {MAX_VOCAB:,} is needed)")
    if faults:
        listed = "".join(f"\n  {fault}" for fault in faults)
        raise UserError(f"{folder / 'config.json'} asks for what is not supported:{listed}")
    try:
        return to_config(ours), int(fields["vocab_size"])
    except ValidationError as error:
        listed = "".join(f"\n  {'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise UserError(f"{folder / 'config.json'} describes no valid architecture:{listed}") from error


def _check_layers(config: ModelConfig, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Raises UserError before layers are made, in time and memory, that the weights cannot be for."""
    if config.num_layers > max(len(tensors), FEW_LAYERS):
        raise UserError(
            f"the weights in {folder} do not fit its config.json: it speaks of {config.num_layers:,} layers, and there "
            f"are {len(tensors):,} tensors"
        )


def _read_tensors(folder: Path, layout: Layout) -> dict[str, Tensor]:
    """All tensors of the folder by their names in the layout, without those that are no weights."""
    tensors: dict[str, Tensor] = {}
    for file in _weight_files(folder):
        try:
            tensors |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read as safetensors: {error}") from error
    for before, after in layout.renamed:
        tensors = {re.sub(before, after, name): tensors[name] for name in tensors}
    heads = (f"{layout.head}.", "score.")
    if not any(name.startswith(layout.trunk_prefix) for name in tensors):
        tensors = {name if name.startswith(heads) else layout.trunk_prefix + name: tensors[name] for name in tensors}
    return {name: tensor for name, tensor in tensors.items() if not re.fullmatch(layout.ignored, name)}


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        files = [folder / name for name in _named_files(index)]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise UserError(f"{index} names files that are not there: {', '.join(missing)}")
        return files
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
        raise UserError(
            f"{folder} holds pickled weights only. Pickles can run any code when they are opened, so they are not"
            " opened here: convert them with Transformers' save_pretrained, which writes safetensors"
        )
    raise UserError(f"{folder} holds no weights: neither model.safetensors nor model.safetensors.index.json")


def _named_files(index: Path) -> list[str]:
    """The files that an index names, which have to lie beside it."""
    named = _read_json(index).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise UserError(f"{index}: its weight_map does not say which file each tensor is in")
    outside = [name for name in named.values() if not re.fullmatch(r"[^/\\]+\.safetensors", name)]
    if outside:
        raise UserError(f"{index} names {outside[0]!r}; only .safetensors files beside it are read")
    return sorted(set(named.values()))


def _fill(model: LanguageModel | ScalarModel, layout: Layout, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Puts the tensors in place of the model's own, which are on the meta device."""
    state = model.state_dict()  # a router's bias is no parameter, but belongs to the weights
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items() if name not in SCORE_STATISTICS}
    expected, head = their_shapes(layout, model.config, shapes), f"{layout.head}.weight"
    # a tied head, or one that a score model has no use for
    passed_over = rf"{re.escape(head)}|{layout.optional}"
    tensors = {key: each for key, each in tensors.items() if key in expected or not re.fullmatch(passed_over, key)}
    if head in expected and layout.head_from in tensors:
        tensors = {head: tensors[layout.head_from], **tensors}
    misshapen = [
        f"{name} is {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    faults = {
        "missing": [name for name in expected if name not in tensors],
        "not part of the architecture": [name for name in tensors if name not in expected],
        "of another shape": misshapen,
        "not floating point": [name for name in tensors if not tensors[name].is_floating_point()],
    }
    if any(faults.values()):
        listed = "".join(f"\n  {kind}: {_listed(names)}" for kind, names in faults.items() if names)
        raise UserError(f"the weights in {folder} do not fit its config.json:{listed}")
    model.load_state_dict(to_ours(layout, model.config, list(shapes), tensors), assign=True, strict=False)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return "; ".join(names[:LISTED]) + more


def _read_json(path: Path) -> Fields:
    if not path.is_file():
        raise UserError(f"{path.parent} is no model folder: it has no {path.name}")
    return read_object(path)


def _write_json(path: Path, content: Fields) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
