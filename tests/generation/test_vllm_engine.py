"""Rollouts by vLLM, with a stand-in for it: a model of Transformers that takes the weights, our sampler that answers.

What is checked is ours: names, shapes and moments of the weights, what is asked of each answer, what is made of it.
"""

import importlib.machinery
import json
import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from llmtrain.config.compose import load_config
from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import LoraConfig, ModelConfig, SampledAnswersConfig, VllmRolloutConfig
from llmtrain.data.encoding import PromptRow
from llmtrain.data.tokenizers import train_tokenizer
from llmtrain.engine.distributed import Layout
from llmtrain.generation import vllm_engine
from llmtrain.generation.engines import Engine, OwnEngine
from llmtrain.generation.rollouts import Rollouts, SampledAnswers
from llmtrain.generation.sampler import generate
from llmtrain.generation.vllm_engine import VllmEngine, check_fits, check_installed
from llmtrain.models.formats import read_config, save_model
from llmtrain.models.heads import LanguageModel
from llmtrain.models.layouts import layout_for, to_ours
from llmtrain.models.lora import adapt, initialise_adapters
from llmtrain.objectives.policy_gradient import policy_logprobs
from llmtrain.rewards.sums import WeightedSum
from llmtrain.stages import align, reinforcement

VOCAB, ROWS, ROOM, LONGEST, STOP = 19, 6, 6, 48, frozenset((1, 2))
ALONE = Layout(rank=0, world=1, device=torch.device("cpu"))
SMALL = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "max_sequence_length": 64}
LLAMA = ModelConfig(**SMALL, num_kv_heads=1, tied_embeddings=False)
CONFIGS = {
    "llama": LLAMA,
    "tied llama": ModelConfig(**SMALL, tied_embeddings=True),
    "gpt2": ModelConfig(**SMALL, positions="learned", norm="layernorm", activation="gelu_tanh", bias=True),
}


class SamplingParams(types.SimpleNamespace):
    """What is asked of an answer; what vLLM refuses is refused."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        assert 0 <= self.temperature <= 2
        assert self.max_tokens >= 1
        assert self.ignore_eos, "the architecture's own end token would end answers too"
        assert not self.detokenize, "it has no tokenizer"
        assert -(2**63) <= self.seed < 2**63


class LLM:
    """Holds a model of Transformers in the place of vLLM's own, which has the same names outside."""

    def __init__(self, model: str, **options: Any) -> None:
        transformers = pytest.importorskip("transformers")
        assert {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(os.environ)
        assert options["distributed_executor_backend"] == "external_launcher"
        assert options["load_format"] == "dummy", "a folder without weights"
        assert options["skip_tokenizer_init"]
        assert options["logprobs_mode"] == "processed_logprobs"
        self.options, self.folder = options, model
        self.theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(model))
        self.theirs.to(getattr(torch, options["dtype"]))
        self.theirs.load_weights = self.load_weights
        self.awake, self.has_weights = {"weights", "kv_cache"}, False
        self.has_read, self.is_stale = False, False  # prompts, whose prefixes it keeps

    def load_weights(self, weights: Iterator[tuple[str, torch.Tensor]]) -> set[str]:
        assert "weights" in self.awake
        own, loaded = dict(self.theirs.named_parameters()), set()
        for name, tensor in weights:
            assert own[name].shape == tensor.shape, name
            own[name].data.copy_(tensor)
            loaded.add(name)
        self.has_weights, self.is_stale = True, self.has_read
        return loaded

    def apply_model(self, function: Any) -> list[Any]:
        return [function(self.theirs)]

    def reset_prefix_cache(self) -> bool:
        self.has_read = self.is_stale = False
        return True

    def sleep(self, level: int) -> None:
        assert self.options["enable_sleep_mode"]
        assert level == 2
        self.awake, self.has_weights = set(), False
        with torch.no_grad():
            for parameter in self.theirs.parameters():
                parameter.fill_(float("nan"))

    def wake_up(self, tags: list[str]) -> None:
        self.awake |= set(tags)

    def generate(self, prompts: list[dict[str, list[int]]], params: list[SamplingParams], use_tqdm: bool) -> list[Any]:
        assert not use_tqdm
        assert self.has_weights
        assert self.awake == {"weights", "kv_cache"}
        assert not torch.is_autocast_enabled("cpu")
        assert not self.is_stale, "prompts read with older weights"
        model, found, self.has_read = self.ours(), [], True
        for asked, each in zip(prompts, params, strict=True):
            prompt = asked["prompt_token_ids"]
            assert len(prompt) + each.max_tokens <= self.options["max_model_len"]
            assert all(0 <= token < model.vocab_size for token in each.stop_token_ids)
            (tokens,) = generate(
                model, [prompt], max_new_tokens=each.max_tokens, stop_tokens=set(each.stop_token_ids),
                temperature=each.temperature, seeds=[each.seed],
            )  # fmt: skip
            assert each.logprobs == 0, "that of the sampled token alone"
            logprobs = model(torch.tensor([[*prompt, *tokens]]))[0, len(prompt) - 1 : -1] / (each.temperature or 1.0)
            chosen = logprobs.log_softmax(-1)[range(len(tokens)), tokens].tolist()
            said = [{token: types.SimpleNamespace(logprob=each)} for token, each in zip(tokens, chosen, strict=True)]
            found.append(types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=tuple(tokens), logprobs=said)]))
        return found

    def ours(self) -> LanguageModel:
        config, vocab_size = read_config(self.folder)
        model = LanguageModel(config, vocab_size)
        state = to_ours(layout_for(config), config, list(model.state_dict()), dict(self.theirs.named_parameters()))
        model.load_state_dict(state)
        return model.eval()


@pytest.fixture(autouse=True)
def _vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.ModuleType("vllm")
    fake.__dict__.update(
        LLM=LLM, SamplingParams=SamplingParams, __spec__=importlib.machinery.ModuleSpec("vllm", None)
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "vllm", fake)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("VLLM_NO_USAGE_STATS", "VLLM_LOGGING_LEVEL"):
        monkeypatch.setenv(name, "1")


def language_model(config: ModelConfig, seed: int = 0) -> LanguageModel:
    model = LanguageModel(config, VOCAB).initialise(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    return model.eval()


def engine(policy: LanguageModel, folder: Path, **settings: Any) -> VllmEngine:
    return VllmEngine(
        policy, VllmRolloutConfig(**settings), ALONE, folder / ".vllm", max_length=LONGEST, dtype=torch.float32
    )


def answers(engine: Engine, step: int = 3) -> SampledAnswers:
    """A step's answers, before any method has them."""
    prompts = [PromptRow([5 + number, 6, 7][: 2 + number % 2], str(number), None) for number in range(ROWS)]

    class Prompts:
        def __call__(self, step: int, replacement: int = 0) -> list[PromptRow]:
            return prompts

        def counts(self, step: int) -> dict[str, float]:
            return {}

    kept: list[SampledAnswers] = []
    Rollouts(
        engine=engine, prompts=Prompts(), reward=WeightedSum({"one": lambda a: [1.0] * len(a)}, {"one": 1.0}),
        learn_from=lambda each: kept.append(each) or each, decode=str, stop_tokens=STOP, pad_id=0,
        settings=SampledAnswersConfig(max_new_tokens=ROOM, temperature=0.8), batch_rows=2 * ROWS, group_rows=2, seed=7,
        layout=ALONE, importance_limit=1.5, autocast=lambda: torch.autocast("cpu", torch.bfloat16, enabled=False),
    )(step)  # fmt: skip
    return kept[0]


def assert_same(found: SampledAnswers, wanted: SampledAnswers) -> None:
    assert torch.equal(found.tokens, wanted.tokens)
    assert torch.equal(found.response_mask, wanted.response_mask)
    assert torch.equal(found.finished, wanted.finished)


@pytest.mark.parametrize("sleep", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_rollouts_have_the_answers_of_the_policy_as_it_stands(name: str, sleep: bool, tmp_path: Path) -> None:
    policy = language_model(CONFIGS[name])
    theirs, ours = engine(policy, tmp_path, sleep=sleep), OwnEngine(policy)
    seen = []
    for seed in (0, 1):
        policy.load_state_dict(language_model(CONFIGS[name], seed).state_dict())
        found, wanted = answers(theirs), answers(ours)
        assert_same(found, wanted)
        assert 0 < wanted.finished.sum() < len(wanted)
        # what it says of them is what the policy says, and nothing is said of our own
        logprobs = policy_logprobs(policy, found.tokens, found.response_mask, 0.8)[0]
        torch.testing.assert_close(found.sampler_logprobs, logprobs, rtol=1e-5, atol=1e-5)
        assert wanted.sampler_logprobs is None
        assert found.importance_limit == 1.5
        seen.append(found.tokens)
    assert seen[0].shape != seen[1].shape or not torch.equal(*seen)
    assert theirs.llm.awake == (set() if sleep else {"weights", "kv_cache"})


def test_adapters_are_merged_into_what_is_handed_over(tmp_path: Path) -> None:
    policy = language_model(LLAMA)
    before = answers(OwnEngine(policy))
    adapt(policy, LoraConfig(rank=2, targets=["q_proj", "feed_forward.*"]))
    initialise_adapters(policy, 0, "adapter")
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0.0, 0.5, generator=torch.Generator().manual_seed(4))
    after = answers(OwnEngine(policy))
    assert_same(answers(engine(policy, tmp_path)), after)
    assert after.tokens.shape != before.tokens.shape or not torch.equal(after.tokens, before.tokens)


def test_sharded_weights_are_handed_over_whole(tmp_path: Path) -> None:
    policy = language_model(LLAMA)
    wanted = answers(OwnEngine(policy))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(policy, mesh=init_device_mesh("cpu", (1,)))
        assert_same(answers(engine(policy, tmp_path)), wanted)
    finally:
        dist.destroy_process_group()


def test_answers_end_as_those_of_the_policy_do(tmp_path: Path) -> None:
    policy = language_model(LLAMA)
    prompts = [[5] * length for length in (1, 30, LONGEST - 3, LONGEST - 1)]
    with engine(policy, tmp_path)() as sample:
        for temperature, stops in ((0.0, frozenset[int]()), (1.0, STOP)):
            found = sample(
                prompts, max_new_tokens=20, stop_tokens=stops, temperature=temperature, seeds=[3, 2**63 - 1, 5, 0]
            )
            for prompt, tokens, seed in zip(prompts, found.tokens, [3, 2**63 - 1, 5, 0], strict=True):
                limit = min(20, LONGEST - len(prompt))
                assert [tokens] == generate(
                    policy, [prompt], max_new_tokens=limit, stop_tokens=set(stops), temperature=temperature,
                    seeds=[seed],
                )  # fmt: skip
                assert tokens[-1] in stops or len(tokens) == limit


def test_it_computes_in_its_own_precision(tmp_path: Path) -> None:
    policy = language_model(LLAMA)
    how: dict[str, Any] = {"max_new_tokens": 9, "stop_tokens": STOP, "temperature": 1.0, "seeds": range(8)}
    prompts = [[5 + number, 6] for number in range(8)]
    with OwnEngine(policy)() as sample:
        exact = sample(prompts, **how).tokens
    with torch.autocast("cpu", torch.bfloat16), engine(policy, tmp_path)() as sample:
        assert sample(prompts, **how).tokens == exact
        assert torch.is_autocast_enabled("cpu"), "what judges the answers keeps its own"


def test_it_starts_from_an_architecture_and_leaves_the_environment_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = dict(os.environ)
    started = engine(language_model(LLAMA), tmp_path, gpu_memory_utilization=0.5, enforce_eager=True)
    assert dict(os.environ) == before
    assert [file.name for file in (tmp_path / ".vllm").iterdir()] == ["config.json"]
    wanted = {"gpu_memory_utilization": 0.5, "enforce_eager": True, "enable_sleep_mode": False, "dtype": "float32"}
    assert wanted.items() <= started.llm.options.items()
    monkeypatch.setenv("RANK", "3")  # a launcher's word stands
    engine(language_model(LLAMA), tmp_path)
    assert os.environ["RANK"] == "3"


def test_weights_that_are_not_handed_over_end_the_run(tmp_path: Path) -> None:
    theirs = engine(language_model(LLAMA), tmp_path)
    theirs.llm.theirs.extra = nn.Parameter(torch.zeros(1))
    with pytest.raises(AssertionError, match="weights that the policy has not: extra"):
        answers(theirs)


def test_a_run_learns_what_it_would_from_its_own_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reinforcement, "check_fits", lambda policy, device: None)  # there is no GPU
    tokenizer = train_tokenizer(["What is 1 + 1? 12 - 3 = 9. The answer is 4."] * 5, 300)
    model = LanguageModel(LLAMA, tokenizer.vocab_size).initialise(torch.Generator().manual_seed(0))
    save_model(tmp_path / "parent", model)
    tokenizer.save(tmp_path / "parent")
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "What is {n}?"}}\n' for n in range(12)))
    line = [
        "method=grpo", "rewards=length", "method.max_new_tokens=6", "method.samples_per_prompt=2", "train.steps=3",
        "train.batch_rows=4", "train.sequence_length=64", "schedule.warmup_steps=0", "eval.problems=null", "data=files",
        "optimizer.lr=1e-2", "tracker.samples_every_steps=1", f"data.sources.files.path={tmp_path / 'rows.jsonl'}",
        f"model.init_from={tmp_path / 'parent'}", f"runs_dir={tmp_path}", "rewards.length.options.maximum=8",
        "rewards.length.options.buffer=8",
    ]  # fmt: skip
    align.run(load_config("align", [*line, "run=own"]))
    align.run(load_config("align", [*line, "run=vllm", "rollout=vllm", "rollout.importance_limit=null"]))
    own, other = tmp_path / "own", tmp_path / "vllm"
    for file in ("rollouts.jsonl", "model/model.safetensors"):
        assert (own / file).read_bytes() == (other / file).read_bytes(), file
    measured = [json.loads(text) for text in (other / "metrics.jsonl").read_text().splitlines()]
    assert [0 <= row["train/sampler_mismatch"] < 1e-5 for row in measured if "train/loss" in row] == [True] * 3
    assert "train/sampler_mismatch" not in (own / "metrics.jsonl").read_text()


def test_what_vllm_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed()
    check_fits(language_model(LLAMA), torch.device("cuda"))
    with pytest.raises(ConfigError, match="rollout=vllm: vLLM needs a GPU, and there is none here"):
        check_fits(language_model(LLAMA), torch.device("cpu"))
    mixed = ModelConfig(**SMALL, positions="learned", norm="rmsnorm")
    with pytest.raises(ConfigError, match="no model of this policy's parts"):
        check_fits(language_model(mixed), torch.device("cuda"))
    monkeypatch.setattr(vllm_engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"rollout=vllm: vLLM is not installed. `pip install vllm`"):
        check_installed()
