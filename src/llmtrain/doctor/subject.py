"""What the checks are done on: a small model and rows of different lengths, drawn anew each time."""

import dataclasses
import tempfile

import torch
from torch import Tensor

from llmtrain.config.schema import ModelConfig
from llmtrain.models.formats import load_language_model, load_scalar_model, save_model
from llmtrain.models.heads import LanguageModel, ScalarModel

VOCAB_SIZE = 97
CONFIG = ModelConfig(num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=2, max_sequence_length=64)


def language_model(device: torch.device, num_layers: int = CONFIG.num_layers, dropout: float = 0.0) -> LanguageModel:
    """A model whose weights are large enough that attention is uneven and answers differ."""
    config = dataclasses.replace(CONFIG, num_layers=num_layers, dropout=dropout)
    model = LanguageModel(config, VOCAB_SIZE).initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    return model.to(device)


def loaded_for_alignment(device: torch.device) -> tuple[LanguageModel, ScalarModel]:
    """A policy and a value model that were trained with dropout, loaded as alignment loads them: without."""
    trained = language_model(torch.device("cpu"), dropout=0.2)
    with tempfile.TemporaryDirectory() as folder:
        save_model(f"{folder}/policy", trained)
        save_model(f"{folder}/value", ScalarModel.from_language_model(trained, torch.Generator().manual_seed(1)))
        policy = load_language_model(f"{folder}/policy", dropout=0.0)
        value = load_scalar_model(f"{folder}/value", dropout=0.0)
    return policy.to(device), value.to(device)


def ragged_rows(rows: int, width: int, seed: int, prompt: int = 3) -> tuple[Tensor, Tensor]:
    """Tokens [rows, width] int64, padded on the right with 0, and the mask of what follows the first `prompt`."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCAB_SIZE, (rows, width), generator=draw)
    lengths = torch.randint(prompt + 1, width + 1, (rows, 1), generator=draw)
    lengths[0] = width
    positions = torch.arange(width)
    return torch.where(positions < lengths, tokens, 0), (positions >= prompt) & (positions < lengths)


def prompts(count: int, seed: int) -> list[list[int]]:
    """Prompts of 1 to 11 tokens."""
    draw = torch.Generator().manual_seed(seed)
    return [
        torch.randint(1, VOCAB_SIZE, (1 + (7 * row) % 11,), generator=draw).tolist() for row in range(count)
    ]  # fmt: skip


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """The model's gradients by name; they are taken off it."""
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found
