"""What a model consists of and what it costs, from its config alone: built on the meta device, without a number."""

import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from llmtrain.config.compose import load_config
from llmtrain.config.process_mesh import mesh_shape
from llmtrain.config.schema import ModelConfig, PretrainConfig, TokenizerConfig
from llmtrain.data.tokenizers import load_tokenizer
from llmtrain.engine.display import compact
from llmtrain.models.footprint import (
    activation_bytes,
    head_bytes,
    num_active,
    num_in_products,
    num_parameters,
    num_without_embeddings,
    weights_by_name,
)
from llmtrain.models.formats import read_config
from llmtrain.models.heads import LanguageModel, make_model
from llmtrain.models.meta import on_meta
from llmtrain.models.mup import at_width
from llmtrain.optim.optimizers import state_bytes_per_weight
from llmtrain.stages import handover
from llmtrain.stages.planning import rows_per_step


def show_model(model: str, overrides: Sequence[str], console: Console) -> None:
    """Layers, parameters, FLOPs and memory of a model given by name or folder, as `pretrain` would train it.

    Raises what `pretrain` would raise for its config.
    """
    is_folder = Path(model).is_dir()
    said = f"model.init_from={model}" if is_folder else f"model={model}"
    config: PretrainConfig = load_config("pretrain", [said, *overrides], later=("data",))
    if is_folder:
        architecture, vocab_size = read_config(handover.model_folder(model))
    else:
        architecture, vocab_size = at_width(config.model), vocabulary(config.model, config.tokenizer)
    with on_meta():
        built = make_model(architecture, vocab_size)
    _print_layers(console, built)
    _print_parameters(console, built)
    _print_flops(console, built, sorted({config.train.sequence_length, architecture.max_sequence_length}))
    _print_memory(console, built, config)


def vocabulary(model: ModelConfig, tokenizer: TokenizerConfig) -> int:
    """Tokens: those of the tokenizer where the config names it or its size, else as the model was published."""
    if tokenizer.path is not None:
        return load_tokenizer(Path(tokenizer.path)).vocab_size
    asked_for = tokenizer.vocab_size != TokenizerConfig.vocab_size
    return model.published_vocab_size or tokenizer.vocab_size if not asked_for else tokenizer.vocab_size


def _print_layers(console: Console, model: LanguageModel) -> None:
    total = num_parameters(model)
    table = _table("layers", "shape", "number", "parameters", "share")
    for each in weights_by_name(model):
        shape = " x ".join(map(str, each.shape))
        name = each.name.removeprefix("trunk.").removesuffix(".weight")
        table.add_row(name, shape, f"{each.number:,}", f"{each.numel:,}", f"{each.numel / total:.2%}")
    if model.config.tied_embeddings:
        table.add_row("head", "the token embedding", "", "", "")
    console.print(table)


def _print_parameters(console: Console, model: LanguageModel) -> None:
    table = _table(f"vocabulary of {model.vocab_size:,}", "parameters", "")
    counts = {
        "total": num_parameters(model),
        "without embeddings and head": num_without_embeddings(model),
        "active: in products with a token": num_active(model),
    }
    for name, count in counts.items():
        table.add_row(name, f"{count:,}", compact(count))
    console.print(table)


def _print_flops(console: Console, model: LanguageModel, lengths: list[int]) -> None:
    """A backward pass costs two forward passes: one for the weights' gradients, one for the inputs'."""
    table = _table("FLOPs per token", *(f"rows of {length:,}" for length in lengths))
    training = [model.flops_per_token(length) for length in lengths]
    attention = [total - model.flops_per_token(0) for total in training]
    table.add_row("forward", *(compact(total / 3) for total in training))
    table.add_row("forward and backward", *(compact(total) for total in training))
    shares = (f"{part / total:.1%}" for part, total in zip(attention, training, strict=True))
    table.add_row("of these attention's scores and sums", *shares)
    console.print(table)


def _print_memory(console: Console, model: LanguageModel, config: PretrainConfig) -> None:
    """Of a process that holds the whole model."""
    parameters, optimizer = num_parameters(model), config.optimizer
    rows, length = config.train.given_micro_batch_rows, config.train.sequence_length
    data_processes = mesh_shape(config.engine, config.engine.processes).data
    rows = rows or math.ceil(rows_per_step(config.train) / data_processes)
    device = "cpu" if config.engine.device == "cpu" else "cuda"
    # what float8's products keep for the backward pass is bfloat16: they round it again
    precision = "bfloat16" if config.engine.precision == "float8" else config.engine.precision
    in_half = precision != "float32"
    kept = activation_bytes(model.config, rows * length, length, 2 if in_half else 4)
    lines = {
        "weights, float32": 4 * parameters,
        "gradients, float32": 4 * parameters,
        f"state of {optimizer.target.rpartition('.')[2]}": round(state_bytes_per_weight(optimizer) * parameters),
        **({f"weights in {precision}, for products": 2 * num_in_products(model)} if in_half else {}),
        **{f"activations of blocks: {name}": size for name, size in kept.items()},
        **head_bytes(model.config, model.vocab_size, rows * length, device),
    }
    whole = sum(lines.values())
    sums = {"activations of blocks together": sum(kept.values()), "all together": whole}
    table = _table(f"memory with {rows:,} rows of {length:,}, products in {precision}", "GiB", "share")
    for name, size in (lines | sums).items():
        table.add_row(name, f"{size / 2**30:,.2f}", f"{size / whole:.1%}")
    console.print(table)


def _table(title: str, *headings: str) -> Table:
    table = Table()
    table.add_column(title, overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right")
    return table
