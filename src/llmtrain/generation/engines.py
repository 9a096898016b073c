"""What answers prompts with the weights that a policy has now: its own kernels, or an engine with others."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, Protocol

from torch.distributed.tensor import DTensor

from llmtrain.engine.distributed import full_state, is_sharded
from llmtrain.generation.sampler import generate
from llmtrain.models.heads import LanguageModel, make_model
from llmtrain.models.lora import merged_state


class Sampled(NamedTuple):
    """Answers to some prompts."""

    tokens: list[list[int]]
    """The new tokens of each, the stop token included where one was produced."""
    logprobs: list[list[float]] | None = None
    """The log-probability of each at the sampling temperature, by kernels other than the policy's. None: by the
    policy's, which is read where they count."""


class Sample(Protocol):
    """Answers prompts."""

    def __call__(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_tokens: frozenset[int], temperature: float,
        seeds: Sequence[int],
    ) -> Sampled:  # fmt: skip
        """As `generate`: row i is drawn with `seeds[i]` alone, greedily at temperature 0."""


class Engine(Protocol):
    """Answers with a policy's weights, as they are when it is entered."""

    def __call__(self) -> AbstractContextManager[Sample]:
        """Within, what answers prompts. All processes enter together; within, each goes its own way."""


class Replica:
    """A model to sample from: the trained one itself, or, where its weights are sharded, a whole copy kept up to date.

    Rows end at different lengths on different processes, so sampling must not wait for the other processes' weights.
    """

    def __init__(self, part: LanguageModel) -> None:
        self.part = part
        self.copy: LanguageModel | None = None

    def __call__(self) -> LanguageModel:
        """The model with the weights of now. Where sharded, all processes must call this together."""
        if not is_sharded(self.part):
            return self.part
        if self.copy is None:
            self.copy = make_model(self.part.config, self.part.vocab_size)
            first = next(self.part.parameters())  # which may rest elsewhere than where it is computed with
            self.copy.to(first.device_mesh.device_type if isinstance(first, DTensor) else first.device)
        self.copy.load_state_dict(merged_state(self.part, full_state(self.part)))
        return self.copy.eval()


class OwnEngine:
    """The policy itself answers."""

    def __init__(self, policy: LanguageModel) -> None:
        self.replica = Replica(policy)

    @contextmanager
    def __call__(self) -> Iterator[Sample]:
        """As that of `Engine`."""
        yield sampling_from(self.replica())


def sampling_from(model: LanguageModel) -> Sample:
    """What answers prompts with this model."""

    def sample(
        prompts: Sequence[Sequence[int]], *, max_new_tokens: int, stop_tokens: frozenset[int], temperature: float,
        seeds: Sequence[int],
    ) -> Sampled:  # fmt: skip
        tokens = generate(
            model, prompts, max_new_tokens=max_new_tokens, stop_tokens=set(stop_tokens), temperature=temperature,
            seeds=seeds,
        )  # fmt: skip
        return Sampled(tokens)

    return sample
