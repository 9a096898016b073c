"""How the Transformers library spells our models: names of tensors and keys of config.json, one table for each family.

What no table can express has a layout of our own, which only this package reads. A new family is one more table here.
"""

from llmtrain.config.schema import ModelConfig
from llmtrain.models.layouts.bert import BERT, ROBERTA
from llmtrain.models.layouts.bloom import BLOOM
from llmtrain.models.layouts.experts import MIXTRAL, OLMOE, QWEN3_MOE
from llmtrain.models.layouts.falcon import FALCON
from llmtrain.models.layouts.gemma import GEMMA2, GEMMA3
from llmtrain.models.layouts.gpt2 import GPT2, GPT_BIGCODE
from llmtrain.models.layouts.gpt_neox import GPT_NEOX
from llmtrain.models.layouts.llama import LLAMA, MISTRAL, OLMO2, PHI3, QWEN2, QWEN3
from llmtrain.models.layouts.modernbert import MODERNBERT
from llmtrain.models.layouts.mpt import MPT
from llmtrain.models.layouts.names import (
    in_their_order,
    their_parts,
    their_shapes,
    their_tensors,
    to_ours,
    to_theirs,
)
from llmtrain.models.layouts.own import OWN
from llmtrain.models.layouts.switch import SWITCH
from llmtrain.models.layouts.t5 import T5
from llmtrain.models.layouts.table import Fields, Layout

__all__ = [
    "LAYOUTS",
    "OWN",
    "Fields",
    "Layout",
    "in_their_order",
    "layout_for",
    "their_parts",
    "their_shapes",
    "their_tensors",
    "to_ours",
    "to_theirs",
]

FAMILIES = (
    GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, OLMO2, PHI3, GPT_NEOX, GPT_BIGCODE, FALCON, MPT,
    BLOOM, MIXTRAL, QWEN3_MOE, OLMOE, BERT, ROBERTA, MODERNBERT, T5, SWITCH, OWN,
)  # fmt: skip
LAYOUTS = {layout.model_type: layout for layout in FAMILIES}


def layout_for(config: ModelConfig) -> Layout:
    """The first layout that can express the architecture; our own can express all."""
    return next(layout for layout in LAYOUTS.values() if layout.expresses(config))
