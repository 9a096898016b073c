"""Matrix products in float8, forward and backward, by torchao.

Inputs, weights and gradients are scaled to float8's range at each product, by one factor for a tensor (tensorwise) or
one for a row (rowwise), and multiplied in it (Micikevicius et al. 2022, arXiv 2209.05433). Parameters keep their names
and their float32 values, so checkpoints and optimizers know nothing of it.
"""

import dataclasses

from torch import nn

from llmtrain.config.errors import UserError
from llmtrain.config.schema import Float8Scaling

# The units multiply blocks of this size.
MULTIPLE = 16


def to_float8(model: nn.Module, scaling: Float8Scaling, *, emulated: bool = False) -> int:
    """Makes the linear layers of all blocks compute in float8, in place; how many there are.

    Embeddings, head, routers and experts stay as they are, and so do layers whose sizes are no multiples of 16.
    `emulated`: the same rounding, computed without float8 units. Raises UserError where torchao is missing.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
        from torchao.float8.float8_linear import Float8Linear
    except ImportError:
        raise UserError(
            "engine.precision=float8 needs torchao: pip install 'llmtrain[float8]', or use bfloat16"
        ) from None
    # rows of any number: what a product adds up over is filled up to a multiple
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(scaling), emulate=emulated, pad_inner_dim=True)

    def fits(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and module.in_features % MULTIPLE == module.out_features % MULTIPLE == 0

    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for block in module:
                convert_to_float8_training(block, config=config, module_filter_fn=fits)
    return sum(isinstance(module, Float8Linear) for module in model.modules())
