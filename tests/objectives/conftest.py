import types

import pytest
import torch
from torch import Tensor, nn

from llmtrain.objectives.batch import Batch

VOCAB, HIDDEN = 37, 16


class SmallModel(nn.Module):
    """Causal without attention: a running mean of embeddings, a nonlinearity, a head."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = nn.Parameter(torch.randn(VOCAB, HIDDEN, generator=generator))
        self.head = nn.Parameter(torch.randn(VOCAB, HIDDEN, generator=generator) * 0.3)
        self.score = nn.Parameter(torch.randn(HIDDEN, generator=generator))

    def trunk(self, tokens: Tensor) -> Tensor:
        counts = torch.arange(1, tokens.shape[1] + 1, dtype=self.head.dtype)[:, None]
        return torch.tanh(self.embedding[tokens].cumsum(dim=1) / counts.sqrt())


class SmallLanguageModel(SmallModel):
    def forward(self, tokens, *, read, documents=None, same_as=None):
        return read(self.trunk(tokens), self.head)


class SmallScoreModel(SmallModel):
    def forward(self, tokens):
        return self.trunk(tokens) @ self.score


class SmallActorCritic(SmallModel):
    def forward(self, tokens, *, read, same_as=None):
        hidden = self.trunk(tokens)
        return read(hidden, self.head), hidden @ self.score


def ragged_rows(rows: int, width: int, seed: int, prompt: int = 2) -> tuple[Tensor, Tensor]:
    """Right-padded random rows and the mask of what follows the prompt, of very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, VOCAB, (rows, width), generator=generator)
    lengths = torch.randint(prompt + 1, width + 1, (rows, 1), generator=generator)
    lengths[0], lengths[-1] = width, prompt + 1
    positions = torch.arange(width)
    return torch.where(positions < lengths, tokens, 0), (positions >= prompt) & (positions < lengths)


def gradients(objective, model: nn.Module, batch: Batch, micro_batch_rows: int | None = None) -> dict[str, Tensor]:
    """What the training loop computes: the gradient of summed loss / weight, over micro-batches."""
    model.zero_grad()
    weight = objective.weight(batch)
    for micro in batch.micro_batches(micro_batch_rows):
        (objective(model, micro)[0] / weight).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], wanted: dict[str, Tensor], relative: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    scale = max(float(value.abs().max()) for value in wanted.values())
    assert scale > 0
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=relative * scale, msg=name)


@pytest.fixture
def kit():
    """The small models and the functions above, for test files that cannot import each other."""
    return types.SimpleNamespace(
        vocab=VOCAB,
        language_model=SmallLanguageModel,
        score_model=SmallScoreModel,
        actor_critic=SmallActorCritic,
        ragged_rows=ragged_rows,
        gradients=gradients,
        assert_same_gradients=assert_same_gradients,
    )


@pytest.fixture
def trl():
    return pytest.importorskip("trl")


@pytest.fixture
def tokenizer():
    """For trl's trainers: a word is a token."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefg"])}
    rules = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    rules.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=rules, pad_token="<pad>", eos_token="<eos>")
