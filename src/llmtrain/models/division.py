"""Models whose layers several processes share, each with some of them: the stages of a pipeline.

Parameters keep their names, so a stage's are a part of the whole model's.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from llmtrain.config.errors import ConfigError
from llmtrain.config.schema import ModelConfig
from llmtrain.models.transformer import Transformer


class Divisible(nn.Module):
    """A trunk and a head on it. The first layers go with the embeddings, the last with the last norm and the head."""

    trunk: Transformer

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        return self.trunk.config

    @property
    def vocab_size(self) -> int:
        """Number of token ids, V."""
        return self.trunk.vocab_size

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated parts, in order: the units of sharding."""
        return list(self.trunk.blocks)

    @property
    def shared_by_ends(self) -> list[Tensor]:
        """What the first layers and the head both read: the embeddings, where they are the head's matrix too."""
        return []

    def keep(self, layers: Sequence[range]) -> None:
        """Drops all that a process which computes these layers alone does not read.

        Raises ConfigError for a model whose layers share more than hidden states.
        """
        if fault := _indivisible(self.config):
            raise ConfigError(f"engine.pipeline_parallel: the layers of this model are not divided: {fault}")
        trunk, count = self.trunk, len(self.trunk.blocks)
        has_first, has_last = any(each.start == 0 for each in layers), any(each.stop == count for each in layers)
        for layer in range(count):
            if not any(layer in each for each in layers):
                setattr(trunk.blocks, str(layer), None)
        for name, _ in list(trunk.named_children()):
            is_read = {"blocks": True, "final_norm": has_last}.get(name, has_first)
            if name == "token_embedding" and self.shared_by_ends:
                is_read = has_first or has_last
            if not is_read:
                setattr(trunk, name, None)
        for name, part in list(self.named_children()):
            if part is not trunk and not has_last:
                setattr(self, name, None)


def _indivisible(config: ModelConfig) -> str | None:
    """Why layers cannot be computed by different processes; None where they can."""
    if config.architecture == "encoder_decoder":
        return "it is an encoder-decoder, all layers of whose decoder read the encoder's states"
    if config.experts is not None:
        return "it has experts, whose auxiliary losses are made of all layers"
    if config.positions == "relative":
        return "it has positions=relative, whose biases all layers share"
    return None
