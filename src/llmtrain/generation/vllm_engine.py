"""vLLM as the engine of rollouts: one for each process, within it, on the GPU that the process trains on.

Written against vLLM 0.33. It is started from an architecture alone, with made-up weights. Then each rollout hands it
the policy's tensors, by their names in the Transformers layout, and it copies them into its own; no file is written.
As everywhere, each row is drawn with a seed of its own.
"""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import VllmRolloutConfig
from llmtrain.engine.distributed import Layout, barrier, full_state
from llmtrain.engine.launching import as_launched
from llmtrain.generation.engines import Sample, Sampled
from llmtrain.models.formats import save_config
from llmtrain.models.heads import LanguageModel
from llmtrain.models.layouts import OWN, layout_for, their_tensors
from llmtrain.models.lora import merged_state

# Prompt tokens that are read at once: vLLM keeps the memory for them from its cache, and its default is for servers.
PREFILL_TOKENS = 4096


class VllmEngine:
    """Answers with vLLM's kernels and the policy's weights.

    Args:
        policy: may be sharded or have adapters; vLLM gets whole, merged weights.
        folder: where config.json is written that vLLM starts from. What vLLM compiles is kept by its name, for resumes.
        max_length: of prompt and answer together, in tokens.
        dtype: of vLLM's weights and products.
    """

    def __init__(
        self, policy: LanguageModel, settings: VllmRolloutConfig, layout: Layout, folder: Path, *, max_length: int,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.policy, self.settings, self.layout, self.max_length = policy, settings, layout, max_length
        if layout.is_main:
            save_config(folder, policy, dtype=dtype)
        barrier(layout)
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # nothing is sent anywhere unasked
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        import vllm

        self.new_params = vllm.SamplingParams
        with as_launched():
            self.llm: Any = vllm.LLM(
                model=str(folder), load_format="dummy", skip_tokenizer_init=True, max_model_len=max_length,
                dtype=str(dtype).removeprefix("torch."), gpu_memory_utilization=settings.gpu_memory_utilization,
                enforce_eager=settings.enforce_eager, enable_sleep_mode=settings.sleep,
                max_num_batched_tokens=PREFILL_TOKENS, logprobs_mode="processed_logprobs",  # at the temperature
                distributed_executor_backend="external_launcher",  # in this process, beside the others of the run
            )  # fmt: skip
        self._sleep()

    @contextmanager
    def __call__(self) -> Iterator[Sample]:
        """Within, vLLM has the weights of now. All processes must enter together."""
        with self._plain_precision():
            if self.settings.sleep:
                torch.cuda.empty_cache()  # what training has left unused
                self.llm.wake_up(tags=["weights"])
            self._take_weights()
            if self.settings.sleep:
                self.llm.wake_up(tags=["kv_cache"])
        yield self.sample
        self._sleep()

    def sample(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_tokens: frozenset[int], temperature: float,
        seeds: Sequence[int],
    ) -> Sampled:  # fmt: skip
        """As that of `Sample`."""
        params = [
            self.new_params(
                seed=seed, temperature=temperature, max_tokens=min(max_new_tokens, self.max_length - len(prompt)),
                stop_token_ids=sorted(stop_tokens), ignore_eos=True,  # no other than these
                logprobs=0, detokenize=False,  # that of the sampled token alone
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]  # fmt: skip
        with self._plain_precision():
            asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
            found = [each.outputs[0] for each in self.llm.generate(asked, params, use_tqdm=False)]
        tokens = [list(each.token_ids) for each in found]
        logprobs = [
            [said[token].logprob for token, said in zip(each, answer.logprobs, strict=True)]
            for each, answer in zip(tokens, found, strict=True)
        ]
        return Sampled(tokens, logprobs)

    def _take_weights(self) -> None:
        """Copies the policy's weights into vLLM's, and forgets what prompts came to with those before."""
        config = self.policy.config
        weights = their_tensors(layout_for(config), config, merged_state(self.policy, full_state(self.policy)))

        def load(model: nn.Module) -> set[str]:
            loaded: set[str] = model.load_weights(weights)  # type: ignore[operator]
            return {name for name, _ in model.named_parameters()} - loaded

        [missing] = self.llm.apply_model(load)
        assert not missing, f"vLLM has weights that the policy has not: {', '.join(sorted(missing))}"
        emptied = self.llm.reset_prefix_cache()
        assert emptied, "vLLM still answers prompts of the rollout before"

    def _sleep(self) -> None:
        if self.settings.sleep:
            self.llm.sleep(level=2)  # forgets the weights: it gets new ones when it is woken

    def _plain_precision(self) -> torch.autocast:
        """vLLM's products have its own dtype, whatever autocast is on around it."""
        return torch.autocast(self.layout.device.type, enabled=False)


def check_installed() -> None:
    """Raises ConfigError where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("rollout=vllm: vLLM is not installed. `pip install vllm`, or leave it at rollout=llmtrain.")


def check_fits(policy: LanguageModel, device: torch.device) -> None:
    """Raises ConfigError where there is no GPU, and for an architecture that vLLM does not have."""
    if device.type != "cuda":
        raise ConfigError("rollout=vllm: vLLM needs a GPU, and there is none here. Leave it at rollout=llmtrain.")
    if layout_for(policy.config) is OWN:
        raise ConfigError(
            "rollout=vllm: vLLM has no model of this policy's parts, which only our own layout can say. "
            "Leave it at rollout=llmtrain."
        )
