"""What tests of stages start from."""

import shutil
from pathlib import Path

import pytest
import torch

from llmtrain.config.schema import ModelConfig
from llmtrain.data.tokenizers import train_tokenizer
from llmtrain.models.formats import load_language_model, save_model
from llmtrain.models.heads import LanguageModel, ScalarModel


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder to start from."""
    folder = tmp_path_factory.mktemp("parent")
    tokenizer = train_tokenizer(["What is 1 + 1? 12 - 3 = 9. The answer is 4."] * 5, 300)
    config = ModelConfig(num_layers=1, hidden_size=16, num_heads=2, max_sequence_length=128)
    model = LanguageModel(config, tokenizer.vocab_size).initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    save_model(folder, model)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def reward_model(parent: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model's folder, with the parent's tokenizer and other weights than the parent's."""
    folder = shutil.copytree(parent, tmp_path_factory.mktemp("reward_model"), dirs_exist_ok=True)
    draw = torch.Generator().manual_seed(1)
    model = ScalarModel.from_language_model(load_language_model(parent), draw).initialise(draw)
    model.score_mean.fill_(0.5)
    model.score_std.fill_(2.0)
    save_model(folder, model)
    return folder
