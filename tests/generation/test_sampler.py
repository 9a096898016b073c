"""Sampling: agreement with one-by-one decoding and with Transformers, independence of the batch, distributions."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from llmtrain.config.errors import UserError
from llmtrain.config.schema import ModelConfig
from llmtrain.generation.choice import NUCLEUS_CANDIDATES, Choice, invert_cdf, row_uniforms
from llmtrain.generation.sampler import generate
from llmtrain.models.formats import save_model
from llmtrain.models.heads import LanguageModel

VOCAB_SIZE = 61
LLAMA = ModelConfig(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, max_sequence_length=48, init_std=0.3)
GPT2 = dataclasses.replace(
    LLAMA, positions="learned", norm="layernorm", activation="gelu_tanh", bias=True, num_kv_heads=None
)
BOTH = pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])


def build(config: ModelConfig = LLAMA) -> LanguageModel:
    return LanguageModel(config, VOCAB_SIZE).initialise(torch.Generator().manual_seed(0))


def ragged_prompts(count: int = 9, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = [1 + (7 * row) % 11 for row in range(count)]
    return [torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def greedy_without_cache(model: LanguageModel, prompt: Sequence[int], count: int, stop_tokens: set[int]) -> list[int]:
    answer: list[int] = []
    while len(answer) < count and not (answer and answer[-1] in stop_tokens):
        answer.append(int(model(torch.tensor([[*prompt, *answer]]))[0, -1].argmax()))
    return answer


@BOTH
def test_greedy_equals_decoding_without_cache(config: ModelConfig) -> None:
    model, prompts, stop_tokens = build(config), ragged_prompts(), set(range(20))
    answers = generate(model, prompts, max_new_tokens=12, stop_tokens=stop_tokens, temperature=0)
    assert answers == [greedy_without_cache(model, prompt, 12, stop_tokens) for prompt in prompts]
    assert len({len(answer) for answer in answers}) > 1, "rows should stop at different times"


@BOTH
def test_greedy_equals_transformers(config: ModelConfig, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, prompts = build(config), ragged_prompts()
    save_model(tmp_path, model, extra_config={"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    expected = theirs.generate(padded, attention_mask=mask, max_new_tokens=15, do_sample=False)[:, longest:].tolist()
    answers = generate(model, prompts, max_new_tokens=15, stop_tokens={1}, temperature=0)
    assert answers == [row[: row.index(1) + 1] if 1 in row else row for row in expected]


@BOTH
@pytest.mark.parametrize("settings", [{}, {"top_k": 7}, {"top_p": 0.8}, {"temperature": 1.7}], ids=str)
def test_a_sample_does_not_depend_on_its_batch(config: ModelConfig, settings: dict[str, float]) -> None:
    model, prompts = build(config), ragged_prompts()
    seeds = [100 + row for row in range(len(prompts))]
    arguments = {"max_new_tokens": 12, "stop_tokens": set(range(10)), **settings}
    together = generate(model, prompts, seeds=seeds, **arguments)
    alone = [
        generate(model, [prompt], seeds=[seed], **arguments)[0] for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    in_threes = generate(model, prompts, seeds=seeds, batch_rows=3, **arguments)
    assert together == alone == in_threes
    assert together != generate(model, prompts, seeds=[seed + 1 for seed in seeds], **arguments)


def test_a_longer_limit_only_lengthens_the_sample() -> None:
    model, prompts = build(), ragged_prompts()
    short, long = (generate(model, prompts, max_new_tokens=count, stop_tokens=set()) for count in (5, 20))
    assert [row[:5] for row in long] == short
    assert {len(row) for row in long} == {20}


def test_first_tokens_follow_the_distribution() -> None:
    model, rows, temperature = build(dataclasses.replace(LLAMA, init_std=0.15)).eval(), 4000, 1.3
    with torch.no_grad():
        expected = (model(torch.tensor([[5, 6, 7]]))[0, -1] / temperature).softmax(dim=-1)
    answers = generate(
        model, [[5, 6, 7]] * rows, max_new_tokens=1, stop_tokens=set(), temperature=temperature, batch_rows=1000
    )
    counts = torch.bincount(torch.tensor(answers)[:, 0], minlength=VOCAB_SIZE)
    deviation = (counts - rows * expected) / (rows * expected * (1 - expected)).sqrt()
    assert deviation.abs().max() < 4.5
    assert (counts > 0).sum() > 20


def test_top_k_keeps_the_k_likeliest() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    probabilities = Choice(1.0, 2, None).probabilities(logits)
    torch.testing.assert_close(
        probabilities, torch.tensor([[0.0, 3.0, -1e9, 2.0]]).index_fill(1, torch.tensor([0]), -1e9).softmax(-1)
    )


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.39, [2]), (0.41, [2, 0]), (0.69, [2, 0]), (0.71, [2, 0, 3]), (1.0, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(top_p: float, kept: list[int]) -> None:
    distribution = torch.tensor([[0.3, 0.1, 0.4, 0.2]])
    probabilities = Choice(1.0, None, top_p).probabilities(distribution.log())
    assert probabilities[0].nonzero()[:, 0].tolist() == sorted(kept)
    torch.testing.assert_close(probabilities[0, kept], distribution[0, kept])


def test_the_nucleus_is_the_same_found_among_few_or_all() -> None:
    """One row is peaked, one flat: its nucleus does not fit among the candidates."""
    logits = torch.randn(2, 2000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[4.0], [0.1]])
    found = Choice(1.0, None, 0.9).probabilities(logits)
    descending, tokens = logits.softmax(dim=-1).sort(dim=-1, descending=True)
    outside = descending.cumsum(dim=-1) - descending >= 0.9
    expected = torch.zeros_like(logits).scatter_(-1, tokens, descending.masked_fill(outside, 0.0))
    assert torch.equal(found, expected)
    kept = (found > 0).sum(dim=-1)
    assert kept[0] < NUCLEUS_CANDIDATES < kept[1]
    assert torch.equal(Choice(1.0, None, 0.9).probabilities(logits[:1])[0], found[0])


def test_a_rows_numbers_depend_on_neither_their_count_nor_its_neighbours() -> None:
    several = row_uniforms([3, 5], 40)
    for count in (1, 15, 16, 17):
        assert torch.equal(row_uniforms([5], count)[0], several[1, :count])


def test_inverse_cdf_never_picks_an_impossible_token() -> None:
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 0.50001, 0.0]])
    almost_one = 1 - 2**-24
    picked = [int(invert_cdf(probabilities, torch.tensor([uniform]))) for uniform in (0.0, 0.49, 0.51, almost_one)]
    assert picked == [1, 1, 3, 3]
    for total in torch.rand(1000, generator=torch.Generator().manual_seed(0)) + 0.5:
        assert int(invert_cdf(torch.stack((total, torch.tensor(0.0)))[None], torch.tensor([almost_one]))) == 0


def test_answers_end_where_the_model_does() -> None:
    model = build(GPT2)
    prompts = [[3] * 40, [4] * 47, *[[5] * 2] * 10]
    answers = generate(model, prompts, max_new_tokens=20, stop_tokens=set())
    assert [len(answer) for answer in answers] == [8, 1, *[20] * 10]
    assert answers[0] == generate(model, prompts[:1], max_new_tokens=20, stop_tokens=set(), seeds=[0])[0]


@pytest.mark.parametrize(("prompt", "words"), [([], "prompt 1 is empty"), ([3] * 48, "prompt 1 has 48 tokens")])
def test_prompts_without_room_are_refused(prompt: list[int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        generate(build(), [[1], prompt], max_new_tokens=2, stop_tokens=set())


def test_the_mode_of_the_model_comes_back_and_dropout_is_off() -> None:
    model = build(dataclasses.replace(LLAMA, dropout=0.5)).train()
    first, second = (generate(model, ragged_prompts(), max_new_tokens=5, stop_tokens=set()) for _ in range(2))
    assert first == second
    assert model.training


def test_no_prompts_no_answers() -> None:
    assert generate(build(), [], max_new_tokens=5, stop_tokens=set()) == []


@BOTH
def test_runs_under_autocast(config: ModelConfig) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        answers = generate(build(config), ragged_prompts(), max_new_tokens=4, stop_tokens=set())
    assert [len(answer) for answer in answers] == [4] * 9
