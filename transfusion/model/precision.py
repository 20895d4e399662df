"""A model to sample from in half precision: its matrices are converted once, not cast in every call.

bfloat16   every matrix and kernel: trunk, head, patch layers
float32    embeddings, norms, the residual stream between the layers, rotary angles: what is added up over the depth
"""

from copy import deepcopy

import torch

from transfusion.model.paths import Linear
from transfusion.model.transformer import Transfusion


def at_precision(model: Transfusion, dtype: torch.dtype) -> Transfusion:
    """The model with its products in `dtype`: itself in float32, else a copy."""
    if dtype == torch.float32:
        return model
    model = deepcopy(model)
    of_layers = [module for module in model.layers.modules() if isinstance(module, Linear)]
    for module in (model.output, model.patches, model.refine, *of_layers):
        if module is not None:
            module.to(dtype)
    return model
