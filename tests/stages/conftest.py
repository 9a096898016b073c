"""What tests of stages start from."""

from pathlib import Path

import pytest
import torch

from llmtrain.config.schema import ModelConfig
from llmtrain.data.tokenizers import train_tokenizer
from llmtrain.models.formats import save_model
from llmtrain.models.heads import LanguageModel


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
